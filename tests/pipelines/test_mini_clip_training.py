"""Pretraining of the built-in CLIP: right and wrong captions, augmentation, and the loss."""

import random

import numpy as np
import pytest
import torch
from torch import nn

from pipelines.corpus import corpus_scenes, rendered_corpus, split_held_out
from pipelines.mini_clip import encode_texts, new_model, tokenize, write_configuration
from pipelines.mini_clip_data import altered, augment, mix_classes, sample_parts
from pipelines.mini_clip_loss import ClassNameLoss
from pipelines.mini_sdxl import PROMPT_WORDS, reduced_tokenizer
from pipelines.scenes import PARTS, Scene, sample_scene

NAMES = ["a cat", "a teapot", "a bus"]


@pytest.fixture(scope="module")
def tokenizer():
    return reduced_tokenizer([PROMPT_WORDS, *NAMES])


@pytest.fixture
def loss(tokenizer, tmp_path):
    """The loss over three classes in one template, without dropout or batch statistics, so that it is deterministic."""
    write_configuration(tmp_path, tokenizer)
    torch.manual_seed(0)
    return ClassNameLoss(new_model(tmp_path), tokenize(tokenizer, NAMES)[None]).eval()


def batch(tokenizer, labels, captions, wrong=()):
    """Random images with the given labels, -1 for scenes; every scene has the same wrong captions."""
    count, classes = len(labels), torch.zeros(len(labels), len(NAMES))
    classes[torch.tensor(labels) >= 0] = torch.eye(len(NAMES))[[label for label in labels if label >= 0]]
    wrong_tokens = tokenize(tokenizer, list(wrong)) if wrong else torch.zeros(0, 32, dtype=torch.int64)
    return {
        "pixels": torch.rand(count, 3, 64, 64, generator=torch.Generator().manual_seed(1)),
        "classes": classes,
        "template": torch.zeros(count, dtype=torch.int64),
        "captions": tokenize(tokenizer, captions),
        "wrong": wrong_tokens.expand(count, -1, -1),
    }


def logits_over(loss, pixels, texts):
    features = loss.model.encode_image(pixels.contiguous(memory_format=torch.channels_last), normalize=True)
    return loss.model.logit_scale.exp() * features @ encode_texts(loss.model, texts).T


def by_anchor(loss, pixels, labels):
    """Smoothed cross-entropy of photographs, and of the names of their classes, over the anchors."""
    anchors = loss.model.logit_scale.exp() * nn.functional.normalize(loss.anchors, dim=-1)
    cross_entropy = nn.CrossEntropyLoss(label_smoothing=loss.smoothing)
    photos = loss.model.encode_image(pixels.contiguous(memory_format=torch.channels_last), normalize=True)
    present = labels.unique()
    names = encode_texts(loss.model, loss.names[0, present])
    return cross_entropy(names @ anchors.T, present) + cross_entropy(photos @ anchors.T, labels)


@torch.no_grad()
def test_the_loss_of_photographs_is_smoothed_cross_entropy_over_their_class_names(loss, tokenizer):
    inputs = batch(tokenizer, [2, 0, 2], ["unread"] * 3)
    logits = logits_over(loss, inputs["pixels"], loss.names[0, [0, 2]])
    expected = nn.CrossEntropyLoss(label_smoothing=0.1)(logits, torch.tensor([1, 0, 1]))
    torch.testing.assert_close(loss(**inputs), expected + by_anchor(loss, inputs["pixels"], torch.tensor([2, 0, 2])))


@torch.no_grad()
def test_the_loss_of_scenes_covers_names_captions_and_wrong_captions(loss, tokenizer):
    inputs = batch(tokenizer, [1, -1, -1], ["unread", "a red star", "a blue star"], ["a green star"])
    captions = tokenize(tokenizer, ["a red star", "a blue star", "a green star", "a green star"])
    texts = torch.cat([loss.names[0, [1]], captions])
    logits = logits_over(loss, inputs["pixels"], texts)
    expected = nn.CrossEntropyLoss(label_smoothing=0.1)(logits, torch.tensor([0, 1, 2]))
    torch.testing.assert_close(loss(**inputs), expected + by_anchor(loss, inputs["pixels"][:1], torch.tensor([1])))


@torch.no_grad()
def test_equal_captions_share_the_target(loss, tokenizer):
    loss.smoothing = 0.0
    inputs = batch(tokenizer, [-1, -1], ["a red star", "a red star"], ["a blue star"])
    chosen = logits_over(loss, inputs["pixels"], tokenize(tokenizer, ["a red star"] * 2 + ["a blue star"] * 2))
    expected = -chosen.log_softmax(dim=-1)[:, :2].mean()
    torch.testing.assert_close(loss(**inputs), expected)


def test_a_wrong_caption_differs_in_one_mentioned_part():
    rng, scenes = np.random.default_rng(0), random.Random(0)
    for _ in range(300):
        scene, parts = sample_scene(scenes), sample_parts(rng)
        other = altered(scene, parts, rng)
        different = [part for part in PARTS if getattr(scene, part) != getattr(other, part)]
        assert len(different) == 1 or (not different and scene.glyph != other.glyph)
        assert set(different) <= set(parts)
        assert other.describe(parts) != scene.describe(parts)


@pytest.mark.parametrize(
    ("parts", "words"),
    [
        (PARTS, "a large red striped star in the snow"),
        (("kind", "colour"), "a red star"),
        (("background",), "a thing in the snow"),
        (("colour", "size"), "a large red thing"),
    ],
)
def test_a_scene_is_described_by_the_given_parts(parts, words):
    assert Scene("star", "red", "striped", "large", "snow").describe(parts) == words


def test_augmentation_moves_scenes_but_keeps_their_colours():
    pixels = torch.zeros(2, 3, 64, 64)
    pixels[:, 0, 20:40, 20:40] = 0.5
    moved = augment(pixels, np.asarray([False, False]), np.random.default_rng(0))
    assert not torch.equal(moved, pixels)
    torch.testing.assert_close(moved.amax(dim=(2, 3)), pixels.amax(dim=(2, 3)))
    torch.testing.assert_close(moved[:, 0].sum(dim=(1, 2)), pixels[:, 0].sum(dim=(1, 2)), rtol=0.01, atol=0)


def test_augmentation_changes_a_photograph_every_time_and_stays_in_range():
    photo = torch.rand(1, 3, 64, 64).expand(8, -1, -1, -1) * 2 - 1
    changed = augment(photo, np.ones(8, dtype=bool), np.random.default_rng(0))
    assert changed.shape == photo.shape
    assert changed.abs().max() <= 1
    assert all((changed[0] - other).abs().mean() > 0.05 for other in changed[1:])


def test_cutmix_states_the_share_of_the_pixels_that_each_class_has_and_leaves_scenes():
    """Images of one colour for each class, so that the shares can be counted."""
    labels = torch.tensor([0, 1, -1, 2])
    pixels = torch.stack([torch.full((3, 32, 32), float(label)) for label in labels])
    changed = 0
    for seed in range(20):
        mixed, shares = mix_classes(pixels, labels, 3, 1.0, np.random.default_rng(seed))
        counted = torch.stack([(mixed[:, 0] == label).float().mean(dim=(1, 2)) for label in range(3)], dim=1)
        torch.testing.assert_close(shares, counted)
        assert torch.equal(mixed[2], pixels[2])
        changed += not torch.equal(mixed, pixels)
    assert changed > 10


def test_without_cutmix_an_image_is_of_its_class_alone():
    labels = torch.tensor([1, -1])
    pixels = torch.rand(2, 3, 8, 8)
    mixed, shares = mix_classes(pixels, labels, 2, 0.0, np.random.default_rng(0))
    assert torch.equal(mixed, pixels)
    assert shares.tolist() == [[0.0, 1.0], [0.0, 0.0]]


@torch.no_grad()
def test_a_mixed_photograph_has_both_classes_as_its_target(loss, tokenizer):
    loss.smoothing = 0.0
    inputs = batch(tokenizer, [0, 2], ["unread"] * 2)
    inputs["classes"] = torch.tensor([[0.7, 0.0, 0.3], [0.2, 0.0, 0.8]])
    logits = logits_over(loss, inputs["pixels"], loss.names[0, [0, 2]])
    photos = loss.model.encode_image(inputs["pixels"].contiguous(memory_format=torch.channels_last), normalize=True)
    anchors = loss.model.logit_scale.exp() * nn.functional.normalize(loss.anchors, dim=-1)
    names = nn.functional.cross_entropy(encode_texts(loss.model, loss.names[0, [0, 2]]) @ anchors.T, torch.tensor([0, 2]))
    expected = nn.functional.cross_entropy(logits, inputs["classes"][:, [0, 2]])
    expected += nn.functional.cross_entropy(photos @ anchors.T, inputs["classes"]) + names
    torch.testing.assert_close(loss(**inputs), expected)


def test_the_scenes_of_a_corpus_match_its_captions():
    corpus = rendered_corpus(300, 16, seed=3)
    assert [scene.caption for scene in corpus_scenes(300, seed=3)] == corpus.captions


def test_a_tenth_of_every_class_is_held_out_the_same_for_the_same_seed():
    captions = ["a cat"] * 50 + ["a bus"] * 30
    train, held_out = split_held_out(captions, 0.1, seed=0)
    assert sorted([*train, *held_out]) == list(range(80))
    assert (held_out < 50).sum() == 5
    assert (held_out >= 50).sum() == 3
    assert np.array_equal(held_out, split_held_out(captions, 0.1, seed=0)[1])
    assert not np.array_equal(held_out, split_held_out(captions, 0.1, seed=1)[1])
