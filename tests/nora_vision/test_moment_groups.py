"""Calibration in groups of layers gives what one pass over all layers gives."""

import pytest
import torch
from peft import inject_adapter_in_model
from small_models import change_weights, config_for, mlp

from nora_vision import calibrate, initialize_nora_weights
from nora_vision.layer import nora_layers
from nora_vision.moment_groups import StoredMoments, calibrate_in_groups
from nora_vision.weighting import MOMENTS


def adapted(weighting):
    """A small model with an adapter that changes its outputs, and a function that runs it and counts its calls."""
    torch.manual_seed(0)
    model, inputs, targets = mlp()
    inject_adapter_in_model(config_for(targets, init_weights=True, outer_init="svd", weighting=weighting), model)
    change_weights(model)
    calls = []
    return model, lambda: calls.append(model(*inputs)), calls


@pytest.mark.parametrize("weighting", ["covariance", "diagonal_low_rank", "huber"])
def test_groups_have_the_moments_and_factors_of_one_pass_and_are_not_calibrated_again(weighting, tmp_path):
    model, run, calls = adapted(weighting)
    layers, path = nora_layers(model), tmp_path / "unet.safetensors"
    expected = calibrate(model, run, weighting=weighting)
    calls.clear()
    grouped = calibrate_in_groups(model, run, path, weighting=weighting, group_bytes=1)
    assert len(calls) == len(layers) > 1
    assert {file.name for file in tmp_path.iterdir()} == {f"unet-{number + 1}.safetensors" for number in range(len(layers))}
    assert isinstance(grouped.moments, StoredMoments)
    assert grouped.kind == MOMENTS[weighting]
    for name in expected:
        assert torch.equal(grouped[name], expected[name])
        assert torch.equal(grouped.moments[name], expected.moments[name])
        assert list(grouped.moments._group) == [name]
    factors = []
    for statistics in (expected, calibrate_in_groups(model, run, path, weighting=weighting, group_bytes=1)):
        initialize_nora_weights(model, statistics, generator=torch.Generator().manual_seed(0))
        factors.append([(layer.nora_B["default"].clone(), layer.nora_A["default"].clone()) for layer in layers.values()])
    assert len(calls) == len(layers)
    assert all(torch.equal(a, b) for one, two in zip(*factors, strict=True) for a, b in zip(one, two, strict=True))


def test_moments_within_the_limit_are_of_one_pass_and_stay_in_memory(tmp_path):
    model, run, calls = adapted("covariance")
    size = sum(8 * layer.in_features**2 for layer in nora_layers(model).values())
    statistics = calibrate_in_groups(model, run, tmp_path / "unet.safetensors", weighting="covariance", group_bytes=size)
    assert len(calls) == 1
    assert not list(tmp_path.iterdir())
    assert isinstance(statistics.moments, dict)
    calibrate_in_groups(model, run, tmp_path / "unet.safetensors", weighting="covariance", group_bytes=size - 1)
    assert len(calls) == 1 + 2


def test_a_group_of_other_layers_is_calibrated_again(tmp_path):
    model, run, calls = adapted("covariance")
    first, *_ = nora_layers(model)
    calibrate(model, run, weighting="covariance", layers=[first]).save(tmp_path / "unet-2.safetensors")
    calibrate_in_groups(model, run, tmp_path / "unet.safetensors", weighting="covariance", group_bytes=1)
    assert len(calls) == 1 + len(nora_layers(model))
