"""Exact save and resume. A checkpoint is everything that the future of a run depends on, in safetensors and JSON.

Layout of ``checkpoint-<global_step>/``: ``unet/`` and ``unet_ema/`` (theta_hat, loadable by diffusers) and
``ietagc/``: ``state.json``, ``plan.safetensors``, for each shard ``proxy-<k>.safetensors`` and ``.json``,
``average-<rank>.safetensors`` (the running round's sums), and ``manifest.json`` (sizes and CRCs of all files). It is
written under a temporary name and renamed.
"""

import json
import os
import re
import shutil
import zlib
from pathlib import Path

import numpy as np
import torch
from accelerate.logging import get_logger
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from .errors import UsageError
from .method.sharding import ShardPlan

logger = get_logger(__name__)

FORMAT = 1
COUNTS = ("round_totals", "round_skips", "total_skips", "total_visits")
WEIGHTS_FILE = "diffusion_pytorch_model.safetensors"
_NAME = re.compile(r"checkpoint-(\d+)")


class CheckpointError(UsageError):
    """A checkpoint that cannot be used; the message says why."""


def flatten(state, tensors, prefix=""):
    """Move the tensors of a nested dict into ``tensors``; returns the rest, JSON-ready, with ``{"tensor": name}`` in
    their places.
    """
    if torch.is_tensor(state):
        tensors[prefix] = state.detach().cpu().contiguous()
        return {"tensor": prefix}
    if isinstance(state, dict):
        # JSON keys are strings: keep integer keys apart.
        return {"dict": [[key, flatten(value, tensors, f"{prefix}/{key}")] for key, value in state.items()]}
    if isinstance(state, (list, tuple)):
        return {"list": [flatten(value, tensors, f"{prefix}/{i}") for i, value in enumerate(state)]}
    if isinstance(state, np.generic):
        state = state.item()
    return {"value": state}


def unflatten(state, tensors):
    if "tensor" in state:
        return tensors[state["tensor"]]
    if "dict" in state:
        return {key: unflatten(value, tensors) for key, value in state["dict"]}
    if "list" in state:
        return [unflatten(value, tensors) for value in state["list"]]
    return state["value"]


def _save_state(path, state):
    tensors = {}
    rest = flatten(state, tensors)
    # Shared storage is not allowed in safetensors.
    save_file({name: tensor.clone() for name, tensor in tensors.items()}, path.with_suffix(".safetensors"))
    path.with_suffix(".json").write_text(json.dumps(rest))


def _load_state(path):
    return unflatten(json.loads(path.with_suffix(".json").read_text()), load_file(path.with_suffix(".safetensors")))


def save_unet(folder, unet, weights, ema=None):
    """Write weights by name as a diffusers model folder; with ``ema``, its numbers go into the config as ``EMAModel``
    reads them.
    """
    folder.mkdir(parents=True, exist_ok=True)
    config = json.loads(unet.to_json_string())
    if ema is not None:
        config |= {key: value for key, value in ema.state_dict().items() if key != "shadow_params"}
    (folder / "config.json").write_text(json.dumps(config, indent=2, sort_keys=True) + "\n")
    tensors = {name: tensor.detach().cpu().contiguous() for name, tensor in weights.items()}
    save_file(tensors, folder / WEIGHTS_FILE, metadata={"format": "pt"})


def save(ensemble, output_dir, fingerprint, total_limit=None):
    """Write ``checkpoint-<global_step>``; called by all processes at the same step. Returns its path.

    ``fingerprint``: a JSON dict of what a resumed run must share. Older checkpoints over ``total_limit`` are removed
    once the new one is complete. Raises ``OSError``, leaving earlier checkpoints as they were, if the disk refuses.
    """
    final = Path(output_dir) / f"checkpoint-{ensemble.global_step}"
    folder = final.with_name(final.name + ".tmp")
    layout = ensemble.layout

    def prepare():
        if layout.is_main:
            shutil.rmtree(folder, ignore_errors=True)
            (folder / "ietagc").mkdir(parents=True)

    def publish():
        if layout.is_main:
            _write_manifest(folder)
            replaced = final.with_name(final.name + ".old")
            shutil.rmtree(replaced, ignore_errors=True)
            if final.exists():
                os.replace(final, replaced)
            os.replace(folder, final)
            shutil.rmtree(replaced, ignore_errors=True)
            if total_limit is not None:
                for old in complete(output_dir)[:-total_limit]:
                    shutil.rmtree(old)

    try:
        for action in (prepare, lambda: _write(ensemble, folder, fingerprint), publish):
            _together(layout, action)
    except OSError:
        if layout.is_main:
            shutil.rmtree(folder, ignore_errors=True)
        raise
    return final


def _together(layout, action):
    """Run ``action`` on all processes; if the disk refuses one of them, all raise ``OSError``."""
    error = None
    try:
        action()
    except (OSError, SafetensorError) as refused:
        error = refused
    if layout.total(torch.tensor([float(error is not None)])).item():
        raise OSError(str(error) if error else "another process could not write its part")


def _write(ensemble, folder, fingerprint):
    layout, inside = ensemble.layout, folder / "ietagc"
    quota = ensemble.rounds.steps_in(ensemble.round) if not ensemble.finished else 0
    if layout.is_main:
        for key, weights in ensemble.deployable().items():
            save_unet(folder / key, ensemble.unet, weights, ensemble.ema if key == "unet_ema" else None)
        plan = {f"shard-{k}": torch.from_numpy(samples) for k, samples in enumerate(ensemble.plan.shards)}
        if ensemble.plan.groups is not None:
            plan["groups"] = torch.from_numpy(ensemble.plan.groups)
        save_file(plan, inside / "plan.safetensors")
        state = {
            "format": FORMAT,
            "fingerprint": fingerprint,
            "round": ensemble.round,
            "progress": ensemble.progress,
            "rows": ensemble.rows,
            "seconds": ensemble.seconds,
            "scaler": ensemble.scaler.state_dict() if ensemble.scaler else None,
        }
        (inside / "state.json").write_text(json.dumps(state))
    # Each process of a group counts its own rows; the leader writes what they counted together.
    counts = {shard: {n: layout.sum(getattr(p, n)) for n in COUNTS} for shard, p in ensemble.proxies.items()}
    if not layout.leads:
        return
    for shard, proxy in ensemble.proxies.items():
        weights = proxy.weights
        if proxy is ensemble.active and not ensemble.single:
            weights = ensemble.live()
        _save_state(
            inside / f"proxy-{shard}",
            {
                "steps": proxy.steps,
                "loader": proxy.loader.state_dict(),
                "control": proxy.control.state_dict(),
                "optimizer": proxy.optimizer.state_dict(),
                "schedule": proxy.schedule.state_dict(),
                "streams": ensemble.streams.get() if proxy is ensemble.active else proxy.streams_state,
                "counts": counts[shard],
                "weights": weights,
            },
        )
    if any(ensemble.progress[shard] == quota for shard in layout.shards) and quota:
        sums = {
            f"{key}/{name}": total for key, average in ensemble.averages.items() for name, total in average.sums.items()
        }
        counts = {f"{key}/": torch.tensor(average.count) for key, average in ensemble.averages.items()}
        if sums:
            save_file(sums | counts, inside / f"average-{layout.process_index}.safetensors")


def _crc(path):
    crc = 0
    with path.open("rb") as file:
        while block := file.read(1 << 22):
            crc = zlib.crc32(block, crc)
    return crc


def _write_manifest(folder):
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    manifest = {str(path.relative_to(folder)): [path.stat().st_size, _crc(path)] for path in files}
    (folder / "ietagc" / "manifest.json").write_text(json.dumps(manifest))


def damage(folder):
    """Why a checkpoint cannot be used, or None."""
    try:
        manifest = json.loads((folder / "ietagc" / "manifest.json").read_text())
    except (OSError, ValueError):
        return "its manifest is missing or unreadable"
    for name, (size, crc) in manifest.items():
        path = folder / name
        if not path.is_file():
            return f"{name} is missing"
        if path.stat().st_size != size or _crc(path) != crc:
            return f"{name} is damaged"
    return None


def complete(output_dir):
    """Paths of the checkpoints in ``output_dir``, by step. Names alone are looked at: renaming made them complete."""
    found = [(int(m[1]), path) for path in Path(output_dir).glob("checkpoint-*") if (m := _NAME.fullmatch(path.name))]
    return [path for _, path in sorted(found)]


def find(wanted, output_dir):
    """The checkpoint that ``--resume_from_checkpoint`` means: ``latest``, a name in ``output_dir``, or a path.

    ``latest`` passes over damaged ones with a warning and is None where there is none. Raises ``CheckpointError`` for
    a named one that is missing or damaged.
    """
    if wanted == "latest":
        for folder in reversed(complete(output_dir)):
            why = damage(folder)
            if why is None:
                return folder
            logger.warning(f"{folder.name} is passed over: {why}")
        return None
    folder = Path(wanted)
    if not folder.is_dir():
        folder = Path(output_dir) / folder.name
    if not folder.is_dir():
        known = ", ".join(path.name for path in complete(output_dir)) or "none"
        raise CheckpointError(f"--resume_from_checkpoint {wanted}: not found; checkpoints in {output_dir}: {known}")
    why = damage(folder)
    if why is not None:
        raise CheckpointError(f"--resume_from_checkpoint {wanted}: {why}; 'latest' takes the newest undamaged one")
    return folder


def check_fingerprint(saved, current, allowed=()):
    """Raise ``CheckpointError`` naming what differs; keys in ``allowed`` may."""
    differences = [
        f"{key} was {saved.get(key)!r}, is {current.get(key)!r}"
        for key in sorted(saved.keys() | current.keys())
        if saved.get(key) != current.get(key) and key not in allowed
    ]
    if differences:
        raise CheckpointError(
            "the checkpoint is of another run: "
            + "; ".join(differences)
            + ". Give the same flags, or name those that may change in --resume_allow"
        )


def load(ensemble, folder, fingerprint, allowed=()):
    """Put a freshly built run where the checkpoint was, whatever the number of processes that wrote it."""
    inside, layout = Path(folder) / "ietagc", ensemble.layout
    state = json.loads((inside / "state.json").read_text())
    if state["format"] != FORMAT:
        raise CheckpointError(f"{folder}: written in format {state['format']}, this version reads format {FORMAT}")
    check_fingerprint(state["fingerprint"], fingerprint, allowed)
    ensemble.round, ensemble.progress = state["round"], state["progress"]
    ensemble.rows, ensemble.seconds = state["rows"], state["seconds"]
    if ensemble.scaler and state["scaler"]:
        ensemble.scaler.load_state_dict(state["scaler"])
    plan = {name: tensor.numpy() for name, tensor in load_file(inside / "plan.safetensors").items()}
    ensemble.plan = ShardPlan(tuple(plan[f"shard-{k}"] for k in range(layout.num_shards)), plan.get("groups"))
    aggregate = {key: load_file(Path(folder) / key / WEIGHTS_FILE) for key in ensemble.live()}
    ensemble.put(aggregate)
    if not ensemble.single:
        ensemble.aggregates = aggregate
    if layout.is_main:
        for path in sorted(inside.glob("average-*.safetensors")):
            sums = load_file(path)
            for key, average in ensemble.averages.items():
                average.count += int(sums[f"{key}/"])
                for name, total in average.sums.items():
                    total += sums[f"{key}/{name}"]
    for shard, proxy in ensemble.proxies.items():
        _restore(proxy, _load_state(inside / f"proxy-{shard}"), ensemble.plan.shards[shard], layout.leads)


def _restore(proxy, saved, shard_samples, leads):
    proxy.steps = saved["steps"]
    proxy.loader.set_samples(shard_samples)
    proxy.loader.load_state_dict(saved["loader"])
    proxy.control.load_state_dict(saved["control"])
    proxy.optimizer.load_state_dict(saved["optimizer"])
    proxy.schedule.load_state_dict(saved["schedule"])
    proxy.streams_state = saved["streams"]
    for name in COUNTS:
        if leads:
            getattr(proxy, name).copy_(saved["counts"][name])
    proxy.weights = saved["weights"]
    proxy.to_host()
