"""Trainings and other commands of a study, several at a time, with a bar."""

import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor, wait
from pathlib import Path
from typing import Any

import yaml
from tqdm.auto import tqdm

from ietagc_diffusers import __version__
from ietagc_diffusers.files import write_json, write_text
from ietagc_diffusers.run_folder import RunFolder

from .configuration import short_hash
from .processes import Processes, Stopped

TRAIN = ("-m", "ietagc_diffusers", "train")  # words of a command, after the launcher's
SETTINGS = "settings.yaml"  # in the folder of a run: the values that it is trained with
Work = Callable[[tqdm, Processes], None]


def run_folder(
    place: Callable[[str], Path], values: Mapping[str, Any], defaults: Mapping[str, Any], *marks: Any
) -> Path:
    """The folder of a run of a study, so named that no run with other values is taken for it.

    Values that are defaults do not enter the name: settings that a later version adds leave it as it is. Where a
    default has changed since the run in this folder was trained, the folder is another one, named by all values. So
    that this can be told, a folder that is found is told the values that it does not know yet.

    Args:
        place: the folder that belongs to a hash.
        values: effective settings by flag, JSON-ready.
        defaults: of the flags.
        marks: what else the run depends on.
    """
    own = {key: value for key, value in values.items() if key not in defaults or value != defaults[key]}
    folder = place(short_hash([*marks, own]))
    trained_with = yaml.safe_load((folder / SETTINGS).read_text()) if (folder / SETTINGS).exists() else {}
    if any(trained_with.get(key, value) != value for key, value in values.items()):
        return place(short_hash([*marks, values]))
    if trained_with and values.keys() - trained_with.keys():  # it had the defaults that these have now
        write_text(folder / SETTINGS, yaml.safe_dump({**values, **trained_with}))
    return folder


def run_jobs(works: Iterable[Work], jobs: int, total: int, desc: str) -> None:
    """Do all works, ``jobs`` of them at once. An interruption ends their processes and starts no more.

    Args:
        works: functions of the bar, which they update, and of the processes. What they raise, other than ``Stopped``,
            is raised here when all have ended.
        total, desc: of the bar.
    """
    processes = Processes()
    with (
        tqdm(total=total, desc=desc) as bar,
        ThreadPoolExecutor(max_workers=jobs) as pool,
        processes.ended_by_signals(),
    ):
        running = [pool.submit(work, bar, processes) for work in works]
        while wait(running, timeout=1).not_done:
            bar.refresh()  # its clock
        for job in running:
            error = job.exception()
            if error is not None and not isinstance(error, Stopped):
                raise error


def train(command: Sequence[Any], values: Mapping[str, Any], folder: Path, processes: Processes) -> str | None:
    """Train into ``folder``, unless it is finished. Returns why it failed, or None. Raises ``Stopped``.

    ``values``: as ``run_folder`` takes them.
    """
    run = RunFolder(folder)
    if run.is_finished:
        return None
    folder.mkdir(parents=True, exist_ok=True)
    write_text(folder / SETTINGS, yaml.safe_dump(dict(values)))
    started = time.perf_counter()
    why = processes.call(command, folder / "train.log")
    if why is None and not run.is_finished:
        raise Stopped  # after a signal training writes a checkpoint and exits with 0
    if why is not None:
        return f"training: {why}"
    seconds = round(time.perf_counter() - started, 1)
    write_json(folder / "seconds.json", {"version": __version__, "train": seconds})
    return None
