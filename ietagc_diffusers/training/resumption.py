"""What a resumed run shares with the run that wrote the checkpoint, and what of it may change."""

import hashlib
from dataclasses import replace
from pathlib import Path
from typing import Any

from accelerate.logging import get_logger
from accelerate.utils import broadcast_object_list
from datasets import Dataset
from torch.optim.lr_scheduler import LambdaLR

from ..checkpoint import Checkpoint, CheckpointError, begins, check_fingerprint, continues, find
from ..data.conditions import Condition
from ..data.rows import content_hash
from ..data.settings import PriorSettings
from ..errors import UsageError
from ..run_folder import RunFolder
from ..settings import Resume, declared
from .ensemble import IterativeEnsemble
from .groups import LoraSettings
from .heldout import HeldoutSet
from .prior import PriorSet
from .proxy import Proxy
from .settings import RunSettings

logger = get_logger(__name__)
FIXED_MARKS = (
    "data",
    "num_samples",
    "sample_order",
    "prior_data",
    "heldout_data",
)  # of the fingerprint, beside settings
RESOLVED = "resolved"  # in the fingerprint: what the run made of settings that leave a choice
EDGE = 1 << 16  # bytes at either end of a weight file that stand for its content
OF_OFFICIAL = ("optimizer.bin", "random_states_0.pkl")  # files of a checkpoint of Diffusers' own scripts


def find_checkpoint(settings: RunSettings, folder: RunFolder, is_main: bool = True) -> Checkpoint | None:
    """The checkpoint to resume from, or None for a new run. The main process looks, and all agree.

    Raises ``UsageError`` if the wanted one cannot be used, or only checkpoints of Diffusers' own script are there.
    """
    if not settings.resume_from_checkpoint:
        return None
    answer: list[Any] = [None]
    if is_main:
        try:
            answer = [_find(settings.resume_from_checkpoint, folder)]
        except UsageError as error:
            answer = [error]
    (found,) = broadcast_object_list(answer)
    if isinstance(found, UsageError):
        raise found
    if found is None:
        logger.warning("No checkpoint yet: starting a new run")
        return None
    return Checkpoint(found)


def _find(wanted, folder):
    path = folder.path / Path(wanted).name
    candidates = folder.checkpoints() if wanted == "latest" else [Path(wanted), path]
    official = [c for c in candidates if any((c / name).exists() for name in OF_OFFICIAL)]
    if official:
        raise CheckpointError(
            f"`resume_from_checkpoint` {wanted}: {official[-1]} was written by Diffusers' own script, as pickles that "
            "are not read here. To start from its weights, put its unet folder into a copy of the base model, and give "
            "that as `pretrained_model_name_or_path`, with another `output_dir`"
        )
    found = find(wanted, folder)
    if found is None and folder.is_finished:
        raise CheckpointError(
            f"`resume_from_checkpoint` {wanted}: {folder.path} holds a finished run without a checkpoint to continue "
            "from; give another `output_dir` to train again"
        )
    return found


def take_over(settings: RunSettings, found: Checkpoint | None) -> None:
    """What the first run drew or measured for itself belongs to its state: its seed and the similarity of near
    duplicates, if none is given.
    """
    if found is not None and settings.seed is None:
        settings.seed = found.fingerprint["seed"]
    if found is not None and settings.deduplicate == "near" and settings.deduplicate_similarity is None:
        settings.deduplicate_similarity = found.fingerprint.get("deduplicate_similarity")


def extend(settings: RunSettings, found: Checkpoint | None) -> None:
    """Where a resumed run is given another length, the choices that the first length led to stay as they were."""
    if found is not None:
        settings.method = replace(settings.method, bank_buckets=found.fingerprint[RESOLVED]["bank_buckets"])


def fingerprint(
    settings: RunSettings,
    rows: Dataset,
    condition: Condition,
    run: IterativeEnsemble,
    buckets: int | str,
    prior: PriorSet | None = None,
    heldout: HeldoutSet | None = None,
) -> dict[str, Any]:
    """The settings that shape the run and what stands for its data and base, as a JSON dict.

    ``buckets``: what was given for ``bank_buckets``.
    """
    values = settings.values() | {"bank_buckets": buckets}
    shaping = settings.shaping(Resume.SAME) | settings.shaping(Resume.FIXED) | settings.shaping(Resume.BUDGET)
    if settings.adapters is None:
        shaping -= {entry.name for entry in declared(LoraSettings)}
    if settings.prior_dir is None:
        shaping -= {entry.name for entry in declared(PriorSettings)}
    marks = {name: values[name] for name in shaping}
    marks["train_batch_size"] *= run.layout.size
    marks["pretrained_model_name_or_path"] = base_mark(settings.pretrained_model_name_or_path)
    marks["data"] = content_hash(rows, settings.image_column, condition)
    marks["num_samples"] = len(rows)
    proxy = next(iter(run.proxies.values()))
    marks["sample_order"] = proxy.loader.order
    if prior is not None:
        marks["prior_data"] = prior.mark
    if heldout is not None:
        marks["heldout_data"] = heldout.mark
    visits = run.rounds.steps_per_proxy * settings.train_batch_size * run.layout.size * proxy.accumulation
    marks[RESOLVED] = {
        "steps_per_round": run.rounds.steps_per_round,
        "bank_buckets": settings.method.resolve_bank_buckets(visits, run.objective.num_levels),
    }
    return marks


def base_mark(base: str | None) -> str | None:
    """What stands for a base model, so that it may be moved but not changed: a Hub id as it is; of a folder a hash of
    the names, sizes and both ends of its parts' files. None where there is no base.
    """
    if base is None:
        return None
    folder = Path(base)
    if not folder.is_dir():
        return str(base)
    digest = hashlib.blake2b(digest_size=8)
    for path in sorted(folder.glob("*/*")):
        if path.suffix in (".safetensors", ".bin", ".json", ".txt") and not path.parent.name.startswith("checkpoint-"):
            size = path.stat().st_size
            digest.update(f"{path.relative_to(folder)} {size}".encode())
            with path.open("rb") as file:
                digest.update(file.read(EDGE))
                file.seek(-min(EDGE, size), 2)
                digest.update(file.read(EDGE))
    return digest.hexdigest()


def resume(
    settings: RunSettings,
    run: IterativeEnsemble,
    found: Checkpoint | None,
    marks: dict[str, Any],
    folder: RunFolder,
) -> None:
    """Put a freshly built run where the checkpoint was, with the settings of now where they may differ.

    A new run sets aside what another left in its folder.
    """
    if found is None:
        _begin(run, marks, folder, settings.pretrained_model_name_or_path)
        return
    budget = settings.shaping(Resume.BUDGET)
    fixed = settings.shaping(Resume.FIXED) | set(FIXED_MARKS)
    for name in settings.resume_allow:
        if name in fixed:
            raise UsageError(f"`resume_allow` {name}: cannot change within a run; start a new one")
        if name not in marks or name == RESOLVED:
            known = ", ".join(sorted(marks.keys() - fixed - {RESOLVED}))
            raise UsageError(f"`resume_allow` {name}: not among {known}")
    saved = _with_newer_settings(found.fingerprint, marks, type(settings))
    check_fingerprint(saved, marks, {*settings.resume_allow, *budget, RESOLVED}, fixed)
    _continue_rounds(run, found)
    fresh = {shard: _hyperparameters(proxy) for shard, proxy in run.proxies.items()}
    run.resume(found)
    for shard, proxy in run.proxies.items():
        _apply(proxy, *fresh[shard])
    marks[RESOLVED] = marks[RESOLVED] | {"steps_per_round": run.rounds.steps_per_round}
    if run.layout.is_main:
        continues(folder, found.fingerprint, marks)
    run.layout.barrier()  # none may step, and in time remove this checkpoint, while another still reads it
    logger.info(f"Resuming from {found.folder} at step {run.global_step}")


def _with_newer_settings(saved, marks, kind):
    """A fingerprint with the settings that were not there yet when it was written: the run had their defaults.

    Those of adapters are only in fingerprints of runs that train some.
    """
    left_out = {entry.name for entry in declared(LoraSettings)} if saved.get("lora_rank") is None else set()
    return {name: value for name, value in kind.defaults().items() if name in marks.keys() - left_out} | saved


def _continue_rounds(run, found):
    """Rounds keep their length, also where the run is given more steps than it had."""
    state, rounds = found.state("run"), run.rounds
    taken = state["rows"][-1]["global_step"] // rounds.num_shards if state["rows"] else 0
    done = taken + max(state["progress"])
    if done > rounds.steps_per_proxy:
        raise UsageError(
            f"`max_train_steps`: {rounds.total_steps} steps are fewer than the {done * rounds.num_shards} that the run "
            "has taken; give as many or more"
        )
    run.rounds = rounds.continued(found.fingerprint[RESOLVED]["steps_per_round"], state["round"], taken)


def _hyperparameters(proxy: Proxy):
    """Those of a freshly built proxy: of its optimizer by group, and its schedule's base rates."""
    groups = [{k: v for k, v in group.items() if k not in ("params", "lr")} for group in proxy.optimizer.param_groups]
    return groups, getattr(proxy.schedule, "base_lrs", None)


def _apply(proxy, groups, base_rates):
    """Overwrite what the checkpoint says of them; the moments and the place in the schedule stay."""
    for group, of_now in zip(proxy.optimizer.param_groups, groups, strict=True):
        group.update(of_now)
    if isinstance(proxy.schedule, LambdaLR):
        proxy.schedule.base_lrs = list(base_rates)
        rates = [
            base * rate(proxy.schedule.last_epoch)
            for base, rate in zip(base_rates, proxy.schedule.lr_lambdas, strict=True)
        ]
        for group, rate in zip(proxy.optimizer.param_groups, rates, strict=True):
            group["lr"] = rate
        proxy.schedule._last_lr = rates


def _begin(run, marks, folder, base):
    """A new run in this folder."""
    own = [path.resolve() for path in [folder.path, *folder.belongings()]]
    base = None if base is None else Path(base).resolve()
    if base is not None and base.is_dir() and (base == own[0] or set(own[1:]) & {base, *base.parents}):
        raise UsageError(f"`output_dir` {folder.path}: holds the base model, which it would overwrite; give another")
    if run.layout.is_main:
        aside = begins(folder, marks)
        if aside is not None:
            logger.warning(f"{folder.path} held another run: its checkpoints, records and pipeline are now in {aside}")
    run.layout.barrier()
