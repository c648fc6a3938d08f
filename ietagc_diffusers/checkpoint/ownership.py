"""Which run a folder and its checkpoints belong to: that of the same content, whatever their names.

A run is told from others by its fingerprint: the settings that shape it, and what stands for its data and its base.
``ietagc/run.json`` lists the fingerprints that the folder's run has had: one more for each resumption with another.
"""

import json
import os
from pathlib import Path
from typing import Any

from ..files import write_text
from ..run_folder import RunFolder

Fingerprint = dict[str, Any]


def about(checkpoint: Path) -> dict[str, Any]:
    """What a checkpoint says of itself; {} if it says nothing."""
    try:
        return json.loads((checkpoint / "ietagc" / "checkpoint.json").read_text())
    except (OSError, ValueError):
        return {}


def fingerprints(run: RunFolder) -> list[Fingerprint]:
    """Those that the folder's run has had, the last one last; [] if it is not known."""
    try:
        return json.loads(run.identity_file.read_text())
    except (OSError, ValueError):
        return []


def owns(run: RunFolder, checkpoint: Path) -> bool:
    """Whether a checkpoint is of the folder's run."""
    return about(checkpoint).get("fingerprint") in fingerprints(run)


def continues(run: RunFolder, earlier: Fingerprint, now: Fingerprint) -> None:
    """Record that the folder's run is one that had the fingerprint ``earlier`` and has ``now``."""
    known = fingerprints(run)
    _record(run, known + [one for one in (earlier, now) if one not in known])


def _record(run, fingerprints):
    run.records.mkdir(parents=True, exist_ok=True)
    write_text(run.identity_file, json.dumps(fingerprints) + "\n")


def begins(run: RunFolder, fingerprint: Fingerprint) -> Path | None:
    """Record that a new run begins in the folder. What another left there is moved into a folder beside it.

    Returns that folder, or None if there was nothing of another run.
    """
    if fingerprints(run)[-1:] == [fingerprint]:
        foreign = [path for path in run.checkpoints() if about(path).get("fingerprint") != fingerprint]
    else:
        foreign = run.belongings()
    aside = None
    if foreign:
        aside = next(path for number in range(1, 10**6) if not (path := run.earlier(number)).exists())
        for path in foreign:
            target = aside / path.relative_to(run.path)
            target.parent.mkdir(parents=True, exist_ok=True)
            os.replace(path, target)
    _record(run, [fingerprint])
    return aside
