"""No training outlives the benchmark that started it, whatever their launchers do."""

import os
import signal
import sys
import threading
import time

import psutil
import pytest

from ietagc_diffusers.eval import processes

LAUNCHER = """
import signal, subprocess, sys
started = subprocess.Popen([sys.executable, "-c", sys.argv[1], sys.argv[2]], start_new_session=sys.argv[3] == "own")
if sys.argv[4] == "ignores":
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
open(sys.argv[2] + ".launched", "w").close()
started.wait()
"""
TRAINING = """
import os, pathlib, signal, sys, time
def stop(*_):
    time.sleep(0.3)
    pathlib.Path(sys.argv[1] + ".saved").touch()
    os._exit(0)
signal.signal(signal.SIGTERM, signal.SIG_IGN if "deaf" in sys.argv[1] else stop)
pathlib.Path(sys.argv[1]).write_text(str(os.getpid()))
time.sleep(60)
"""


@pytest.fixture
def heard():
    """Signals as a terminal sends them: one that runs in the background was told to ignore some of them."""
    kinds = {signal.SIGINT: signal.default_int_handler, signal.SIGTERM: signal.SIG_DFL, signal.SIGHUP: signal.SIG_DFL}
    before = {number: signal.signal(number, handler) for number, handler in kinds.items()}
    yield
    for number, handler in before.items():
        signal.signal(number, handler)


def lives(pid):
    try:
        return psutil.Process(pid).status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False


@pytest.mark.parametrize(
    ("training", "launcher", "session", "number"),
    [
        ("saves", "dies", "shared", signal.SIGTERM),
        ("saves", "dies", "own", signal.SIGHUP),
        ("saves", "ignores", "shared", signal.SIGINT),
        ("deaf", "ignores", "own", signal.SIGTERM),
    ],
)
def test_no_training_survives_its_benchmark(tmp_path, monkeypatch, heard, training, launcher, number, session):
    """Whatever the launcher does with signals: the training saves its checkpoint, or is killed after the grace."""
    place = tmp_path / training
    command = [sys.executable, "-c", LAUNCHER, TRAINING, place, session, launcher]
    monkeypatch.setattr(processes, "GRACE", 1.0 if training == "deaf" else 30.0)
    running = processes.Processes()

    def interrupt():
        deadline = time.monotonic() + 30
        while time.monotonic() < deadline and not (place.exists() and place.with_suffix(".launched").exists()):
            time.sleep(0.02)
        os.kill(os.getpid(), number)

    def call():
        with pytest.raises(processes.Stopped):
            running.call(command, tmp_path / "log")
        ended.append(True)

    ended, threads = [], [threading.Thread(target=work) for work in (call, interrupt)]
    with pytest.raises(KeyboardInterrupt), running.ended_by_signals():
        for thread in threads:
            thread.start()
        time.sleep(60)
    assert not lives(int(place.read_text()))
    assert place.with_suffix(".saved").exists() == (training == "saves")
    for thread in threads:
        thread.join(timeout=10)
    assert ended == [True]


def test_what_a_failed_launcher_started_is_ended(tmp_path):
    launcher = LAUNCHER.replace("started.wait()", "time.sleep(1); sys.exit(3)").replace("import", "import time,", 1)
    place = tmp_path / "saves"
    command = [sys.executable, "-c", launcher, TRAINING, place, "shared", "dies"]
    assert processes.Processes().call(command, tmp_path / "log").startswith("exit 3")
    assert not lives(int(place.read_text())) and place.with_suffix(".saved").exists()
