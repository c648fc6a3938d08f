"""Trainings and other commands of a study, several at a time, with a bar."""

import time
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor, wait
from pathlib import Path
from typing import Any

from tqdm.auto import tqdm

from ietagc_diffusers import __version__
from ietagc_diffusers.files import write_json
from ietagc_diffusers.run_folder import RunFolder

from .processes import Processes, Stopped

TRAIN = ("-m", "ietagc_diffusers", "train")  # words of a command, after the launcher's
Work = Callable[[tqdm, Processes], None]


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


def train(command: Sequence[Any], folder: Path, processes: Processes) -> str | None:
    """Train into ``folder``, unless it is finished. Returns why it failed, or None. Raises ``Stopped``."""
    run = RunFolder(folder)
    if run.is_finished:
        return None
    folder.mkdir(parents=True, exist_ok=True)
    started = time.perf_counter()
    why = processes.call(command, folder / "train.log")
    if why is None and not run.is_finished:
        raise Stopped  # after a signal training writes a checkpoint and exits with 0
    if why is not None:
        return f"training: {why}"
    seconds = round(time.perf_counter() - started, 1)
    write_json(folder / "seconds.json", {"version": __version__, "train": seconds})
    return None
