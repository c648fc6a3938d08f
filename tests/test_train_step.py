"""The benchmark's official step does what the official script's does: our plain step, bit for bit."""

import sys
from types import SimpleNamespace

import pytest
import torch

from benchmarks import train_step
from ietagc_diffusers.method.control import PlainControl
from ietagc_diffusers.training.layout import Layout
from ietagc_diffusers.training.proxy import Proxy


def stepped(cached, step, lora):
    args = SimpleNamespace(model="tiny", size=16, batch=3, channels_last=False, gradient_checkpointing=False, lora=lora)
    denoiser, objective, vocabulary = train_step.build(args, torch.device("cpu"), torch.float32)
    optimizer = torch.optim.AdamW([p for p in denoiser.parameters() if p.requires_grad], lr=1e-3)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1.0)
    batch = train_step.batches(args, objective, vocabulary, torch.device("cpu"))[cached]
    torch.manual_seed(4)
    step(denoiser, objective, batch, optimizer, schedule)
    return torch.cat([parameter.detach().flatten() for parameter in denoiser.parameters()])


def ours(denoiser, objective, batch, optimizer, schedule):
    Proxy(0, train_step.Batches(batch), PlainControl(), optimizer, schedule, 3).step(denoiser, objective, Layout(1))


@pytest.mark.parametrize("lora", [None, 4])
def test_the_steps_that_are_compared_are_the_same(lora):
    official = stepped(False, train_step.official_step, lora)
    assert torch.equal(official, stepped(False, ours, lora))
    assert torch.equal(official, stepped(True, ours, lora))


@pytest.mark.parametrize("kind", ["--fused_adam", "--lora=4"])
def test_every_variant_is_measured(monkeypatch, capsys, kind):
    monkeypatch.setattr(sys, "argv", ["train_step", "--size=16", "--batch=4", "--steps=1", kind])
    train_step.main()
    table = capsys.readouterr().out
    assert all(f"| {name} |" in table for name in train_step.VARIANTS)
