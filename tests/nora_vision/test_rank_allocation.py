"""Ranks under one budget: the sums, the water level and the gains are checked against their definitions."""

import pytest
import torch
from peft import inject_adapter_in_model
from small_models import config_for, mlp

from nora_vision import calibrate, initialize_nora_weights
from nora_vision.layer import nora_layers
from nora_vision.rank_allocation import core_energies, inner_ranks, num_parameters, outer_ranks, set_ranks, weighted_energies

LAYERS = {"flat": 12, "steep": 12, "small": 5, "strong": 9}


def spectra(seed=0):
    """Squared singular values by layer: flat, quickly falling, few, and a hundred times as large."""
    generator = torch.Generator().manual_seed(seed)
    values = {
        name: torch.rand(count, generator=generator).double().sort(descending=True).values for name, count in LAYERS.items()
    }
    return values | {"steep": 0.4 ** torch.arange(12).double(), "strong": 100 * values["strong"]}


def gradients(seed=1):
    generator = torch.Generator().manual_seed(seed)
    return {name: torch.rand(count, generator=generator).double().sort(descending=True).values for name, count in LAYERS.items()}


def allocated(budget, gradients_of=gradients(), inner_r=3):  # noqa: B008 - the same tensors for all tests
    outer = outer_ranks(spectra(), inner_r, budget)
    return outer, inner_ranks(outer, gradients_of, spectra(), budget)


BUDGETS = (8, 9, 10, 17, 40, 100, 101, 150, 237, 400, 2 * (144 + 144 + 25 + 81), 10**6)


@pytest.mark.parametrize("budget", BUDGETS)
def test_the_parameters_are_at_most_the_budget_and_no_direction_of_any_layer_fits_into_the_rest(budget):
    _, ranks = allocated(budget)
    left = budget - num_parameters(ranks)
    assert left >= 0
    steps = [2 * inner_r for name, (r, inner_r) in ranks.items() if r < LAYERS[name]]
    steps += [2 * r for r, inner_r in ranks.values() if inner_r < r]
    assert left < min(steps, default=float("inf"))
    assert all(1 <= inner_r <= r <= LAYERS[name] for name, (r, inner_r) in ranks.items())


@pytest.mark.parametrize("budget", BUDGETS)
def test_outer_ranks_are_the_smallest_that_retain_one_share_of_the_energy_in_all_layers(budget):
    outer, energies = outer_ranks(spectra(), 3, budget), spectra()
    retained = {name: energies[name][:r].sum() / energies[name].sum() for name, r in outer.items()}
    without_last = {name: energies[name][: r - 1].sum() / energies[name].sum() for name, r in outer.items()}
    # A share between these two exists: every layer needs its last direction for it, and none needs another one.
    assert max(without_last.values()) <= min(retained.values())
    assert num_parameters({name: (r, min(r, 3)) for name, r in outer.items()}) <= budget


def test_a_larger_scale_of_a_weight_gets_no_more_directions():
    scaled = spectra() | {"flat": 1e6 * spectra()["flat"]}
    assert outer_ranks(scaled, 3, 200) == outer_ranks(spectra(), 3, 200)


def test_inner_ranks_follow_the_gain_of_squared_gradient_for_each_parameter():
    outer, ranks = allocated(120)
    raised = {name for name in outer if ranks[name][0] > outer[name]}
    gains = {name: (gradients()[name] / outer[name]).tolist() for name in set(outer) - raised}
    taken = min(gains[name][ranks[name][1] - 1] for name in gains if ranks[name][1] > 1)
    # A direction that gains more than one that was taken was left out only because it did not fit.
    left = 120 - num_parameters(ranks)
    for name in gains:
        r, inner_r = ranks[name]
        assert inner_r == r or gains[name][inner_r] <= taken or 2 * r > left
    name = next(name for name in outer if ranks[name][1] < outer[name])
    strong = gradients() | {name: 1e6 * gradients()[name]}
    assert allocated(120, strong)[1][name][1] > ranks[name][1]


def test_more_budget_never_lowers_an_outer_rank_of_the_first_step():
    previous = outer_ranks(spectra(), 3, 8)
    for budget in range(9, 300):
        now = outer_ranks(spectra(), 3, budget)
        assert all(now[name] >= previous[name] for name in now)
        previous = now


def test_a_budget_below_rank_one_is_refused_with_the_least_budget():
    with pytest.raises(ValueError, match="parameter_budget must be at least 8, for rank 1 in each of 4 layers, got 7"):
        outer_ranks(spectra(), 3, 7)


def test_layers_without_energy_get_rank_one():
    ranks = outer_ranks(spectra() | {"flat": torch.zeros(12).double()}, 3, 100)
    assert ranks["flat"] == 1


# On models


@pytest.mark.parametrize("weighting", ["none", "diagonal", "covariance"])
def test_the_energies_are_the_squared_singular_values_of_the_weighted_weights(weighting):
    model, (x,), targets = mlp()
    inject_adapter_in_model(config_for(targets, outer_init="awsvd", init_weights=True, weighting=weighting), model)
    statistics = None if weighting == "none" else calibrate(model, lambda: model(x), weighting=weighting)
    for name, values in weighted_energies(model, "default", statistics):
        weight = model.get_submodule(name).base_layer.weight.double()
        weighted = weight if statistics is None else statistics.root(name, weighting).weigh(weight)
        torch.testing.assert_close(values, torch.linalg.svdvals(weighted).square(), atol=1e-9, rtol=1e-6)


def test_the_core_energies_are_those_of_the_gradient_that_autograd_gives_the_core():
    model, (x,), targets = mlp()
    inject_adapter_in_model(config_for(targets, r=4, inner_r=4, alpha=4.0, inner_form="full", init_weights=True), model)
    weights = {name: layer.get_base_layer().weight for name, layer in nora_layers(model).items()}
    for weight in weights.values():
        weight.requires_grad_(True)
    model(x).square().sum().backward()
    found = dict(core_energies(model, "default", ((name, weight.grad) for name, weight in weights.items())))
    for name, layer in nora_layers(model).items():
        (core,) = (p for n, p in layer.named_parameters() if "inner" in n)
        torch.testing.assert_close(found[name].float(), torch.linalg.svdvals(core.grad.view(4, 4)).square(), atol=1e-6, rtol=1e-3)


def test_layers_get_their_ranks_and_the_configuration_says_them_again():
    model, (x,), targets = mlp()
    inject_adapter_in_model(config_for(targets, outer_init="awsvd", init_weights=True), model)
    state = torch.random.get_rng_state()
    set_ranks(model, "default", {"first": (5, 2), "second": (12, 12)})
    assert torch.equal(torch.random.get_rng_state(), state)
    initialize_nora_weights(model, calibrate(model, lambda: model(x)))
    config = model.peft_config["default"]
    for name, layer in nora_layers(model).items():
        assert config.ranks_for(name) == (layer.r["default"], layer.inner_r["default"])
        assert layer.nora_inner_A["default"].shape == config.ranks_for(name)[::-1]
        assert layer.nora_inner_A["default"].requires_grad
    trained = [p.numel() for name, p in model.named_parameters() if p.requires_grad and "nora" in name]
    assert sum(trained) == 2 * (5 * 2 + 12 * 12)
