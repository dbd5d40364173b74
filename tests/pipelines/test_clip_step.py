"""The benchmark of a CLIP training step, on a tiny model."""

import json
import re

import clip_step
import open_clip
import pytest
import torch
from tiny_clip import CONFIG
from torch import nn

from pipelines.fewshot import export

OPTIONS = ["--device", "cpu", "--steps", "2", "--rank", "4", "--inner_r", "1", "--formats"]


@pytest.fixture(scope="module")
def name(tmp_path_factory):
    """The name in open_clip of a tiny model, with the vocabulary of its tokenizer."""
    file = tmp_path_factory.mktemp("configs") / "tiny-benchmark.json"
    file.write_text(json.dumps({**CONFIG, "text_cfg": {**CONFIG["text_cfg"], "vocab_size": 49408}}))
    open_clip.add_model_config(file)
    return file.stem


def test_the_exports_are_exact_and_both_adapters_are_measured(name, capsys):
    clip_step.main(["--model", name, *OPTIONS])
    printed = capsys.readouterr().out
    assert all(float(value) < clip_step.TOLERANCE for value in re.findall(r": ([\d.]+e[-+]\d+)", printed))
    # 2 r r' for v in 5 blocks; rank 2 in and out of q, k, v, widths 32 (3 blocks) and 16 (2 blocks).
    assert f"NoRA: {2 * 4 * 1 * 5} trainable parameters" in printed
    assert f"LoRA: {2 * 2 * 3 * (3 * 32 + 2 * 16)} trainable parameters" in printed


def test_an_export_that_differs_is_an_error(name, monkeypatch):
    merged = export.merged

    def disturbed(clip, packed=True):
        plain = merged(clip, packed)
        plain.model.visual.proj[0] += 1.0
        return plain

    monkeypatch.setattr(export, "merged", disturbed)
    with pytest.raises(ValueError, match="at most 1e-05 from the adapted model; merged and repacked, checkpoint differ more"):
        clip_step.main(["--model", name, *OPTIONS])


def test_saved_bytes_are_those_of_the_inputs_that_backward_needs():
    layer = nn.Sequential(nn.Linear(8, 8), nn.GELU(), nn.Linear(8, 8))
    x = torch.randn(4, 8)
    # The input of the first layer, that of the activation, and that of the second layer.
    assert clip_step.saved_bytes(layer, lambda: layer(x)) == 3 * 4 * 8 * 4
