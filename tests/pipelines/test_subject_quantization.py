"""A base model in 4 bits and adapters on it; the dequantised weights are the oracle."""

import pytest
import torch
from bitsandbytes.nn import Linear4bit
from peft.utils.integrations import dequantize_module_weight
from tiny_options import TINY
from tiny_pipeline import image, tiny_pipeline
from torch import nn

from nora_vision import NoraLayer, calibrate
from pipelines.adapter_method import trained_parameters
from pipelines.adapter_options import AdapterOptions
from pipelines.errors import InputError
from pipelines.methods import method_named, method_names
from pipelines.subject import adapters
from pipelines.subject.base_model import load_base_model
from pipelines.subject.quantization import quantize_linear_layers

LINEAR, CONVOLUTIONS = ["to_q", "to_v"], ["conv1"]
METHODS = [name for name in method_names() if method_named(name).adapts_quantized_layers]


def quantized():
    pipe = tiny_pipeline()
    quantize_linear_layers(pipe.unet, "nf4", torch.float32)
    return pipe


def rounded():
    """The full-precision pipeline with the dequantised weights."""
    pipe, source = tiny_pipeline(), quantized()
    with torch.no_grad():
        for name, layer in source.unet.named_modules():
            if isinstance(layer, Linear4bit):
                pipe.unet.get_submodule(name).weight.copy_(dequantize_module_weight(layer))
    return pipe


def run(pipe):
    """The function that calibration runs."""
    image(pipe)


def adapted(pipe, method, cache):
    targets = [*LINEAR, *(CONVOLUTIONS if method_named(method).adapts_convolutions else [])]
    options = AdapterOptions(method=method, rank=4, inner_r=2, **TINY, target_modules=targets)
    components = adapters.attach(pipe, options)
    adapters.start(options, components, {"unet": lambda: run(pipe)}, cache, 0)
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


@pytest.mark.parametrize("method", METHODS)
def test_a_new_adapter_starts_at_the_base_model_if_its_method_does_and_gets_gradients(method, tmp_path):
    pipe = quantized()
    before = image(pipe)
    components = adapted(pipe, method, tmp_path)
    assert torch.allclose(image(pipe), before, atol=1e-5) == method_named(method).starts_at_base
    disturb(components)
    conditions = {"text_embeds": torch.ones(1, 24), "time_ids": torch.ones(1, 6)}
    answer = pipe.unet(torch.ones(1, 4, 8, 8), torch.tensor([5]), torch.ones(1, 3, 40), added_cond_kwargs=conditions).sample
    answer.square().mean().backward()
    trained = trained_parameters(components)
    assert trained
    assert all(parameter.dtype == torch.float32 and parameter.grad.any() for parameter in trained)


@pytest.fixture(scope="module", params=METHODS)
def trained(request, tmp_path_factory):
    """A method, the folder of its adapter in every form, and the image that the adapter makes on a model in 4 bits."""
    folder, pipe = tmp_path_factory.mktemp("trained"), quantized()
    components = adapted(pipe, request.param, folder / "cache")
    disturb(components)
    adapters.save_everywhere(pipe, components, folder, "subject")
    return request.param, folder, image(pipe)


@pytest.mark.parametrize("file", ["adapter/full", "diffusers/pytorch_lora_weights.safetensors", "kohya/subject.safetensors"])
def test_an_adapter_trained_in_4_bits_loads_onto_the_full_precision_model(trained, file):
    method, folder, expected = trained
    if not method_named(method).exports_exactly and not file.startswith("adapter"):
        pytest.skip("the exported file is an approximation")
    plain = rounded()
    untouched = image(plain)
    adapters.load_adapter(plain, folder / file, "loaded")
    plain.set_adapters("loaded")
    torch.testing.assert_close(image(plain), expected, atol=1 / 255, rtol=0)
    assert (untouched - expected).abs().max() > 1 / 255
    plain.fuse_lora()
    plain.unload_lora_weights()
    if method_named(method).exports_exactly:
        torch.testing.assert_close(image(plain), expected, atol=1 / 255, rtol=0)


def test_a_model_loads_in_4_bits(tiny_model):
    pipe = load_base_model(str(tiny_model), quantize="nf4")
    assert any(isinstance(layer, Linear4bit) for layer in pipe.unet.modules())
    assert not any(parameter.requires_grad for parameter in pipe.unet.parameters())
    torch.testing.assert_close(image(pipe), image(rounded()))


def test_another_kind_is_refused(pipe):
    with pytest.raises(InputError, match=r"quantize must be one of nf4, got 'int3'"):
        quantize_linear_layers(pipe.unet, "int3", torch.float32)


def test_without_bitsandbytes_the_error_has_the_command_that_installs_it(pipe, monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(InputError, match=r"--quantize nf4 needs the package bitsandbytes.*pip install bitsandbytes"):
        quantize_linear_layers(pipe.unet, "nf4", torch.float32)
