"""A run folder belongs to one training at a time, and to none that has ended, however it ended."""

import errno
import logging
import os
import re
import signal
import subprocess
import sys
import time
from types import SimpleNamespace

import pytest
from conftest import environment, train_flags, train_here

from ietagc_diffusers import RunFolder, UsageError
from ietagc_diffusers.hub import contents
from ietagc_diffusers.training import lock
from ietagc_diffusers.training.lock import locked
from ietagc_diffusers.training.run import _entered


def test_a_training_does_not_enter_a_folder_that_is_in_use(base, pictures, tmp_path):
    run, flags = RunFolder(tmp_path / "out"), train_flags(base, pictures, "--mitigation=none", "--max_train_steps=2")
    with locked(run):
        told = f"`output_dir` {re.escape(str(run.path))}: is in use by process {os.getpid()} on .+ since 20"
        for more in ([], ["--resume_from_checkpoint=latest"]):
            with pytest.raises(UsageError, match=told):
                train_here(flags + more, run.path)
        assert not run.belongings()
        with _entered(run, SimpleNamespace(is_main_process=False, num_processes=1)):
            pass  # the other processes of the run leave the lock to the main one
    train_here(flags, run.path)
    assert run.is_finished
    # Another run moves aside what this one left, but not the lock that it holds itself.
    assert run.lock_file.exists() and run.lock_file not in run.belongings()
    train_here([*flags, "--seed=6"], run.path)
    assert run.lock_file.exists() and not (run.earlier(1) / "ietagc" / "lock").exists()
    assert "ietagc/lock" not in contents(run)


HOLDER = """
import os, sys, time
from ietagc_diffusers import RunFolder
from ietagc_diffusers.training.lock import locked
with locked(RunFolder(sys.argv[1])):
    worker = os.fork()
    if worker:
        print(worker, flush=True)
    time.sleep(60)
"""


def test_the_lock_ends_with_its_process_though_data_workers_live_on(tmp_path):
    command = [sys.executable, "-c", HOLDER, str(tmp_path)]
    holder = subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=environment())
    worker = int(holder.stdout.readline())
    try:
        with pytest.raises(UsageError, match=f"in use by process {holder.pid} "), locked(RunFolder(tmp_path)):
            pass
        time.sleep(0.2)
        holder.kill()
        holder.wait()
        os.kill(worker, 0)  # it lives
        with locked(RunFolder(tmp_path)):
            pass
    finally:
        holder.kill()
        os.kill(worker, signal.SIGKILL)


def test_where_nothing_can_be_locked_a_warning_says_so(tmp_path, monkeypatch, caplog):
    def unsupported(*_):
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr(lock.fcntl, "flock", unsupported)
    with caplog.at_level(logging.WARNING), locked(RunFolder(tmp_path)):
        pass
    assert "cannot be locked (No locks available): make sure that no other training writes into it" in caplog.text


def test_a_folder_that_cannot_be_made_is_named(tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(UsageError, match="`output_dir` "), locked(RunFolder(tmp_path / "file")):
        pass
