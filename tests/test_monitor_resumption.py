"""A run that is resumed is judged as if it had never stopped: by the same base, and with the best model it had."""

import json

import pytest
import torch
from conftest import train_flags, train_here, unet_bytes
from monitored import rows_of, script

from ietagc_diffusers import testing
from ietagc_diffusers.run_folder import RunFolder
from ietagc_diffusers.training.fixed_losses import FixedLosses
from ietagc_diffusers.training.proxy import Proxy
from ietagc_diffusers.training.scripts import UnconditionalScript

RUN = ["--mitigation=iet", "--num_shards=2", "--report_to=none", "--max_train_steps=16", "--steps_per_round=2"]
RUN += ["--monitor_every=1", "--learning_rate=1e-2", "--save_rounds"]
pytestmark = pytest.mark.usefixtures("no_page")


@pytest.fixture(scope="module")
def flags(base, pictures, heldout):
    return train_flags(base, pictures, *RUN, f"--heldout_dir={heldout}")


def test_the_base_of_a_model_without_prompts_is_loaded_again(pictures, heldout, tmp_path):
    testing.random_unconditional_pipeline().save_pretrained(tmp_path / "base")
    given = [flag for flag in train_flags(tmp_path / "base", pictures, *RUN) if "save_rounds" not in flag]
    given += [f"--heldout_dir={heldout}", "--lr_scheduler=constant"]
    whole = train_here(given, tmp_path / "whole", kind=UnconditionalScript)
    train_here(given, tmp_path / "cut", stop_at=8, kind=UnconditionalScript)
    cut = train_here([*given, "--resume_from_checkpoint=latest"], tmp_path / "cut", kind=UnconditionalScript)
    gaps, others = ([row["gap"] for row in rows_of(run)] for run in (whole, cut))
    assert others == pytest.approx(gaps, abs=1e-7) and len({round(gap, 7) for gap in gaps}) == 5


def test_a_run_that_a_limit_ended_stays_ended(flags, tmp_path, monkeypatch, capsys):
    """Whoever always asks to resume gets the same model again, and no advice to go on; a higher limit trains on."""
    script(monkeypatch, (0.9, 0), (0.8, 0.1), (0.7, 0.3), (0.6, 0.35), (0.5, 0.36))
    again = [*flags, "--keep_best=gap", "--resume_from_checkpoint=latest"]
    folder = train_here([*again, "--stop_at_gap=0.2"], tmp_path / "out")
    saved = unet_bytes(folder)
    assert saved == unet_bytes(folder / "rounds" / "round-0001") != unet_bytes(folder / "rounds" / "round-0002")
    assert unet_bytes(train_here([*again, "--stop_at_gap=0.2"], folder)) == saved
    assert [row["global_step"] for row in rows_of(folder)] == [0, 4, 8]
    assert "Stopped at step" not in capsys.readouterr().out
    assert unet_bytes(train_here([*again, "--stop_at_gap=0.4"], folder)) != saved
    assert [row["global_step"] for row in rows_of(folder)] == [0, 4, 8, 12, 16]


def test_a_finished_run_that_is_resumed_keeps_its_best_model(flags, tmp_path, monkeypatch):
    script(monkeypatch, (0.9, 0), (0.5, 0.1), (0.6, 0.2), (0.7, 0.3), (0.8, 0.4), (0.8, 0.4), (0.8, 0.4))
    again = [*flags, "--keep_best=heldout", "--resume_from_checkpoint=latest", "--checkpointing_steps=6"]
    folder = train_here(again, tmp_path / "out")
    best = unet_bytes(folder / "rounds" / "round-0001")
    assert unet_bytes(folder) == best == unet_bytes(train_here(again, folder))


def test_the_best_model_of_a_branch_that_was_left_is_forgotten(flags, tmp_path, monkeypatch):
    script(monkeypatch, (0.9, 0), (0.8, 0.1), (0.7, 0.2), (0.6, 0.3), (0.1, 0.4), (0.75, 0.3), (0.7, 0.4))
    given = [*flags, "--keep_best=heldout", "--checkpointing_steps=4"]
    folder = train_here(given, tmp_path / "out")
    assert json.loads((RunFolder(folder).best / "measurement.json").read_text())["heldout_loss"] == 0.1
    other = ["--resume_from_checkpoint=checkpoint-8", "--resume_allow=learning_rate", "--learning_rate=3e-2"]
    train_here([*given, *other], folder)
    assert unet_bytes(folder) == unet_bytes(folder / "rounds" / "round-0004")
    assert [row["heldout_loss"] for row in rows_of(folder)] == [0.9, 0.8, 0.7, 0.75, 0.7]


def test_visits_are_counted_once_where_processes_share_a_shard():
    """What a resumed group had visited is known whole by one of its processes, what it visits by each its own."""
    proxy = object.__new__(Proxy)
    proxy.total_visits, proxy.resumed_visits = torch.tensor([3, 4]), 0
    assert proxy.visits_of_group(2) == 14
    proxy.resumed_visits = 5
    assert proxy.visits_of_group(2) == 5 + 2 * 2


def test_the_same_noise_is_drawn_each_time_and_changes_no_stream():
    family = testing.family_of_pipeline(testing.random_pipeline(["a red picture"]))
    losses = FixedLosses(family, torch.rand(5, 3, 16, 16), ["a red picture"] * 5, batch_size=2)
    torch.manual_seed(1)
    wanted = torch.rand(3)
    torch.manual_seed(1)
    first, second = losses.by_draw(family.denoiser), losses.by_draw(family.denoiser)
    assert torch.equal(first, second) and torch.equal(torch.rand(3), wanted)
    (draw, rows, drawn), *_ = losses.drawn(1)
    torch.manual_seed(0)
    assert (draw, rows.tolist()) == (0, [0, 1, 2, 3, 4]) and torch.equal(drawn.posterior_noise, torch.randn(5, 4, 8, 8))


def test_what_waited_on_the_disk_is_gone_in_the_end(flags, tmp_path, monkeypatch):
    script(monkeypatch, (0.9, 0), (0.5, 0.1), (0.6, 0.2), (0.7, 0.3), (0.8, 0.4))
    folder = train_here([*flags, "--keep_best=heldout", "--proxy_state=disk", "--use_ema"], tmp_path / "out")
    assert unet_bytes(folder) == unet_bytes(folder / "rounds" / "round-0001")
    assert not RunFolder(folder).waiting.exists()
