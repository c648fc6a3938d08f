"""Settings of the monitor: what is measured along a training, how often, and what follows from it."""

import math
from dataclasses import dataclass

from ..errors import UsageError
from ..settings import Resume, at_least, setting


@dataclass(kw_only=True)
class MonitorSettings:
    """Losses of training and held-out images, and copies among drawn images, along the training."""

    monitor_every: int | None = setting(
        None,
        "Measure the aggregated model after every this many rounds, and after the last: with held-out images their "
        "loss and that of training images on fixed noise, and the gap; with --monitor_images how many drawn images are "
        "copies. Written to ietagc/monitor.html. Changes nothing of the training.",
        resume=Resume.FREE,
        type=int,
        **at_least(1),
    )
    monitor_steps: int | None = setting(
        None,
        "Instead of --monitor_every: measure after every this many steps, counted over all proxies. Several proxies "
        "are one model only where they are averaged: then after the first round that ends at or after such a step.",
        resume=Resume.FREE,
        type=int,
        **at_least(1),
    )
    monitor_images: int | None = setting(
        None,
        "At each measurement draw this many images for captions (or classes) of training images, the same each time, "
        "and compare them with the training images: Sim Score, copy rate, and a sheet in ietagc/monitor/. 50 or more "
        "say something. Default: none are drawn.",
        resume=Resume.FREE,
        type=int,
        **at_least(1),
    )
    monitor_descriptor: str = setting(
        "auto",
        "By which images are compared, as --descriptor of `ietagc score`: sscd_disc_mixup, sscd_disc_large, "
        "sscd-mixup-int8, a TorchScript or ONNX file, pixel, or auto (an SSCD that is on this machine, otherwise "
        "pixel).",
        resume=Resume.FREE,
    )
    monitor_copy_similarity: float | None = setting(
        None,
        "A drawn image that is more similar to a training image is a copy. Default: 0.5 (SSCD), 0.9 (pixel), none for "
        "other files.",
        resume=Resume.FREE,
        type=float,
        check=lambda similarity: -1 <= similarity <= 1,
        wanted="from -1 to 1",
    )
    monitor_inference_steps: int | None = setting(
        None,
        "Denoising steps of these images. Default: those of validation images (20; of models without prompts "
        "--ddpm_num_inference_steps).",
        resume=Resume.FREE,
        type=int,
        check=lambda steps: 1 <= steps <= 1000,
        wanted="from 1 to 1000",
    )
    monitor_budget: float | None = setting(
        None,
        "Leave out measurements that would take more than this share of the time since the start, but for the last. "
        "Default: none is left out.",
        resume=Resume.FREE,
        type=float,
        check=lambda share: 0 < share <= 1,
        wanted="over 0, and at most 1",
    )
    stop_at_gap: float | None = setting(
        None,
        "End the training at the first measurement whose gap is over this.",
        resume=Resume.FREE,
        type=float,
        check=lambda gap: 0 <= gap < math.inf,
        wanted="0 or more, and finite",
    )
    stop_at_copy_rate: float | None = setting(
        None,
        "End the training at the first measurement whose copy rate is higher than the base model's by more than this, "
        "a share such as 0.02. Needs --monitor_descriptor by name.",
        resume=Resume.FREE,
        type=float,
        check=lambda rate: 0 <= rate < 1,
        wanted="in [0, 1)",
    )
    keep_best: str | None = setting(
        None,
        "Save in the end, instead of the last model, the measured one with the lowest held-out loss ('heldout'), the "
        "last whose gap is not over --stop_at_gap ('gap'), or of those whose copy rate is not over --stop_at_copy_rate "
        "the one with the lowest held-out loss, without held-out images the last ('copies').",
        resume=Resume.FREE,
        choices=["heldout", "gap", "copies"],
    )

    @property
    def is_monitored(self) -> bool:
        return self.monitor_every is not None or self.monitor_steps is not None

    def _check_monitor(self, holds_out: bool) -> None:
        if self.monitor_every is not None and self.monitor_steps is not None:
            raise UsageError("`monitor_every` and `monitor_steps` were both given: give one of them")
        if not self.is_monitored:
            for name in ("monitor_images", "monitor_budget", "stop_at_gap", "stop_at_copy_rate", "keep_best"):
                if getattr(self, name) is not None:
                    raise UsageError(
                        f"`{name}`: belongs to `monitor_every` or `monitor_steps`; give one of them, or leave it out"
                    )
        elif not holds_out and self.monitor_images is None:
            name = "monitor_every" if self.monitor_steps is None else "monitor_steps"
            raise UsageError(
                f"`{name}` {getattr(self, name)}: compares with images that are not trained on; give their "
                "folder as `heldout_dir`, or a `heldout_share`, or have images drawn: `monitor_images`"
            )
        if self.monitor_images is None:
            drawing = {"monitor_copy_similarity": None, "monitor_inference_steps": None, "stop_at_copy_rate": None}
            for name, usual in {"monitor_descriptor": "auto", **drawing}.items():
                if getattr(self, name) != usual:
                    raise UsageError(f"`{name}`: belongs to `monitor_images`; give that too, or leave it out")
        if not holds_out:
            by_loss = {"stop_at_gap": self.stop_at_gap is not None, "keep_best": self.keep_best in ("heldout", "gap")}
            for name in (name for name, needed in by_loss.items() if needed):
                raise UsageError(
                    f"`{name}` {getattr(self, name)}: needs images that are not trained on; give their folder as "
                    "`heldout_dir`, or a `heldout_share`"
                )
        for rule, limit, what in (("gap", "stop_at_gap", "gap"), ("copies", "stop_at_copy_rate", "copy rate")):
            if self.keep_best == rule and getattr(self, limit) is None:
                raise UsageError(f"`keep_best` {rule}: keeps a model whose {what} is not over `{limit}`; give that too")
        if self.stop_at_copy_rate is not None and self.monitor_descriptor == "auto":
            raise UsageError(
                "`stop_at_copy_rate`: a limit must mean the same on every machine; give `monitor_descriptor` by name, "
                "such as sscd_disc_mixup or pixel"
            )
