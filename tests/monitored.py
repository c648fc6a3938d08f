"""What the tests of monitored runs share."""

import json

from ietagc_diffusers.run_folder import RunFolder
from ietagc_diffusers.training.monitor import Meter


def rows_of(folder):
    """The measurements of a run."""
    return [json.loads(line) for line in RunFolder(folder).monitor_file.read_text().splitlines()]


def measured(*heldout_and_gap, low=-1.0):
    """Measurements, of which only this matters."""
    return [
        {"round": i, "global_step": 10 * i, "heldout_loss": loss, "gap": gap, "gap_ci95": [gap + low, gap + 1]}
        for i, (loss, gap) in enumerate(heldout_and_gap)
    ]


def script(monkeypatch, *heldout_and_gap):
    """Let the measurements say this, one by one."""
    told = ("heldout_loss", "gap", "gap_ci95")
    said = iter([{key: row[key] for key in told} for row in measured(*heldout_and_gap)])
    monkeypatch.setattr(
        Meter, "measurement", lambda meter, losses, base: next(said) | {"train_loss": 0.5, "levels": []}
    )
