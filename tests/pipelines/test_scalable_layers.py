"""Merging adapters of PEFT's tuners at a scale, and taking them out again."""

import copy

import pytest
import torch
from peft import HRAConfig, LoHaConfig, inject_adapter_in_model
from tiny_options import TINY
from torch import nn

from pipelines.adapter_method import trained_parameters, tuner_layers
from pipelines.adapter_options import AdapterOptions
from pipelines.methods import method_named, method_names
from pipelines.peft_method import PeftMethod
from pipelines.scalable_layers import ScalableLayer, make_scalable


@pytest.mark.parametrize("config", [LoHaConfig, HRAConfig])
def test_two_adapters_are_merged_at_their_scales_and_unmerged_again(config):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 5)).double()
    weight = model[0].weight.detach().clone()
    merged = {}
    for name in ("first", "second"):
        inject_adapter_in_model(config(r=2, target_modules=["0"]), model, name)
    for name, parameter in model.named_parameters():
        if "base_layer" not in name:
            nn.init.normal_(parameter, std=0.5)
    make_scalable(model)
    layer = model[0]
    for name in ("first", "second"):
        layer.merge(adapter_names=[name])
        merged[name] = layer.get_base_layer().weight.detach() - weight
        layer.unmerge()
        torch.testing.assert_close(layer.get_base_layer().weight, weight)
    layer.set_scale("first", 0.25)
    layer.merge(adapter_names=["first"])
    torch.testing.assert_close(layer.get_base_layer().weight, weight + 0.25 * merged["first"])
    layer.merge(adapter_names=["second"])
    assert layer.merged_adapters == ["first", "second"]
    if config is LoHaConfig:
        torch.testing.assert_close(layer.get_base_layer().weight, weight + 0.25 * merged["first"] + merged["second"])
    layer.unmerge()
    assert layer.merged_adapters == []
    torch.testing.assert_close(layer.get_base_layer().weight, weight)


def test_merging_what_is_merged_and_unmerging_what_is_not_change_nothing():
    model = nn.Sequential(nn.Linear(6, 5))
    inject_adapter_in_model(LoHaConfig(r=2, target_modules=["0"], init_weights=False), model)
    make_scalable(model)
    model[0].set_scale("default", 0.5)
    weight = model[0].get_base_layer().weight.detach().clone()
    with pytest.warns(UserWarning, match="Already unmerged"):
        model[0].unmerge()
    model[0].merge()
    once = model[0].get_base_layer().weight.detach().clone()
    assert not torch.equal(once, weight)
    model[0].merge()
    assert torch.equal(model[0].get_base_layer().weight, once)


@pytest.mark.parametrize("method", [m for m in method_names() if issubclass(method_named(m), PeftMethod)])
@torch.no_grad()
def test_a_model_in_bfloat16_runs_with_trained_values_in_float32_outside_of_autocast(method):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(16, 24))
    AdapterOptions(method, rank=4, **TINY).create().add(model, ["0"], torch.Generator().manual_seed(0))
    assert all(isinstance(layer, ScalableLayer) for layer in tuner_layers(model).values())
    for parameter in trained_parameters({"": model}):
        parameter.add_(0.1 * torch.randn(parameter.shape))
    half, x = copy.deepcopy(model).to(torch.bfloat16), torch.randn(5, 16).to(torch.bfloat16)
    for parameter, value in zip(trained_parameters({"": half}), trained_parameters({"": model}), strict=True):
        parameter.data = value.clone()
    expected, output = model(x.float()), half(x)
    assert output.dtype == torch.bfloat16
    assert (output - expected).norm() < 0.03 * expected.norm()
