"""The runs that the demo compares: each is the training script with configs/demo.yaml and the flags here."""

POINTS = 20  # models saved along each run

# R and the operations for pictures of this size: see docs/benchmarks.md.
AUGMENT = ["--augment_range=1.25", "--randaugment_operations=graded", "--randaugment_magnitude=15"]


def rounds(steps, num_shards=1):
    return f"--steps_per_round={steps // num_shards // POINTS}"


STEPS = 800
PLAIN = ["--mitigation=none", rounds(STEPS)]
FULL = ["--mitigation=iet-agc+", rounds(STEPS, 4), *AUGMENT]

DEMO = {"none": PLAIN, "iet-agc+": FULL}

CONTROLS = {
    "none, half the learning rate": [*PLAIN, "--learning_rate=5e-4"],
    "none, de-duplicated": [*PLAIN, "--deduplicate=exact"],
    "none, random skips": [*PLAIN, "--random_skip_rate={skip_rate}"],
    "none, uniform augmentation": [
        *PLAIN,
        "--random_augment_rate={augment_rate}",
        "--random_augment_strength=0.5",
        *AUGMENT[1:],
    ],
    "agc": ["--mitigation=agc", rounds(STEPS)],
    "agc-taa": ["--mitigation=agc", rounds(STEPS), *AUGMENT],
    "iet": ["--mitigation=iet", rounds(STEPS, 4)],
    "iet-agc": ["--mitigation=iet-agc", rounds(STEPS, 4)],
    "iet-agc+, de-duplicated": [*FULL, "--deduplicate=exact"],
    "iet-agc+, RandAugment as it is": ["--mitigation=iet-agc+", rounds(STEPS, 4), "--augment_range=1.25"],
}
