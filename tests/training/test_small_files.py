"""Runs with `--calibration base --inner_dtype int8`: what is measured, exported and loaded again are the same numbers."""

import shutil

import pytest
import torch
from image_sets import class_files, write_files
from safetensors.torch import load_file
from subject_runs import are_equal, parameters

from nora_vision import export_lora
from nora_vision.layer import nora_layers
from nora_vision.rounding import factors_of_int8, int8_factors
from nora_vision.saving import adapter_tensors
from pipelines.errors import InputError
from pipelines.fewshot.classifier import FewShotClassifier
from pipelines.methods import method_named
from pipelines.subject import adapters
from pipelines.subject.base_model import load_base_model
from training.fewshot_nora import main as fewshot
from training.options.fewshot import parse_fewshot_options
from training.subject import certificate, finishing, validation
from training.subject.measured import adapter_at

SMALL = ("--calibration", "base", "--inner_dtype", "int8")
HELD_OUT = ("--method", "nora", "--learning_rate", "0.1", "--heldout_image", "2.png", "--train_text_encoder")
WEIGHTS = "adapter_model.safetensors"


@pytest.fixture(autouse=True)
def cache(tmp_path_factory, monkeypatch):
    """The user's cache, empty."""
    folder = tmp_path_factory.mktemp("assets")
    monkeypatch.setattr("nora_vision.base_calibration.cached_assets_path", lambda *_: folder)
    return folder


def are_rounded(model):
    """Whether all trained factors of the model's adapter are whole multiples of a step in 8 bits."""
    return all(
        torch.equal(factors_of_int8(*int8_factors(factors)), factors)
        for layer in nora_layers(model).values()
        for factors in (layer.nora_inner_A["default"], layer.nora_inner_B["default"])
    )


def test_a_run_measures_exports_certifies_and_saves_the_rounded_adapter_and_trains_the_exact_one(
    trainer, tmp_path, cache, monkeypatch, certified_here
):
    seen, measure, export = [], validation.measured_losses, finishing.adapters.save_everywhere
    monkeypatch.setattr(
        validation, "measured_losses", lambda loss, *more: (seen.append(are_rounded(loss.unet)), measure(loss, *more))[1]
    )
    monkeypatch.setattr(
        finishing.adapters, "save_everywhere", lambda pipe, *more: (seen.append(are_rounded(pipe.unet)), export(pipe, *more))[1]
    )
    certified, generate = [], certificate._generate
    monkeypatch.setattr(
        certificate, "_generate", lambda pipe, *how: certified.append((generate(pipe, *how), how)) or certified[-1][0]
    )
    run = trainer.run(tmp_path / "run", *HELD_OUT, *SMALL, "--certify")
    # The base model has a zero B', which is rounded, too, but a Gaussian A'.
    assert seen[0] is False
    assert len(seen) >= 4
    assert all(seen[1:])
    assert {file.name for file in (run.path / "calibration").iterdir()} == {
        f"{name}-base.safetensors" for name in ("unet", "text_encoder", "text_encoder_2")
    }
    assert len(list(cache.iterdir())) == 3

    pipes = {layout: load_base_model(str(trainer.model)) for layout in ("full", "compact")}
    for layout, pipe in pipes.items():
        adapters.load_adapter(pipe, run.path / "adapter" / layout, "default")
    for component in ("unet", "text_encoder", "text_encoder_2"):
        assert load_file(run.path / "adapter/compact" / component / WEIGHTS)["nora_inner_A"].dtype == torch.int8
        full, compact = (adapter_tensors(getattr(pipe, component), "default") for pipe in pipes.values())
        assert are_equal(full, compact)
    exported = load_file(export_lora(pipes["compact"], tmp_path / "again"))
    assert are_equal(exported, load_file(run.path / "diffusers" / "pytorch_lora_weights.safetensors"))
    (images, how), *_ = certified
    assert certificate.Certificate.read(run.path).passed
    assert torch.equal(generate(pipes["compact"], *how), images)
    kept = load_base_model(str(trainer.model))
    adapters.load_adapter(kept, adapter_at(run, 4), "default")
    assert are_equal(adapter_tensors(kept.unet, "default"), adapter_tensors(pipes["full"].unet, "default"))

    exact = trainer.train(tmp_path / "exact", *HELD_OUT, *SMALL[:2])
    assert are_equal(parameters(run), parameters(exact))
    assert len(list(cache.iterdir())) == 3


def test_a_few_shot_classifier_of_the_compact_files_alone_predicts_the_same(random_clip, tmp_path, cache):
    images = write_files(tmp_path / "classes", class_files({"Forest": 6, "River": 6, "Lake": 6}))
    flags = ["--model", random_clip, "--data_dir", images, "--output_dir", tmp_path / "run", "--encoders", "both", *SMALL]
    flags += ["--shots", "2", "--seeds", "0", "--method", "nora", "--rank", "4", "--inner_r", "2", "--views", "1"]
    flags += ["--min_train_steps", "3", "--iterations_per_shot", "1", "--train_batch_size", "4", "--report_to", "none"]
    fewshot(parse_fewshot_options([str(flag) for flag in flags]))
    assert len(list(cache.iterdir())) == 2
    trial = tmp_path / "run" / "trials/2-shots/seed-0/nora"
    photos = sorted(images.rglob("*.png"))[:5]
    expected = FewShotClassifier.from_run(trial).predict([str(photo) for photo in photos])
    for encoder in ("image", "text"):
        file = trial / "adapter" / "compact" / encoder / WEIGHTS
        assert load_file(file)["nora_inner_A"].dtype == torch.int8
        assert file.stat().st_size < (trial / "adapter" / "full" / encoder / WEIGHTS).stat().st_size / 2
    shutil.rmtree(trial / "adapter" / "full")
    predicted = FewShotClassifier.from_run(trial).predict([str(photo) for photo in photos])
    assert torch.equal(predicted.probabilities, expected.probabilities)


def test_options_that_do_not_fit_are_named():
    options = method_named("nora").Options
    with pytest.raises(InputError, match="calibration must be one of data, base, got 'mine'"):
        options(calibration="mine")
    with pytest.raises(InputError, match="inner_dtype must be one of float32, float16, int8, got 'int4'"):
        options(inner_dtype="int4")
    with pytest.raises(InputError, match="inner_dtype must be float32 with preserve_output"):
        options(inner_dtype="int8", preserve_output=True)
