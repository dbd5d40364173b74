"""Every adapter method through the common interface: start, train, save, load."""

import json
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import pytest
import torch
from accelerate import Accelerator
from diffusers import StableDiffusionXLPipeline
from peft import PeftModel
from safetensors.torch import load_file, save_file
from tiny_options import TINY, full_precision_methods
from tiny_pipeline import image, tiny_pipeline
from torch import nn

from pipelines import adapter_files
from pipelines.adapter_method import ADAPTER_NAME, trained_parameters, tuner_layers
from pipelines.adapter_options import AdapterOptions
from pipelines.cache import TensorCache
from pipelines.errors import InputError
from pipelines.methods import DEFAULT, method_named, method_names
from pipelines.subject import adapters
from pipelines.subject.batches import SubjectBatches
from pipelines.subject.calibration import runs_on_subject
from pipelines.subject.data import TrainingImage
from pipelines.subject.encoding import CropConfig, LatentEncoder
from pipelines.subject.loss import DenoisingLoss
from pipelines.subject.target_layers import default_targets
from training.engine.loop import training_losses
from training.subject.finishing import SUGGESTED, using_adapter

PROMPT = "a red star"
all_methods = pytest.mark.parametrize("method", method_names())


def small(method, **changes):
    return AdapterOptions(method=method, rank=6, inner_r=2, **TINY, **changes)


def attached(pipe, options, images_dir, cache, seed=0):
    """Attach and start the adapter; returns its components."""
    images = [TrainingImage(path, PROMPT) for path in sorted(images_dir.iterdir())]
    subject = LatentEncoder(pipe, TensorCache(cache / "encoded")).encode(images, CropConfig(((16, 16),)))
    components = adapters.attach(pipe, options, seed)
    loss = DenoisingLoss(pipe)
    batches = SubjectBatches(subject, options.train_text_encoder, 2, loss.num_timesteps, seed)
    losses = partial(training_losses, loss, batches, Accelerator())
    adapters.start(options, components, runs_on_subject(loss, subject, seed), cache, seed, losses)
    return components


def adapter_state(model):
    """Every parameter and buffer of the adapter, by name."""
    tensors = {**dict(model.named_parameters()), **dict(model.named_buffers())}
    layers = tuple(f"{name}." for name in tuner_layers(model))
    return {name: t.detach() for name, t in tensors.items() if name.startswith(layers) and ".base_layer." not in name}


def disturb(components):
    """Change every trained parameter, in place of training."""
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for parameter in trained_parameters(components):
            parameter.add_(0.5 * torch.randn(parameter.shape, generator=generator))


def test_nora_lora_and_dora_are_available():
    assert {"nora", "lora", "dora"} <= set(method_names())


def everywhere(method):
    """Options that adapt the default layers of all components."""
    return small(method, train_text_encoder=True, target_modules=default_targets(method, built_in=True))


@dataclass
class Life:
    """An adapter of one method from its start to its files.

    Args:
        pipe: the model that it is attached to.
        folder: of its files in every form, after its parameters were disturbed.
        fresh: the image that it makes when it was just started.
        start: its parameters and buffers then, in the UNet.
        trained, with_gradient: the names of the parameters that are to be trained, and of those that got a gradient.
        image: the image that the saved adapter makes.
    """

    method: str
    pipe: StableDiffusionXLPipeline
    components: dict[str, nn.Module]
    folder: Path
    fresh: torch.Tensor
    start: torch.Tensor
    trained: set[str]
    with_gradient: set[str]
    image: torch.Tensor


@pytest.fixture(scope="module")
def base_image():
    """The image that the model makes without an adapter."""
    return image(tiny_pipeline())


@pytest.fixture(scope="module", params=full_precision_methods())
def life(request, base_image, images_dir, tmp_path_factory):
    """The life of an adapter of each method."""
    folder, pipe = tmp_path_factory.mktemp("life"), tiny_pipeline()
    components = attached(pipe, everywhere(request.param), images_dir, folder / "cache")
    fresh, start = image(pipe), flat_state(components["unet"])
    disturb(components)
    trained, with_gradient = gradients(pipe)
    adapters.save_everywhere(pipe, components, folder, "subject")
    disturbed = image(pipe)
    assert (disturbed - base_image).abs().max() > 1 / 255
    return Life(request.param, pipe, components, folder, fresh, start, trained, with_gradient, disturbed)


def flat_state(model):
    """Every number of the adapter's parameters and buffers."""
    return torch.cat([tensor.flatten().float() for tensor in adapter_state(model).values()])


def gradients(pipe):
    """The names of the loss's trained parameters, and of those that get a gradient from a batch."""
    loss = DenoisingLoss(pipe)
    tokens = pipe.tokenizer([PROMPT] * 2, padding="max_length", return_tensors="pt").input_ids
    batch = {"latents": torch.randn(2, 4, 8, 8), "noise": torch.randn(2, 4, 8, 8), "timesteps": torch.tensor([100, 900])}
    loss(**batch, time_ids=torch.ones(2, 6), tokens=tokens[:, None].expand(2, 2, -1)).backward()
    with_gradient = {name for name, parameter in loss.named_parameters() if parameter.grad is not None}
    return {name for name, parameter in loss.named_parameters() if parameter.requires_grad}, with_gradient


def test_a_fresh_adapter_leaves_the_images_as_they_were_unless_its_method_says_otherwise(life, base_image):
    assert torch.allclose(life.fresh, base_image, atol=1e-5) == method_named(life.method).starts_at_base


def test_only_the_adapter_is_trained_and_every_number_of_it_gets_a_gradient(life):
    assert life.with_gradient == life.trained
    assert not any("base_layer" in name for name in life.trained)
    assert {name.partition(".")[0] for name in life.trained} == {"unet", "text_encoders"}


def test_the_same_seed_starts_from_the_same_numbers(life, images_dir, tmp_path):
    options = everywhere(life.method)
    assert torch.equal(flat_state(attached(tiny_pipeline(), options, images_dir, tmp_path / "0")["unet"]), life.start)
    if method_named(life.method).samples_start:
        other = attached(tiny_pipeline(), options, images_dir, tmp_path / "1", seed=1)
        assert not torch.equal(flat_state(other["unet"]), life.start)


FILES = ["adapter/full", "diffusers/pytorch_lora_weights.safetensors", "kohya/subject.safetensors"]


@pytest.mark.parametrize("file", FILES)
def test_every_file_of_a_trained_adapter_gives_the_same_images(life, file):
    if not method_named(life.method).exports_exactly and file.startswith(("diffusers", "kohya")):
        pytest.skip("the exported file is an approximation")
    fresh = tiny_pipeline()
    adapters.load_adapter(fresh, life.folder / file, "loaded")
    fresh.set_adapters("loaded")
    torch.testing.assert_close(image(fresh), life.image, atol=1 / 255, rtol=0)


def test_a_runs_folder_stands_for_its_full_files(images_dir, tmp_path):
    pipe = tiny_pipeline()
    components = attached(pipe, small(DEFAULT), images_dir, tmp_path / "cache")
    disturb(components)
    adapters.save_everywhere(pipe, components, tmp_path / "run", "subject")
    fresh = tiny_pipeline()
    adapters.load_adapter(fresh, tmp_path / "run", "loaded")
    fresh.set_adapters("loaded")
    torch.testing.assert_close(image(fresh), image(pipe), atol=1 / 255, rtol=0)


def test_the_kohya_file_of_a_renamed_run_is_replaced(images_dir, tmp_path):
    pipe = tiny_pipeline()
    components = attached(pipe, small("lora"), images_dir, tmp_path / "cache")
    for title in ("before", "after"):
        adapters.save_everywhere(pipe, components, tmp_path / "run", title)
    assert [path.name for path in (tmp_path / "run" / "kohya").iterdir()] == ["after.safetensors"]


def test_a_saved_adapter_is_loaded_beside_the_one_in_training_and_removed_again(life, tmp_path):
    pipe, components = life.pipe, life.components
    adapters.save_small(components, tmp_path / "kept")
    kept = image(pipe)
    disturb(components)
    trained = image(pipe)
    assert (trained - kept).abs().max() > 1 / 255
    with using_adapter(pipe, tmp_path / "kept"):
        torch.testing.assert_close(image(pipe), kept, atol=1 / 255, rtol=0)
        adapters.save_everywhere(pipe, components, tmp_path / "suggested", "subject", SUGGESTED)
    torch.testing.assert_close(image(pipe), trained, atol=1e-4, rtol=0)
    if method_named(life.method).exports_exactly:
        fresh = tiny_pipeline()
        adapters.load_adapter(fresh, tmp_path / "suggested" / "diffusers" / "pytorch_lora_weights.safetensors", "loaded")
        torch.testing.assert_close(image(fresh), kept, atol=1 / 255, rtol=0)


def test_pefts_loader_reads_the_full_files_and_gives_the_same_image(life):
    if not method_named(life.method).exports_exactly:
        pytest.skip("PEFT's layers do not compute the same")
    fresh = tiny_pipeline()
    for component in sorted((life.folder / "adapter" / "full").iterdir()):
        PeftModel.from_pretrained(getattr(fresh, component.name), str(component))
    torch.testing.assert_close(image(fresh), life.image, atol=1 / 255, rtol=0)


def test_files_of_earlier_versions_without_pefts_prefix_still_load(images_dir, tmp_path):
    pipe = tiny_pipeline()
    components = attached(pipe, small("lora"), images_dir, tmp_path / "cache")
    disturb(components)
    adapter_files.save(components, tmp_path)
    file = tmp_path / "full" / "unet" / "adapter_model.safetensors"
    tensors = {name.removeprefix("base_model.model."): value for name, value in load_file(file).items()}
    save_file(tensors, file)
    fresh = tiny_pipeline()
    adapters.load_adapter(fresh, tmp_path / "full", "loaded")
    fresh.set_adapters("loaded")
    torch.testing.assert_close(image(fresh), image(pipe), atol=1 / 255, rtol=0)


def test_nora_caches_its_statistics_and_reuses_them(images_dir, tmp_path):
    first = attached(tiny_pipeline(), small("nora"), images_dir, tmp_path)
    cached = (tmp_path / "unet.safetensors").read_bytes()
    pipe = tiny_pipeline()
    components = adapters.attach(pipe, small("nora"))

    def not_again():
        raise AssertionError("calibrated again")

    adapters.start(small("nora"), components, {"unet": not_again}, tmp_path, 0)
    assert (tmp_path / "unet.safetensors").read_bytes() == cached
    for ours, theirs in zip(components["unet"].buffers(), first["unet"].buffers(), strict=True):
        assert torch.equal(ours, theirs)


def test_the_losses_that_a_start_differentiates_are_the_base_models_whatever_was_started_before(
    pipe, images_dir, tmp_path, monkeypatch
):
    seen = []

    def start(self, model, probe, adapter_name):
        seen.append([loss.item() for loss in probe.losses(2)])
        disturb({"": model})

    monkeypatch.setattr(method_named("lora"), "start", start)
    components = attached(pipe, small("lora", train_text_encoder=True), images_dir, tmp_path)
    assert len(seen) == 3
    assert len(seen[0]) == 2
    assert seen[0] == seen[1] == seen[2]
    assert not any(layer.disable_adapters for model in components.values() for layer in tuner_layers(model).values())


@all_methods
def test_the_formula_of_a_method_gives_its_number_of_trained_parameters(method):
    model = nn.ModuleDict({"wide": nn.Linear(24, 16), "tall": nn.Linear(8, 40)})
    options = small(method)
    adapter = options.create()
    adapter.add(model, ["wide", "tall"], torch.Generator().manual_seed(0))
    # Options that are not given follow from the layers, as the configuration then says.
    given = {name: value for name, value in vars(adapter.options).items() if value is not None}
    values = {**vars(model.peft_config[ADAPTER_NAME]), **given}
    names = [values | adapter.formula_names(m, n) for m, n in ((16, 24), (40, 8))]
    expected = sum(eval(adapter.parameters, {}, of_layer) for of_layer in names)
    expected += eval(adapter.shared_parameters, {}, {**values, "layers": 2, "max": max, "round": round})
    assert sum(p.numel() for p in model.parameters() if p.requires_grad) == expected


def test_an_unknown_method_is_refused_with_a_list_of_methods():
    with pytest.raises(InputError, match=r"method must be one of .*lora.*nora.*, got 'dreamfusion'"):
        AdapterOptions(method="dreamfusion")


@all_methods
def test_options_default_to_those_of_the_method(method):
    decided = method_named(method).defaults("subject", False).options
    assert decided.items() <= vars(AdapterOptions(method=method)).items()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"rank": 0}, r"rank must be at least 1, got 0"),
        ({"target_modules": []}, r"target_modules must name at least one"),
        ({"inner_r": 9, "rank": 8}, r"inner_r must be in \[1, r=8\].*got 9"),
        ({"inner_init": "ones"}, r"inner_init must be one of .*got 'ones'"),
        ({"dropout": 1.5}, r"dropout must be in"),
        ({"alpha": -1.0}, r"alpha must be above 0"),
    ],
)
def test_a_wrong_option_is_refused_before_a_model_is_loaded(changes, message):
    with pytest.raises(ValueError, match=message):
        AdapterOptions(**changes)


def test_a_rank_above_a_layers_size_is_refused_with_the_layers_name(pipe):
    with pytest.raises(InputError, match=r"does not fit unet: r must be in \[1, 16\] for '.*to_q'.*got 64"):
        adapters.attach(pipe, AdapterOptions(rank=64))
    assert not hasattr(pipe.unet, "peft_config") or not pipe.unet.peft_config


@all_methods
def test_a_target_that_does_not_exist_is_refused(pipe, method):
    with pytest.raises(InputError, match=r"does not fit unet: .*to_z"):
        adapters.attach(pipe, small(method, target_modules=["to_z"]))


def test_a_path_without_an_adapter_is_refused_with_what_to_give(pipe, tmp_path):
    with pytest.raises(InputError, match=r"no adapter at .*run directory"):
        adapters.load_adapter(pipe, tmp_path, "x")


def test_an_adapter_of_an_unknown_method_is_refused(pipe, tmp_path):
    (tmp_path / "unet").mkdir()
    (tmp_path / "unet" / "adapter_config.json").write_text(json.dumps({"peft_type": "XLORA"}))
    save_file({"x": torch.zeros(1)}, tmp_path / "unet" / "adapter_model.safetensors")
    with pytest.raises(InputError, match=r"method must be one of .*got 'xlora'"):
        adapters.load_adapter(pipe, tmp_path, "x")
