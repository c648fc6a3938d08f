"""The shapes of real models have the parameters that their authors' have; changing proxies is timed on a run."""

import sys

import pytest
import torch
from diffusers import UNet2DConditionModel
from transformers import CLIPTextModelWithProjection

from benchmarks import real_shapes, switch
from ietagc_diffusers.training.ensemble import IterativeEnsemble
from ietagc_diffusers.training.proxy import Proxy


def parameters(model):
    return sum(parameter.numel() for parameter in model.parameters())


@pytest.mark.parametrize(
    "name, unet, texts",
    [
        ("sd15", 859_520_964, [123_060_480]),
        ("sd21", 865_910_724, [340_387_840]),
        ("sdxl", 2_567_463_684, [123_060_480, 694_659_840]),
    ],
)
def test_shapes_are_the_published_ones(name, unet, texts):
    with torch.device("meta"):
        assert parameters(UNet2DConditionModel(**real_shapes.UNETS[name])) == unet
        assert parameters(real_shapes.vae()) == 83_653_863
        kinds = [{}, {"kind": CLIPTextModelWithProjection}]
        sizes = zip(real_shapes.TEXTS[name], kinds, strict=False)
        assert [parameters(real_shapes.text_encoder(*size, **kind)) for size, kind in sizes] == texts
        parts = real_shapes.pipeline(name).components.values()
    assert sum(parameters(p) for p in parts if isinstance(p, torch.nn.Module)) == unet + 83_653_863 + sum(texts)


def test_a_change_is_timed(base, monkeypatch, capsys):
    for kind, methods in ((IterativeEnsemble, ("_activate", "_retire", "_end_round")), (Proxy, ("step",))):
        for method in methods:
            monkeypatch.setattr(kind, method, getattr(kind, method))  # taken back afterwards
    flags = ["--steps=1", "--resolution=16", "--train_batch_size=2", "--proxy_state=disk"]
    monkeypatch.setattr(sys, "argv", ["switch", str(base), *flags])
    switch.main()
    assert "rounds of 1000 steps" in capsys.readouterr().out
