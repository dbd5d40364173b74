"""Pretraining of the built-in CLIP, on a handful of images and a few steps."""

import dataclasses

import numpy as np
import pytest
import torch
from safetensors import safe_open
from torch import nn

from benchmarks import mini_clip as benchmark
from pipelines import mini_clip
from pipelines.corpus import Corpus, join, rendered_corpus
from training.options.pretraining import PretrainOptions
from training.pretraining import clip as pretrain_clip
from training.pretraining.clip import ClipBatches, clip_data, estimate_normalisation, export_clip, new_loss, train_clip
from training.runs.record import list_checkpoints
from training.runs.run import RunDirectory

NAMES = ("a cat", "a teapot", "an iPod")


def options(folder, **changes):
    small = PretrainOptions(str(folder), scenes=32, clip_steps=4, clip_batch_size=6, score_steps=2, clip_scene_share=0.5)
    return dataclasses.replace(small, **changes)


@pytest.fixture(scope="module")
def corpus():
    """Scenes, and ten images of noise for each of three classes."""
    images = np.random.default_rng(0).integers(0, 256, (30, 64, 64, 3), dtype=np.uint8)
    photos = Corpus(images, [f"a photo of {name}" for name in NAMES for _ in range(10)], np.ones(30, dtype=bool))
    return join(rendered_corpus(32, 64, seed=0), photos)


@pytest.fixture(scope="module")
def trained(corpus, tmp_path_factory):
    folder = tmp_path_factory.mktemp("pretrain")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(pretrain_clip, "UNSEEN_SCENES", 16)
        train_clip(options(folder), corpus)
        export_clip(options(folder, card_note="Of nothing else."), corpus)
    return folder


def test_the_stages_end_in_half_precision_weights_that_load(trained):
    with safe_open(trained / "mini-clip" / mini_clip.WEIGHTS_FILE, "pt") as weights:
        kinds = {weights.get_tensor(name).dtype for name in weights.keys()}  # noqa: SIM118
    assert kinds == {torch.float16, torch.int64}
    features = mini_clip.image_features(mini_clip.load_model(trained / "mini-clip"), torch.rand(2, 3, 64, 64))
    torch.testing.assert_close(features.norm(dim=-1), torch.ones(2))


def test_the_model_card_states_data_terms_scores_and_the_command(trained):
    card = (trained / "mini-clip" / "README.md").read_text()
    for words in (
        "27 photographs of 3 classes",
        "ImageNet's terms apply to these weights",
        "4 steps of 6 images (24 images seen)",
        "class of 3 held-out photographs",
        "object in a rendered scene, in scenes not trained on",
        "--stages clip export_clip --clip_steps 4",
        "Of nothing else.",
    ):
        assert words in card


def test_held_out_photographs_are_scored_while_training(trained):
    scores = {
        line.step: line.values["held_out"] for line in RunDirectory(trained / "clip").metrics() if "held_out" in line.values
    }
    assert set(scores) == {2, 4}


def test_a_resumed_training_ends_in_the_weights_of_an_uninterrupted_one(trained, corpus, tmp_path, monkeypatch):
    real_loop = pretrain_clip.LoopOptions
    monkeypatch.setattr(pretrain_clip, "LoopOptions", lambda steps, **rest: real_loop(2, **rest))
    train_clip(options(tmp_path), corpus)
    monkeypatch.setattr(pretrain_clip, "LoopOptions", real_loop)
    train_clip(options(tmp_path), corpus)
    whole, resumed = (list_checkpoints(folder / "clip" / "checkpoints")[-1] for folder in (trained, tmp_path))
    assert (whole / "trained.safetensors").read_bytes() == (resumed / "trained.safetensors").read_bytes()


def test_no_batch_shows_a_held_out_photograph_and_every_scene_keeps_its_caption(corpus, tmp_path):
    data = clip_data(options(tmp_path), corpus)
    held_out = {image.tobytes() for image in data.held_out.images}
    assert len(held_out) == 3
    assert not held_out & {image.tobytes() for image in data.training.images}
    drawn = ClipBatches(options(tmp_path, clip_batch_size=64), data)(0)
    scenes = drawn["classes"].sum(dim=-1) == 0
    assert 16 < scenes.sum() < 48
    assert (drawn["captions"][scenes, None] != drawn["wrong"][scenes]).any(dim=-1).all()


def test_a_training_can_start_from_the_weights_of_a_finished_one(trained, corpus, tmp_path):
    given = options(tmp_path, clip_weights=str(trained / "mini-clip"))
    loss = new_loss(given, clip_data(given, corpus))
    finished = mini_clip.load_model(trained / "mini-clip").state_dict()
    assert all(torch.equal(value, finished[name]) for name, value in loss.model.state_dict().items())
    torch.testing.assert_close(loss.anchors, mini_clip.zero_shot_weights(loss.model.eval(), loss.names))


def test_normalisation_is_estimated_over_all_batches_and_the_weights_stay():
    module = nn.Sequential(nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4))
    weights = module[0].weight.clone()
    batches = [torch.randn(8, 3, 5, 5) for _ in range(6)]
    estimate_normalisation(module, batches)
    values = module[0](torch.cat(batches)).movedim(1, 0).flatten(1)
    torch.testing.assert_close(module[1].running_mean, values.mean(dim=1))
    torch.testing.assert_close(module[1].running_var, values.var(dim=1), rtol=0.05, atol=0)
    assert torch.equal(module[0].weight, weights)
    assert module[1].momentum == 0.1
    assert not module.training


def test_clip_without_photographs_is_refused(tmp_path):
    with pytest.raises(ValueError, match="images_dir must name a folder of photographs"):
        clip_data(options(tmp_path), rendered_corpus(32, 64, seed=0))


def test_cached_scenes_of_another_seed_are_refused(corpus, tmp_path):
    with pytest.raises(ValueError, match=r"not those of seed 5\. Delete the cached scenes"):
        clip_data(options(tmp_path, seed=5), corpus)


def test_the_benchmark_probes_features_and_raw_pixels_alike(trained, tmp_path, monkeypatch):
    monkeypatch.setattr(benchmark, "PENALTIES", {"logisticregression__C": [1e-2, 1.0]})
    rng = np.random.default_rng(0)
    for place, name in enumerate(("dark", "light")):
        (tmp_path / name).mkdir()
        for number in range(12):
            pixels = rng.integers(120 * place, 120 * place + 100, (70, 64, 3), dtype=np.uint8)
            benchmark.Image.fromarray(pixels).save(tmp_path / name / f"{number}.png")
    chosen = benchmark.BenchmarkOptions(str(trained / "mini-clip"), classes_dir=str(tmp_path), scenes=8, shots=4, draws=2)
    lines = benchmark.rows(chosen)
    assert [line.split("|")[1].strip() for line in lines[2:]] == [
        *(f"{part} of 8 scenes, zero-shot" for part in ("kind", "colour", "background")),
        "4 images a class, probe of features, mean of 2",
        "4 images a class, probe of raw pixels, mean of 2",
    ]
    assert "100.0% | 50.0%" in lines[-1]
