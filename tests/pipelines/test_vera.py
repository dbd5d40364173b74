"""VeRA: its equation, its parameters, its random matrices from a key, and its files in PEFT."""

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file
from tiny_pipeline import image, tiny_pipeline

from nora_vision import AdapterFileError
from nora_vision.factors import low_rank_factors
from pipelines import adapter_files
from pipelines.adapter_method import ADAPTER_NAME, Probe, no_losses, trained_parameters
from pipelines.adapter_method import tuner_layers as vera_layers
from pipelines.adapter_options import AdapterOptions
from pipelines.errors import InputError
from pipelines.subject import adapters
from pipelines.subject.target_layers import CONVOLUTIONS, default_targets

RANK = 6


def adapted(pipe, folder, **changes):
    """VeRA on the UNet, with vectors that differ from the initial ones."""
    options = AdapterOptions("vera", rank=RANK, **changes)
    components = adapters.attach(pipe, options)
    for model in components.values():
        options.create().start(model, Probe(lambda: None, no_losses, torch.Generator().manual_seed(1), folder), ADAPTER_NAME)
    with torch.no_grad():
        for index, parameter in enumerate(trained_parameters(components)):
            parameter.add_(torch.randn(parameter.shape, generator=torch.Generator().manual_seed(index)))
    return components


def test_a_layer_adds_b_B_d_A_x_and_scales_it(pipe, tmp_path):
    layers = vera_layers(adapted(pipe, tmp_path)["unet"])
    for layer in layers.values():
        b, d = layer.vera_lambda_b[ADAPTER_NAME], layer.vera_lambda_d[ADAPTER_NAME]
        A, B = layer.vera_A[ADAPTER_NAME][:, : layer.in_features], layer.vera_B[ADAPTER_NAME][: layer.out_features]
        change = torch.diag(b) @ B @ torch.diag(d) @ A
        x = torch.randn(5, layer.in_features)
        base = layer.get_base_layer()(x)
        for scale in (1.0, 0.25):
            layer.set_scale(ADAPTER_NAME, scale)
            torch.testing.assert_close(layer(x), base + scale * x @ change.T, atol=1e-4, rtol=1e-4)
            before = layer.get_base_layer().weight.clone()
            layer.merge()
            torch.testing.assert_close(layer.get_base_layer().weight, before + scale * change, atol=1e-5, rtol=1e-4)
            layer.unmerge()
            torch.testing.assert_close(layer.get_base_layer().weight, before, atol=1e-5, rtol=1e-4)
        factors = low_rank_factors(layer, ADAPTER_NAME)
        torch.testing.assert_close(factors.up @ factors.down, change, atol=1e-5, rtol=1e-4)


def test_scale_layer_is_undone_by_unscale_layer(pipe, tmp_path):
    layer = next(iter(vera_layers(adapted(pipe, tmp_path)["unet"]).values()))
    x = torch.randn(3, layer.in_features)
    base, trained = layer.get_base_layer()(x), layer(x)
    layer.scale_layer(0.5)
    torch.testing.assert_close(layer(x), torch.lerp(base, trained, 0.5))
    layer.unscale_layer(0.5)
    torch.testing.assert_close(layer(x), trained)
    layer.set_scale("another", 0.1)
    torch.testing.assert_close(layer(x), trained)


def test_a_layer_has_out_features_plus_rank_trained_parameters(pipe, tmp_path):
    components = adapted(pipe, tmp_path, train_text_encoder=True)
    expected = sum(layer.out_features + RANK for model in components.values() for layer in vera_layers(model).values())
    assert sum(parameter.numel() for parameter in trained_parameters(components)) == expected
    assert {parameter.ndim for parameter in trained_parameters(components)} == {1}


def test_all_layers_share_one_pair_of_random_matrices_that_the_seed_chooses(pipe, tmp_path):
    layers = list(vera_layers(adapted(pipe, tmp_path)["unet"]).values())
    assert len({layer.vera_A[ADAPTER_NAME].data_ptr() for layer in layers}) == 1
    other = vera_layers(adapters.attach(tiny_pipeline(), AdapterOptions("vera", rank=RANK))["unet"])
    assert not torch.equal(layers[0].vera_A[ADAPTER_NAME], next(iter(other.values())).vera_A[ADAPTER_NAME])


def test_peft_loads_the_file_which_holds_only_the_vectors(pipe, tmp_path):
    adapter_files.save(adapted(pipe, tmp_path), tmp_path)
    tensors = load_file(tmp_path / "full" / "unet" / "adapter_model.safetensors")
    assert {name.rpartition(".")[2] for name in tensors} == {"vera_lambda_b", "vera_lambda_d"}
    expected, stock = image(pipe), tiny_pipeline()
    PeftModel.from_pretrained(stock.unet, str(tmp_path / "full" / "unet"))
    torch.testing.assert_close(image(stock), expected, atol=1 / 255, rtol=0)


def test_random_matrices_that_differ_from_those_in_training_are_refused(pipe, tmp_path, monkeypatch):
    adapter_files.save(adapted(pipe, tmp_path), tmp_path)
    monkeypatch.setattr("peft.tuners.vera.model._kaiming_init", lambda shape, generator: torch.ones(shape))
    with pytest.raises(AdapterFileError, match=r"the key \d+ gives other shared random matrices.*file exported for diffusers"):
        adapters.load_adapter(tiny_pipeline(), tmp_path / "full", "loaded")


def test_files_of_a_model_with_larger_layers_are_refused(pipe, tmp_path):
    adapter_files.save(adapted(pipe, tmp_path), tmp_path)
    other = tiny_pipeline()
    layer = other.unet.get_submodule(next(iter(vera_layers(pipe.unet))))
    layer.in_features += 100
    with pytest.raises(
        InputError, match=r"does not fit this model: the largest in_features and out_features .* were \d+ and \d+"
    ):
        adapters.load_adapter(other, tmp_path / "full", "loaded")


def test_convolutions_are_not_default_targets_and_are_refused():
    assert not set(CONVOLUTIONS) & set(default_targets("vera", built_in=True))
    for targets in (["conv1"], ["conv1", "to_q"]):
        with pytest.raises(InputError, match=r"does not fit unet: VeRA cannot adapt '.*conv1': it adapts nn.Linear only"):
            adapters.attach(tiny_pipeline(), AdapterOptions("vera", target_modules=targets))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"rank": 0}, r"rank must be at least 1, got 0"),
        ({"dropout": 1.0}, r"dropout must be in \[0, 1\), got 1.0"),
        ({"d_initial": 0.0}, r"d_initial must not be 0.*PEFT's default is 0.1"),
    ],
)
def test_wrong_options_are_refused(changes, message):
    with pytest.raises(InputError, match=message):
        AdapterOptions("vera", **changes)
