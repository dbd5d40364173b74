"""Pretraining of the built-in model, on a handful of scenes and a few steps."""

import dataclasses

import numpy as np
import pytest
import torch
from diffusers import StableDiffusionXLPipeline

from pipelines.corpus import join, photo_corpus, rendered_corpus, to_pixels
from pipelines.mini_losses import PatchBasis
from training import pretrain_mini
from training.options.pretraining import PretrainOptions
from training.pretraining.stages import PretrainingSampler, load_corpus
from training.runs.record import list_checkpoints


def options(folder, **changes):
    small = PretrainOptions(
        str(folder), scenes=32, vae_steps=2, vae_batch_size=2, unet_steps=4, unet_batch_size=4, sample_steps=1000
    )
    return dataclasses.replace(small, **changes)


@pytest.fixture(scope="module")
def corpus():
    return rendered_corpus(32, 64, seed=0)


@pytest.fixture(scope="module")
def trained(corpus, tmp_path_factory):
    folder = tmp_path_factory.mktemp("pretrain")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(pretrain_mini, "SHEET_PROMPTS", ("a red star",) * 4)
        for stage in ("basis", "vae", "unet", "export"):
            pretrain_mini.STAGES[stage](options(folder, card_note="Of nothing else."), corpus)
    return folder


def test_the_cached_scenes_are_those_that_were_rendered(tmp_path):
    rendered, cached = (load_corpus(options(tmp_path, scenes=4)) for _ in range(2))
    assert (cached.images == rendered.images).all()
    assert cached.captions == rendered.captions


def test_the_stages_end_in_a_stock_pipeline_of_half_precision_safetensors(trained):
    pipeline = StableDiffusionXLPipeline.from_pretrained(trained / "mini-sdxl", use_safetensors=True, dtype=torch.float16)
    pipeline = pipeline.to(torch.float32)
    pipeline.set_progress_bar_config(disable=True)
    image = np.asarray(pipeline("a red star", num_inference_steps=2, generator=torch.Generator().manual_seed(0)).images[0])
    assert image.shape == (64, 64, 3)
    assert image.std() > 0


def test_the_model_card_states_the_steps_that_were_done(trained):
    card = (trained / "mini-sdxl" / "README.md").read_text()
    assert "2 steps of 2 images" in card
    assert "4 steps of 4 images (16 images seen)" in card
    assert "--unet_steps 4 --vae_steps 2" in card
    assert "Of nothing else." in card


def test_the_patch_basis_gives_decorrelated_latents_of_unit_deviation(corpus):
    pixels = to_pixels(corpus.images)
    latents = PatchBasis.fit(pixels).encode(pixels).movedim(1, -1).flatten(0, -2)
    torch.testing.assert_close(latents.mean(dim=0), torch.zeros(8), atol=1e-4, rtol=0)
    covariance = latents.T @ latents / len(latents)
    assert covariance.trace().div(8).item() == pytest.approx(1, rel=1e-3)
    assert (covariance - covariance.diag().diag()).abs().max() < 1e-3
    assert (covariance.diag().diff() < 0).all()


def test_the_patch_basis_spans_the_best_linear_restoration(corpus):
    pixels = to_pixels(corpus.images)
    basis = PatchBasis.fit(pixels)
    patches = torch.nn.functional.pixel_unshuffle(pixels, 4).movedim(1, -1).flatten(0, -2)
    centred = patches - patches.mean(dim=0)
    directions = torch.linalg.qr(basis.analysis.flatten(1).T).Q
    error = (centred - centred @ directions @ directions.T).square().sum()
    torch.testing.assert_close(error, torch.linalg.svdvals(centred.double())[8:].square().sum().float(), rtol=1e-3, atol=0)


def test_a_resumed_training_ends_in_the_weights_of_an_uninterrupted_one(trained, corpus, tmp_path, monkeypatch):
    monkeypatch.setattr(pretrain_mini, "SHEET_PROMPTS", ("a red star",) * 4)
    for shared in ("vae", pretrain_mini.BASIS_FILE):
        (tmp_path / shared).symlink_to(trained / shared)
    real_loop = pretrain_mini.LoopOptions

    def two_steps_first(steps: int, **rest: int):
        return real_loop(2, **rest)

    monkeypatch.setattr(pretrain_mini, "LoopOptions", two_steps_first)
    pretrain_mini.train_unet(options(tmp_path), corpus)
    monkeypatch.setattr(pretrain_mini, "LoopOptions", real_loop)
    pretrain_mini.train_unet(options(tmp_path), corpus)
    whole, resumed = (list_checkpoints(folder / "unet" / "checkpoints")[-1] for folder in (trained, tmp_path))
    assert (whole / "trained.safetensors").read_bytes() == (resumed / "trained.safetensors").read_bytes()


def test_batches_keep_the_share_of_scenes_and_never_mirror_letters(corpus):
    doubled = join(corpus, corpus)
    pixels, chosen, _ = PretrainingSampler(doubled, scenes=32, scene_share=0.75, seed=0).draw(0, 4000)
    mirrored = (pixels != to_pixels(doubled.images[chosen])).flatten(1).any(dim=1).numpy()
    assert (chosen < 32).mean() == pytest.approx(0.75, abs=0.03)
    assert not mirrored[~doubled.mirrorable[chosen]].any()
    assert mirrored[doubled.mirrorable[chosen]].mean() == pytest.approx(0.5, abs=0.05)


def test_an_unknown_stage_is_refused_by_name(tmp_path):
    with pytest.raises(ValueError, match=r"stages must be among basis, vae, unet, export, clip, export_clip, got clipper"):
        options(tmp_path, stages=["clipper"])


def test_a_folder_without_photographs_is_refused_by_name(tmp_path):
    (tmp_path / "classes.json").write_text("{}")
    with pytest.raises(FileNotFoundError, match=r"holds no \.zip with photographs"):
        photo_corpus(tmp_path, 64)
