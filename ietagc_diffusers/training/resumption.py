"""What a resumed run must share with the run that wrote the checkpoint."""

import hashlib
from pathlib import Path
from typing import Any

from accelerate.logging import get_logger
from datasets import Dataset

from .. import checkpoint
from ..data.conditions import Condition
from ..data.rows import content_hash
from ..errors import UsageError
from ..run_folder import RunFolder
from ..settings import Resume
from .ensemble import IterativeEnsemble
from .settings import TrainingSettings

logger = get_logger(__name__)
FIXED_MARKS = ("data", "num_samples", "sample_order")  # of the fingerprint, beside settings
EDGE = 1 << 16  # bytes at either end of a weight file that stand for its content


def fingerprint(
    settings: TrainingSettings, rows: Dataset, condition: Condition, run: IterativeEnsemble
) -> dict[str, Any]:
    """The settings that shape the run and what stands for its data and base, as a JSON dict."""
    values = settings.values()
    marks = {name: values[name] for name in settings.shaping(Resume.SAME) | settings.shaping(Resume.FIXED)}
    marks["train_batch_size"] *= run.layout.size
    marks["pretrained_model_name_or_path"] = base_mark(settings.pretrained_model_name_or_path)
    marks["data"] = content_hash(rows, settings.image_column, condition)
    marks["num_samples"] = len(rows)
    marks["sample_order"] = next(iter(run.proxies.values())).loader.order
    return marks


def base_mark(base: str) -> str:
    """What stands for a base model, so that it may be moved but not changed: a Hub id as it is; of a folder a hash of
    the names, sizes and both ends of its parts' files.
    """
    folder = Path(base)
    if not folder.is_dir():
        return str(base)
    digest = hashlib.blake2b(digest_size=8)
    for path in sorted(folder.glob("*/*")):
        if path.suffix in (".safetensors", ".bin", ".json", ".txt") and not path.parent.name.startswith("checkpoint-"):
            digest.update(f"{path.relative_to(folder)} {path.stat().st_size}".encode())
            with path.open("rb") as file:
                digest.update(file.read(EDGE))
                file.seek(-min(EDGE, path.stat().st_size), 2)
                digest.update(file.read(EDGE))
    return digest.hexdigest()


def resume(settings: TrainingSettings, run: IterativeEnsemble, marks: dict[str, Any], folder: RunFolder) -> bool:
    """Go to the checkpoint that is wanted, if any. Returns whether there was one.

    A new run sets aside what another left in its folder.
    """
    path = None
    if settings.resume_from_checkpoint:
        path = checkpoint.find(settings.resume_from_checkpoint, folder, marks)
        if path is None:
            logger.warning("No checkpoint yet: starting a new run")
    if path is None:
        _begin(run, marks, folder, settings.pretrained_model_name_or_path)
        return False
    fixed = settings.shaping(Resume.FIXED) | set(FIXED_MARKS)
    for name in settings.resume_allow:
        if name in fixed:
            raise UsageError(f"`resume_allow` {name}: cannot change within a run; start a new one")
        if name not in marks:
            raise UsageError(f"`resume_allow` {name}: not among {', '.join(sorted(marks.keys() - fixed))}")
    found = checkpoint.Checkpoint(path)
    checkpoint.check_fingerprint(found.fingerprint, marks, settings.resume_allow)
    run.resume(found)
    if run.layout.is_main:
        checkpoint.continues(folder, found.fingerprint, marks)
    run.layout.barrier()  # none may step, and in time remove this checkpoint, while another still reads it
    logger.info(f"Resuming from {path} at step {run.global_step}")
    return True


def _begin(run, marks, folder, base):
    """A new run in this folder."""
    own, base = [path.resolve() for path in [folder.path, *folder.belongings()]], Path(base)
    if base.is_dir() and (base.resolve() == own[0] or set(own[1:]) & {base.resolve(), *base.resolve().parents}):
        raise UsageError(f"`output_dir` {folder.path}: holds the base model, which it would overwrite; give another")
    if run.layout.is_main:
        aside = checkpoint.begins(folder, marks)
        if aside is not None:
            logger.warning(f"{folder.path} held another run: its checkpoints, records and pipeline are now in {aside}")
    run.layout.barrier()
