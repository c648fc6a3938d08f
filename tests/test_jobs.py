"""The folders of a study's runs."""

from ietagc_diffusers.eval.jobs import run_folder, train


def test_a_run_keeps_its_folder_when_settings_are_added_and_loses_it_when_a_default_changes(tmp_path):
    def folder(values, defaults, *marks):
        return run_folder(lambda mark: tmp_path / mark, values, defaults, *marks)

    values, defaults = {"rate": 0.1, "steps": 7}, {"rate": 0.1, "steps": 5}
    first = folder(values, defaults, "base")
    added = {"new": None}
    assert folder(values | added, defaults | added, "base") == first
    different = [(values | {"new": 1}, defaults | added, "base"), (values | {"steps": 8}, defaults, "base")]
    assert first not in [folder(*other) for other in [*different, (values, defaults, "another")]]
    # Trained when the default was 0.1, which the name does not say.
    train(["true"], values, first, type("Done", (), {"call": lambda self, command, log: "exit 1"})())
    later = {"rate": 0.2, "steps": 5}
    assert folder(values, defaults, "base") == first and folder(values | added, defaults | added, "base") == first
    assert folder({"rate": 0.2, "steps": 7}, later, "base") != first
    # The setting that was added gets another default in a third version.
    assert folder(values | {"new": 1}, defaults | {"new": 1}, "base") != first
    assert folder({"rate": 0.1, "steps": 7}, later, "base") != first  # named by its rate now
