"""A base model in 4 bits and adapters on it; the dequantised weights are the oracle."""

import functools
import weakref
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import bitsandbytes
import pytest
import torch
from accelerate import Accelerator
from bitsandbytes.nn import Linear4bit
from peft.utils.integrations import dequantize_module_weight
from test_lora_one import subject_batch
from tiny_clip import images, prompts, tiny_clip
from tiny_options import TINY
from tiny_pipeline import image, tiny_pipeline
from torch import nn

from nora_vision import CheckpointWeights, NoraLayer, calibrate
from nora_vision.calibration import base_name
from pipelines import adapter_files, quantization
from pipelines.adapter_method import trained_parameters, tuner_layers
from pipelines.adapter_options import AdapterOptions
from pipelines.cache import module_digest
from pipelines.clip import Clip
from pipelines.clip_attention import attention_layers, separate
from pipelines.errors import InputError
from pipelines.fewshot import adapters as fewshot_adapters
from pipelines.fewshot.adapters import encoder
from pipelines.fewshot.quantization import quantized as quantized_towers
from pipelines.fewshot.target_layers import IMAGE, TEXT, TargetLayers
from pipelines.methods import method_named, method_names
from pipelines.optimizers import OptimizerSettings
from pipelines.quantization import compute_dtype, quantize_linear_layers, summary
from pipelines.subject import adapters
from pipelines.subject.base_model import QUANTIZED_COMPONENTS, load_base_model, quantization_errors, quantize_components
from pipelines.subject.loss import DenoisingLoss
from training.engine.loop import training_losses

LINEAR, CONVOLUTIONS = ["to_q", "to_v"], ["conv1"]
METHODS = [name for name in method_names() if method_named(name).adapts_quantized_layers]


def quantized(unquantized=None):
    """The pipeline in 4 bits; its weights before are in the folder `unquantized`."""
    pipe = tiny_pipeline()
    quantize_components(pipe, "nf4", torch.float32, unquantized)
    return pipe


@functools.cache
def dequantised_weights():
    """The weight of every layer that is in 4 bits, by component and name."""
    source = quantized()
    return {
        (component, name): dequantize_module_weight(layer).detach()
        for component in QUANTIZED_COMPONENTS
        for name, layer in getattr(source, component).named_modules()
        if isinstance(layer, Linear4bit)
    }


@torch.no_grad()
def rounded():
    """The full-precision pipeline with the dequantised weights."""
    pipe = tiny_pipeline()
    for (component, name), weight in dequantised_weights().items():
        getattr(pipe, component).get_submodule(name).weight.copy_(weight)
    return pipe


def run(pipe):
    """The function that calibration runs."""
    image(pipe)


def adapted(pipe, method, cache, unquantized=None):
    targets = [*LINEAR, *(CONVOLUTIONS if method_named(method).adapts_convolutions else [])]
    options = AdapterOptions(method=method, rank=4, inner_r=2, **TINY, target_modules=targets)
    components = adapters.attach(pipe, options)
    losses = partial(training_losses, DenoisingLoss(pipe), subject_batch, Accelerator(cpu=True))
    adapters.start(options, components, {"unet": lambda: run(pipe)}, cache, 0, losses, unquantized=unquantized)
    return components


def disturb(components):
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for parameter in trained_parameters(components):
            parameter.add_(0.5 * torch.randn(parameter.shape, generator=generator))


def test_only_linear_layers_are_stored_in_4_bits():
    pipe, plain = quantized(), tiny_pipeline()
    for name, layer in plain.unet.named_modules():
        other = pipe.unet.get_submodule(name)
        if isinstance(layer, nn.Linear):
            assert other.weight.numel() * other.weight.element_size() * 2 == layer.weight.numel()
            distance = (dequantize_module_weight(other) - layer.weight).norm() / layer.weight.norm()
            assert 0 < distance < 0.15
        elif isinstance(layer, nn.Conv2d):
            assert torch.equal(other.weight, layer.weight)


def test_the_model_computes_with_the_dequantised_weights():
    torch.testing.assert_close(image(quantized()), image(rounded()))


def test_generation_and_training_do_not_change_the_weights():
    pipe = quantized()
    before = {name: value.clone() for name, value in pipe.unet.state_dict().items()}
    image(pipe)
    after = pipe.unet.state_dict()
    assert all(torch.equal(value, after[name]) for name, value in before.items())


def test_calibration_gives_the_statistics_of_the_dequantised_weights():
    pipe, plain = quantized(), rounded()
    ours, theirs = (calibrate(p.unet, lambda p=p: run(p), [*LINEAR, *CONVOLUTIONS]) for p in (pipe, plain))
    assert set(ours) == set(theirs)
    for name, scale in ours.items():
        torch.testing.assert_close(scale, theirs[name], rtol=1e-4, atol=1e-5)


def test_the_outer_factors_are_those_of_the_dequantised_weights(tmp_path):
    pipes = {name: make() for name, make in (("quantized", quantized), ("rounded", rounded))}
    products = {}
    for name, pipe in pipes.items():
        components = adapted(pipe, "nora", tmp_path / name)
        layers = {key: layer for key, layer in components["unet"].named_modules() if isinstance(layer, NoraLayer)}
        products[name] = {key: layer.nora_B["default"] @ layer.nora_A["default"] for key, layer in layers.items()}
    for key, product in products["quantized"].items():
        assert product.dtype == torch.float32
        torch.testing.assert_close(product, products["rounded"][key], rtol=1e-2, atol=1e-3)


@dataclass
class Trained:
    """An adapter of one method on a model in 4 bits.

    Args:
        base: the image that the model makes without the adapter.
        fresh: the image that it makes with the adapter when that was just started.
        parameters: those to be trained, with gradients.
        folder: of the adapter's files in every form, after its parameters were disturbed.
        image: the image that the saved adapter makes.
    """

    method: str
    base: torch.Tensor
    fresh: torch.Tensor
    parameters: list[nn.Parameter]
    folder: Path
    image: torch.Tensor


@pytest.fixture(scope="module", params=METHODS)
def trained(request, tmp_path_factory):
    folder = tmp_path_factory.mktemp("trained")
    pipe = quantized(folder / "unquantized")
    base = image(pipe)
    components = adapted(pipe, request.param, folder / "cache", folder / "unquantized")
    fresh = image(pipe)
    disturb(components)
    conditions = {"text_embeds": torch.ones(1, 24), "time_ids": torch.ones(1, 6)}
    answer = pipe.unet(torch.ones(1, 4, 8, 8), torch.tensor([5]), torch.ones(1, 3, 40), added_cond_kwargs=conditions).sample
    answer.square().mean().backward()
    adapters.save_everywhere(pipe, components, folder, "subject")
    return Trained(request.param, base, fresh, trained_parameters(components), folder, image(pipe))


def test_a_new_adapter_starts_at_the_base_model_if_its_method_does_and_gets_gradients(trained):
    assert torch.allclose(trained.fresh, trained.base, atol=1e-5) == method_named(trained.method).starts_at_base
    assert trained.parameters
    assert all(parameter.dtype == torch.float32 and parameter.grad.any() for parameter in trained.parameters)


# The file for diffusers holds the same factors as that of kohya.
@pytest.mark.parametrize("file", ["adapter/full", "kohya/subject.safetensors"])
def test_an_adapter_trained_in_4_bits_loads_onto_the_full_precision_model(trained, file):
    is_exact = method_named(trained.method).exports_exactly
    if not is_exact and not file.startswith("adapter"):
        pytest.skip("the exported file is an approximation")
    plain = rounded()
    adapters.load_adapter(plain, trained.folder / file, "loaded")
    plain.set_adapters("loaded")
    torch.testing.assert_close(image(plain), trained.image, atol=1 / 255, rtol=0)
    assert (trained.base - trained.image).abs().max() > 1 / 255
    plain.fuse_lora()
    plain.unload_lora_weights()
    if is_exact:
        torch.testing.assert_close(image(plain), trained.image, atol=1 / 255, rtol=0)


def test_a_model_loads_in_4_bits(tiny_model):
    pipe = load_base_model(str(tiny_model), quantize="nf4")
    for component in QUANTIZED_COMPONENTS:
        model = getattr(pipe, component)
        assert not any(type(layer) is nn.Linear for layer in model.modules())
        assert any(isinstance(layer, Linear4bit) for layer in model.modules())
        assert not any(parameter.requires_grad for parameter in model.parameters())
    torch.testing.assert_close(image(pipe), image(rounded()))


def test_another_kind_is_refused(pipe):
    with pytest.raises(InputError, match=r"quantize must be one of nf4, got 'int3'"):
        quantize_linear_layers(pipe.unet, "int3", torch.float32)


def test_without_bitsandbytes_the_error_has_the_command_that_installs_it(pipe, monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(InputError, match=r"--quantize nf4 needs the package bitsandbytes.*pip install bitsandbytes"):
        quantize_linear_layers(pipe.unet, "nf4", torch.float32)


def test_the_scales_are_quantised_too_and_products_are_computed_in_the_given_dtype():
    for component in QUANTIZED_COMPONENTS:
        for layer in getattr(quantized(), component).modules():
            if isinstance(layer, Linear4bit):
                state = layer.weight.quant_state
                assert (state.quant_type, state.nested, state.blocksize, state.absmax.dtype) == ("nf4", True, 64, torch.uint8)
                assert layer.compute_dtype == torch.float32


def test_products_are_computed_in_bfloat16_on_gpus_and_in_the_models_dtype_on_cpus():
    assert compute_dtype(torch.float16, "cuda") == compute_dtype(torch.float32, "cuda:1") == torch.bfloat16
    assert [compute_dtype(dtype, "cpu") for dtype in (torch.float32, torch.bfloat16)] == [torch.float32, torch.bfloat16]


def test_a_product_in_bfloat16_is_that_of_weights_and_inputs_rounded_to_it():
    layer, x = nn.Sequential(nn.Linear(64, 32)), torch.randn(5, 64)
    quantize_linear_layers(layer, "nf4", torch.bfloat16)
    weight = dequantize_module_weight(layer[0]).bfloat16().float()
    expected = x.bfloat16().float() @ weight.T + layer[0].bias.float()
    result = layer(x)
    assert result.dtype == torch.float32
    torch.testing.assert_close(result, expected, rtol=1e-2, atol=1e-2)
    assert not torch.equal(result, x @ dequantize_module_weight(layer[0]).float().T + layer[0].bias)


def test_the_relative_error_of_each_component_is_measured_and_told():
    errors, plain, rounded_pipe = quantization_errors(quantized()), tiny_pipeline(), rounded()
    assert list(errors) == list(QUANTIZED_COMPONENTS)
    for component, error in errors.items():
        layers = {name: layer for name, layer in getattr(plain, component).named_modules() if type(layer) is nn.Linear}
        others = getattr(rounded_pipe, component)
        lost = sum((layer.weight - others.get_submodule(name).weight).square().sum() for name, layer in layers.items())
        assert error == pytest.approx(
            (lost / sum(layer.weight.square().sum() for layer in layers.values())).sqrt().item(), rel=1e-4
        )
        assert f"{component} {error:.1%}" in summary("nf4", torch.bfloat16, errors)
    assert quantization_errors(plain) == {}


def test_a_weight_is_released_before_the_next_is_quantised(tmp_path, monkeypatch):
    model = nn.Sequential(*(nn.Linear(64, 64) for _ in range(4)))
    expected, weights = [layer.weight.detach().clone() for layer in model], [weakref.ref(layer.weight) for layer in model]
    alive = []
    write = quantization._write_weight

    def write_and_count(folder, name, weight):
        alive.append(sum(reference() is not None for reference in weights))
        write(folder, name, weight)

    monkeypatch.setattr(quantization, "_write_weight", write_and_count)
    quantize_linear_layers(model, "nf4", torch.float32, tmp_path)
    assert alive == [4, 3, 2, 1]
    assert all(reference() is None for reference in weights)
    stored = CheckpointWeights(tmp_path)
    assert all(torch.equal(stored(str(index)), weight) for index, weight in enumerate(expected))


def test_a_model_without_linear_layers_is_refused():
    with pytest.raises(InputError, match=r"Conv2d has no linear layers to quantise. Leave out --quantize nf4"):
        quantize_linear_layers(nn.Conv2d(1, 1, 1), "nf4", torch.float32)


def test_both_text_encoders_are_adapted_in_4_bits(tmp_path):
    folder = tmp_path / "unquantized"
    pipe, plain = quantized(folder), tiny_pipeline()
    options = AdapterOptions(rank=4, inner_r=2, target_modules=LINEAR, train_text_encoder=True, loftq_start=True)
    components = adapters.attach(pipe, options)

    def run_base_model():
        with adapters.without_adapters(pipe):
            run(pipe)

    adapters.start(options, components, dict.fromkeys(components, run_base_model), tmp_path, 0, unquantized=folder)
    for name, model in components.items():
        layers = {base_name(key): layer for key, layer in model.named_modules() if isinstance(layer, NoraLayer)}
        assert layers
        for key, layer in layers.items():
            residual = getattr(plain, name).get_submodule(key).weight - dequantize_module_weight(layer.get_base_layer())
            scale = layer.nora_activation_scale["default"]
            scale = (scale / scale.mean()).clamp_min(1e-3)
            # The start is closer to the unquantised weight, in the norm of the activations.
            assert ((residual - layer.get_delta_weight("default")) * scale).norm() < (residual * scale).norm()


def test_lora_xs_has_the_singular_triples_of_the_unquantised_weights(tmp_path):
    pipe = quantized(tmp_path / "unquantized")
    components = adapted(pipe, "lora_xs", tmp_path, tmp_path / "unquantized")
    plain = tiny_pipeline().unet
    layers = {base_name(key): layer for key, layer in components["unet"].named_modules() if isinstance(layer, NoraLayer)}
    assert any(isinstance(layer.get_base_layer(), Linear4bit) for layer in layers.values())
    for name, layer in layers.items():
        U, S, Vh = torch.linalg.svd(plain.get_submodule(name).weight.detach().flatten(1), full_matrices=False)
        best = U[:, :4] * S[:4] @ Vh[:4]
        torch.testing.assert_close(layer.nora_B["default"] @ layer.nora_A["default"], best, atol=1e-5, rtol=1e-4)


def test_loftq_starts_at_the_best_approximation_of_the_residual(tmp_path):
    pipe = quantized(tmp_path / "unquantized")
    components = adapted(pipe, "loftq", tmp_path, tmp_path / "unquantized")
    plain, checked = tiny_pipeline().unet, 0
    for name, layer in tuner_layers(components["unet"]).items():
        change = layer.get_delta_weight("default")
        if not isinstance(layer.get_base_layer(), Linear4bit):
            assert not change.any()
            continue
        U, S, V = torch.linalg.svd(plain.get_submodule(name).weight - dequantize_module_weight(layer.get_base_layer()))
        torch.testing.assert_close(change, U[:, :4] * S[:4] @ V[:4], rtol=0, atol=1e-5)
        checked += 1
    assert checked


def test_loftq_without_quantisation_is_refused_with_the_flag_to_add(tmp_path):
    with pytest.raises(InputError, match=r"the base model is not quantised. Add --quantize nf4, or use --method lora"):
        adapted(tiny_pipeline(), "loftq", tmp_path)


@pytest.mark.parametrize("method", ["loftq", "nora"])
def test_a_start_that_needs_quantisation_is_refused_before_the_model_is_loaded(method):
    options = AdapterOptions(method=method, loftq_start=True)
    options.check_quantization("nf4")
    with pytest.raises(InputError, match=r"the base model is not quantised. Add --quantize nf4, or use another method or start"):
        options.check_quantization(None)


@pytest.mark.parametrize("fields", [{"preserve_output": True}, {"inner_form": "full"}, {"num_subspaces": 2}])
def test_a_start_at_the_residual_that_its_form_cannot_have_is_refused_with_the_options(fields):
    with pytest.raises(InputError, match="loftq_start needs inner_form serial and num_subspaces 1"):
        AdapterOptions(method="nora", loftq_start=True, **fields)


@pytest.mark.parametrize(("eight_bit", "name"), [(False, "PagedAdamW"), (True, "PagedAdamW8bit")])
def test_the_optimiser_is_paged_on_other_devices_than_cpus(eight_bit, name):
    def made(device):
        parameters = [nn.Parameter(torch.zeros(2, device=device))]
        return OptimizerSettings(eight_bit=eight_bit, paged=True).optimizer([{"params": parameters, "lr": 1e-3}])

    assert type(made("meta")) is getattr(bitsandbytes.optim, name)
    assert type(made("cpu")) is (bitsandbytes.optim.AdamW8bit if eight_bit else torch.optim.AdamW)


CLIP_TOWERS = (IMAGE, TEXT)


@pytest.fixture
def quantized_clip(tmp_path):
    clip = Clip(tiny_clip(), None, None, "tiny")
    return quantized_towers(clip, "nf4", tmp_path / "unquantized")


def test_both_towers_of_a_clip_are_quantised_with_the_projections_of_their_attention(quantized_clip):
    clip, plain = quantized_clip, tiny_clip()
    assert clip.base_sha256 == module_digest(plain)
    assert set(clip.quantization_errors) == set(CLIP_TOWERS)
    for name in CLIP_TOWERS:
        tower = encoder(clip, name)
        for layers in attention_layers(tower):
            assert all(isinstance(tower.get_submodule(layer), Linear4bit) for layer in layers.values())
        assert not any(type(layer) is nn.Linear for layer in tower.modules())
    with torch.no_grad():
        for module in clip.model.modules():
            if isinstance(module, Linear4bit):
                assert module.weight.quant_state.nested
        expected = dequantised(clip)
        torch.testing.assert_close(clip.encode_images(images(3)), expected.encode_images(images(3)))
        torch.testing.assert_close(clip.encode_texts(prompts(3, 5, 9)), expected.encode_texts(prompts(3, 5, 9)))
        torch.testing.assert_close(clip.model.encode_text(prompts(3, 5)), expected.model.encode_text(prompts(3, 5)))


def dequantised(clip):
    """The same model with the dequantised weights in full precision."""
    model = tiny_clip()
    separate(model)
    with torch.no_grad():
        for name, layer in clip.model.named_modules():
            if isinstance(layer, Linear4bit):
                model.get_submodule(base_name(name)).weight.copy_(dequantize_module_weight(layer))
    return Clip(model, None, None, "dequantised")


@pytest.mark.parametrize("method", ["nora", "lora", "loftq"])
def test_an_adapter_on_quantised_towers_starts_trains_and_loads_onto_full_precision(method, quantized_clip, tmp_path):
    clip, targets = quantized_clip, TargetLayers(encoders="both")
    components = fewshot_adapters.attach(clip, AdapterOptions(method=method, rank=4, inner_r=2), targets)
    pixels, folder = [images(3)], tmp_path / "unquantized"
    fewshot_adapters.start(clip, AdapterOptions(method=method, rank=4, inner_r=2), components, pixels, prompts(3, 5), tmp_path, 0,
                           unquantized=folder)  # fmt: skip
    (clip.encode_images(images(3)).sum() + clip.encode_texts(prompts(3, 5)).sum()).backward()
    trained = trained_parameters(components)
    assert trained
    assert all(parameter.grad is not None for parameter in trained)
    disturb(components)
    adapter_files.save(components, tmp_path / "adapter")
    loaded = dequantised(clip)
    fewshot_adapters.load(loaded, tmp_path / "adapter")
    with torch.no_grad():
        torch.testing.assert_close(loaded.encode_images(images(3)), clip.encode_images(images(3)), rtol=1e-4, atol=1e-4)
