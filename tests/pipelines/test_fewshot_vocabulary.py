"""Classes that are added after training."""

import pytest
import torch
from torch.nn import functional as F
from toy_task import CLASSES, directions, toy_clip, toy_task

from pipelines.errors import InputError
from pipelines.fewshot import baselines
from pipelines.fewshot.baselines import clap, clip_adapter, coop, prolip, taskres
from pipelines.fewshot.baselines.predictors import adapted, load_predictor, save_predictor
from pipelines.fewshot.baselines.vocabulary import with_classes
from pipelines.fewshot.features import prompt_features
from pipelines.fewshot.prompts import Prompts

MORE = Prompts(("grey cat", "grey teapot"), ("a {}.", "{}."))
CLOSED = ("linear_probe", "lp_plus_plus", "gda", "pixels")


@pytest.fixture
def briefly(monkeypatch):
    """Train for a few epochs only."""
    for module, name in ((clap, "EPOCHS"), (clip_adapter, "EPOCHS"), (prolip, "EPOCHS"), (taskres, "MANY_EPOCHS")):
        monkeypatch.setattr(module, name, 5)
    monkeypatch.setattr(coop, "epochs_for", lambda shots: 5)


@torch.no_grad()
def test_zero_shot_of_more_classes_is_zero_shot_of_all():
    clip = toy_clip()
    texts = prompt_features(clip, Prompts(CLASSES, ("{}.",)))
    fitted = baselines.fit("zeroshot", toy_task(class_features=texts, scale=float(clip.logit_scale)), seed=0)
    wider = with_classes(fitted, clip, Prompts(("grey cat",), ("{}.",)))
    pixels = torch.randn(4, 3, 16, 16)
    names = ["cat.", "grey dog.", "teapot.", "grey cat."]
    expected, _ = clip.model.get_logits(pixels, clip.tokenizer(names))
    torch.testing.assert_close(wider.logits(clip.encode_images(pixels)), expected)


@pytest.mark.parametrize("name", sorted(set(baselines.BASELINES) - set(CLOSED)))
def test_existing_classes_keep_their_logits_and_new_ones_get_those_of_their_prompts(briefly, name, tmp_path):
    clip = toy_clip()
    fitted = baselines.fit(name, toy_task(clip=clip), seed=0)
    save_predictor(fitted, tmp_path / "fitted.safetensors")
    queries = directions(7, fitted.head.weight.shape[1], seed=4)
    found = with_classes(load_predictor(tmp_path / "fitted.safetensors"), clip, MORE).logits(queries)
    torch.testing.assert_close(found[:, : len(CLASSES)], fitted.logits(queries))
    seen = adapted(queries, fitted.head.down, fitted.head.up, fitted.head.ratio) if name == "clip_adapter" else queries
    if name == "prolip":
        seen = F.normalize(queries @ fitted.head.projection.T, dim=-1)
    texts = prompt_features(clip, MORE)
    if name == "coop":
        prompts = coop.prompts_with_context(clip, MORE.classes, lengths=(8,))
        texts = prompts.features(fitted.head.context)
        assert not torch.allclose(texts, prompts.features(torch.zeros_like(fitted.head.context)))
    torch.testing.assert_close(found[:, len(CLASSES) :], clip.logit_scale * seen @ F.normalize(texts, dim=-1).T)


@pytest.mark.parametrize("name", CLOSED)
def test_a_classifier_without_prompts_is_closed(name):
    fitted = baselines.fit(name, toy_task(), seed=0)
    with pytest.raises(InputError, match=r"'grey cat', 'grey teapot' cannot be added: .* such as zeroshot or coop"):
        with_classes(fitted, toy_clip(), MORE)
