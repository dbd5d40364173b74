"""Weighted sums of adapters, through PEFT's `add_weighted_adapter`: the change of the sum is the sum of the changes."""

import warnings

import pytest
import torch
from peft import PeftModel, get_peft_model
from small_models import MODELS, change_weights, config_for, output

from nora_vision import AdapterFileError, load_adapter, save_adapter
from nora_vision.layer import nora_layers

EXACT = {"rtol": 1e-5, "atol": 1e-6}
# Smaller than the layers, with different ranks and preserve_output.
OPTIONS = {"a": {"r": 4, "inner_r": 2}, "b": {"r": 3, "inner_r": 3, "alpha": 1.5, "preserve_output": True}}


@pytest.fixture(params=MODELS)
def kind(request):
    return request.param


def with_adapters(kind="linear", dtype=torch.float32, **of_each):
    """A PEFT model with one trained adapter for each set of options, and its inputs."""
    model, inputs, targets = MODELS[kind]()
    model = model.to(dtype)
    for seed, (name, options) in enumerate((of_each or OPTIONS).items()):
        config = config_for(**({"targets": targets} | options))
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            if seed:
                model.add_adapter(name, config)
            else:
                model = get_peft_model(model, config, name)
        model.set_adapter(name)
        change_weights(model, seed)
    return model.eval(), inputs


def changes(model, name):
    """The adapter's weight changes, by layer."""
    layers = nora_layers(model).items()
    return {layer: module.get_delta_weight(name).detach() for layer, module in layers if name in module.r}


def weighted(model, weights):
    """sum_i w_i D_i of the weight changes D_i, by layer."""
    total = {}
    for name, weight in weights.items():
        for layer, change in changes(model, name).items():
            total[layer] = total.get(layer, 0) + weight * change
    return total


def assert_is_sum(model, name, weights, **tolerance):
    expected, combined = weighted(model, weights), changes(model, name)
    assert combined.keys() == expected.keys()
    for layer, change in combined.items():
        torch.testing.assert_close(
            change, expected[layer], **(tolerance or EXACT), msg=lambda text, layer=layer: f"{layer}: {text}"
        )


@pytest.mark.parametrize("combination_type", ["linear", "svd", "cat"])
@pytest.mark.parametrize("weights", [{"a": 0.5, "b": 0.5}, {"b": -1.5, "a": 2.0}, {"a": 0.7}, {"b": 1.0, "a": 0}], ids=str)
def test_the_change_of_a_combination_is_the_weighted_sum_of_the_changes(kind, combination_type, weights):
    model, inputs = with_adapters(kind)
    model.add_weighted_adapter(list(weights), list(weights.values()), "sum", combination_type)
    assert_is_sum(model, "sum", weights)
    for name, weight in weights.items():
        for layer in nora_layers(model).values():
            layer.set_scale(name, weight)
    model.base_model.set_adapter(list(weights))
    expected = output(model, inputs)
    model.set_adapter("sum")
    torch.testing.assert_close(output(model, inputs), expected, rtol=1e-4, atol=1e-4)


def test_equal_outer_factors_are_shared_and_the_sum_is_compact(kind, tmp_path):
    start = {"r": 4, "inner_r": 3, "init_weights": True}
    model, _ = with_adapters(kind, a=start, b=start | {"inner_r": 2})
    model.add_weighted_adapter(["a", "b"], [0.3, -0.6], "sum")
    assert_is_sum(model, "sum", {"a": 0.3, "b": -0.6})
    for layer in nora_layers(model).values():
        assert (layer.r["sum"], layer.inner_r["sum"]) == (4, 4)
        assert torch.equal(layer.nora_A["sum"], layer.nora_A["a"])
    fresh, _, _ = MODELS[kind]()
    load_adapter(fresh, save_adapter(model, tmp_path, "sum", compact=True), "x")
    loaded = changes(fresh, "x")
    for name, change in changes(model.base_model.model, "sum").items():
        torch.testing.assert_close(loaded[name], change, **EXACT)


@pytest.mark.parametrize("reader", ["PEFT", "load_adapter"])
def test_a_combination_is_saved_and_loaded_again(kind, tmp_path, reader):
    model, inputs = with_adapters(kind)
    model.add_weighted_adapter(["a", "b"], [1.2, -0.4], "sum")
    model.set_adapter("sum")
    fresh, _, _ = MODELS[kind]()
    if reader == "PEFT":
        model.save_pretrained(tmp_path, selected_adapters=["sum"])
        fresh = PeftModel.from_pretrained(fresh, tmp_path / "sum")
    else:
        load_adapter(fresh, save_adapter(model, tmp_path, "sum"))
    torch.testing.assert_close(output(fresh, inputs), output(model, inputs), rtol=0, atol=0)


def test_a_combination_of_other_outer_factors_is_refused_as_a_compact_file(tmp_path):
    model, _ = with_adapters()
    model.add_weighted_adapter(["a", "b"], [1, 1], "sum")
    with pytest.raises(AdapterFileError, match=r"recomputed from the base weights .* combination .*use the full adapter"):
        save_adapter(model, tmp_path / "out", "sum", compact=True)
    assert not (tmp_path / "out").exists()


def test_ranks_above_a_layers_width_are_reduced_and_the_sum_stays_exact(kind):
    wide = {"r": 12, "inner_r": 5}
    model, _ = with_adapters(kind, a=wide, b=wide, c=wide | {"inner_r": 7})
    weights = {"a": 1.0, "b": -0.5, "c": 0.25}
    model.add_weighted_adapter(list(weights), list(weights.values()), "sum")
    assert_is_sum(model, "sum", weights, rtol=1e-4, atol=1e-5)
    widths = [min(layer.out_features, layer.in_features) for layer in nora_layers(model).values()]
    assert [layer.r["sum"] for layer in nora_layers(model).values()] == [
        36 if width >= 36 else min(17, width) for width in widths
    ]


def test_svd_rank_gives_the_best_approximation_of_that_rank():
    model, _ = with_adapters()
    weights = {"a": 1.0, "b": -2.0}
    model.add_weighted_adapter(list(weights), list(weights.values()), "sum", svd_rank=2)
    for layer, change in weighted(model, weights).items():
        U, S, Vh = torch.linalg.svd(change)
        torch.testing.assert_close(changes(model, "sum")[layer], U[:, :2] * S[:2] @ Vh[:2], rtol=1e-4, atol=1e-5)
    assert model.peft_config["sum"].inner_r == 2


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_sums_keep_the_exact_outer_factors(dtype):
    model, _ = with_adapters("conv2d", dtype)
    model.add_weighted_adapter(["a", "b"], [0.5, -1], "sum")
    for layer in nora_layers(model).values():
        assert torch.equal(layer.nora_A["sum"], torch.cat([layer.nora_A["a"], layer.nora_A["b"]]))
        assert torch.equal(layer.nora_B["sum"], torch.cat([layer.nora_B["a"], layer.nora_B["b"]], dim=1))
        assert layer.nora_inner_A["sum"].dtype == torch.float32
    assert_is_sum(model, "sum", {"a": 0.5, "b": -1})


def test_adapters_of_other_layers_and_of_ranks_by_layer_are_summed(tmp_path):
    patterns = {"rank_pattern": {"second": 6}, "inner_rank_pattern": {"second": 1}}
    model, _ = with_adapters(
        a={"targets": ["first"]}, b={"r": 5, "inner_r": 2, **patterns}, c={"targets": ["head"], "r": 3, "inner_r": 1}
    )
    weights = {"c": 2.0, "a": 0.5, "b": -1.0}
    model.add_weighted_adapter(list(weights), list(weights.values()), "sum")
    assert_is_sum(model, "sum", weights)
    fresh, _, _ = MODELS["linear"]()
    load_adapter(fresh, save_adapter(model, tmp_path, "sum"), "x")
    assert changes(fresh, "x").keys() == changes(model.base_model.model, "sum").keys() == {"first", "second", "head"}


def test_a_combination_changes_nothing_else():
    model, inputs = with_adapters()
    model.base_model.set_adapter("a")
    expected, rng = output(model, inputs), torch.get_rng_state()
    training = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    model.add_weighted_adapter(["a", "b"], [1, 1], "sum")
    assert torch.equal(output(model, inputs), expected)
    assert torch.equal(torch.get_rng_state(), rng)
    assert {name for name, parameter in model.named_parameters() if parameter.requires_grad} == training
    assert model.active_adapters == ["a"]


def test_the_current_scaling_of_an_adapter_is_used():
    model, _ = with_adapters()
    for layer in nora_layers(model).values():
        layer.set_scale("a", 0.25)
    model.add_weighted_adapter(["a", "b"], [2, 1], "sum")
    assert_is_sum(model, "sum", {"a": 2, "b": 1})


REFUSED = {
    "a type that drops entries": ({"combination_type": "ties"}, r"must be one of \('linear', 'svd', 'cat'\) .* got 'ties'"),
    "random pruning": ({"combination_type": "dare_linear_svd", "density": 0.5}, "got 'dare_linear_svd'"),
    "an unknown type": ({"combination_type": "mean"}, "got 'mean'"),
    "clamping": ({"svd_clamp": 0.9}, r"does not support \{'svd_clamp': 0.9\}"),
    "a rank of no type": ({"combination_type": "cat", "svd_rank": 4}, "svd_rank .* needs combination_type='svd', got 4"),
    "no rank": ({"svd_rank": 0}, "svd_rank must be at least 1"),
    "an unknown adapter": ({"adapters": ["a", "x"]}, r"Adapter 'x' does not exist; there are \['a', 'b'\]"),
    "too few weights": ({"weights": [1.0]}, "one weight for each, got 2 and 1"),
    "no adapter": ({"adapters": [], "weights": []}, "at least one adapter"),
    "a weight that is no number": ({"weights": [1.0, float("nan")]}, "weight of adapter 'b' must be a finite number, got nan"),
    "a name in use": ({"adapter_name": "b"}, "must be a new name without a dot, got 'b'"),
    "a name with a dot": ({"adapter_name": "a.b"}, "must be a new name without a dot, got 'a.b'"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_is_not_supported_is_refused_and_changes_nothing(case):
    changed, message = REFUSED[case]
    model, _ = with_adapters()
    names = list(model.state_dict())
    with pytest.raises(ValueError, match=message):
        model.add_weighted_adapter(**({"adapters": ["a", "b"], "weights": [1.0, 1.0], "adapter_name": "sum"} | changed))
    assert list(model.peft_config) == ["a", "b"]
    assert list(model.state_dict()) == names


def test_modules_to_save_and_adapters_without_outer_factors_are_refused():
    model, _ = with_adapters(a={}, b={"modules_to_save": ["head"]}, c={"init_weights": True, "outer_init": "awsvd"})
    with pytest.raises(
        ValueError, match=r"'b' has modules that are trained in full, \['head'\].* does not support modules_to_save"
    ):
        model.add_weighted_adapter(["a", "b"], [1, 1], "sum")
    with pytest.raises(ValueError, match="outer factors of NoRA adapter 'c' are not set"):
        model.add_weighted_adapter(["a", "c"], [1, 1], "sum")
    assert list(model.peft_config) == ["a", "b", "c"]
