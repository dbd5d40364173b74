"""Weightings of the outer factors, against algebra on the inputs themselves."""

import pytest
import torch
from peft import inject_adapter_in_model
from small_models import MODELS, config_for, mlp
from torch import nn

from nora_vision import ActivationStatistics, AdapterFileError, NoraConfig, calibrate, initialize_nora_weights, save_adapter
from nora_vision.files import write_tensors
from nora_vision.layer import nora_layers
from nora_vision.weighting import HUBER_THRESHOLD, MOMENTS, WEIGHTINGS, InputRoot

RANK, TOKENS, INPUTS = 3, 400, 24
ROBUST = ("quantile", "trimmed", "huber")


def correlated_inputs(seed=0):
    """(TOKENS, INPUTS) with a full second-moment matrix that is far from diagonal."""
    generator = torch.Generator().manual_seed(seed)
    mixing = torch.randn(INPUTS, INPUTS, generator=generator) * 0.85 ** torch.arange(INPUTS)
    return torch.randn(TOKENS, INPUTS, generator=generator) @ mixing.T


def linear(seed=1):
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(INPUTS, 10))


def statistics_of(x, weighting):
    model = linear()
    return calibrate(model, lambda: [model(part) for part in x.split(150)], weighting=weighting)


def initialised(x, weighting, rank=RANK, **fields):
    """The layer, started with a weighting on inputs x (tokens, in)."""
    model = linear()
    config = NoraConfig(r=rank, inner_r=1, target_modules=["0"], outer_init="awsvd", weighting=weighting, **fields)
    inject_adapter_in_model(config, model)
    initialize_nora_weights(model, statistics_of(x, weighting))
    return model[0]


def product(layer):
    return layer.nora_B["default"].double() @ layer.nora_A["default"].double()


def output_error(layer, x):
    return (x.double() @ (layer.base_layer.weight.double() - product(layer)).T).norm().item()


def least_error(x, weight, rank):
    """The least error of the outputs of any matrix of this rank, by the singular values of the outputs X W^T."""
    return torch.linalg.svdvals(x.double() @ weight.double().T)[rank:].norm().item()


def test_the_covariance_attains_the_least_output_error_of_all_pairs_of_its_rank():
    x = correlated_inputs()
    for rank in (1, 3, 7):
        layer = initialised(x, "covariance", rank)
        assert output_error(layer, x) == pytest.approx(least_error(x, layer.base_layer.weight, rank), rel=1e-5)


def test_diagonal_weightings_have_larger_output_errors_and_the_diagonal_plus_low_rank_one_between():
    x = correlated_inputs()
    errors = {weighting: output_error(initialised(x, weighting), x) for weighting in WEIGHTINGS}
    best, between = errors.pop("covariance"), errors.pop("diagonal_low_rank")
    assert best * (1 - 1e-6) <= between < min(errors.values())
    assert min(errors.values()) > 1.2 * best


def test_gradient_descent_on_the_factors_finds_no_smaller_output_error_than_the_covariance():
    x = correlated_inputs()
    layer = initialised(x, "covariance")
    up, down = (
        factor.detach().double().clone().requires_grad_() for factor in (layer.nora_B["default"], layer.nora_A["default"])
    )
    optimizer = torch.optim.LBFGS([up, down], max_iter=50)
    target = x.double() @ layer.base_layer.weight.detach().double().T

    def closure():
        optimizer.zero_grad()
        loss = (target - x.double() @ (up @ down).T).square().sum()
        loss.backward()
        return loss

    optimizer.step(closure)
    assert closure().sqrt().item() >= 0.99999 * output_error(layer, x)


def test_slices_of_the_covariance_have_changes_that_are_orthogonal_on_the_inputs():
    x = correlated_inputs()
    one, two = (initialised(x, "covariance", outer_slice=f"{i}/2") for i in (1, 2))
    outputs = [x.double() @ layer.nora_A["default"].double().T for layer in (one, two)]
    torch.testing.assert_close(outputs[0].T @ outputs[1], torch.zeros(RANK, RANK, dtype=torch.float64), atol=1e-2, rtol=0)
    across = one.nora_B["default"].T @ two.nora_B["default"]
    torch.testing.assert_close(across, torch.zeros(RANK, RANK), atol=1e-5, rtol=0)


def test_no_weighting_gives_the_plain_svd_without_a_warning(recwarn):
    layer = initialised(correlated_inputs(), "none")
    weight = layer.base_layer.weight
    torch.testing.assert_close((weight - product(layer).float()).norm(), torch.linalg.svdvals(weight)[RANK:].norm())
    assert not [warning for warning in recwarn if "statistics" in str(warning.message)]


# The roots


@pytest.mark.parametrize("weighting", ["covariance", "diagonal_low_rank"])
def test_the_root_is_a_square_root_of_the_second_moments_and_is_inverted_exactly(weighting):
    x = correlated_inputs().double()
    # As many directions as inputs leave nothing out.
    root = statistics_of(x.float(), weighting).root("0", weighting, low_rank=INPUTS)
    F, second = root.weigh(torch.eye(INPUTS).double()), x.T @ x
    torch.testing.assert_close(F @ F.T / (F @ F.T).trace(), second / second.trace(), atol=1e-5, rtol=0)
    some = torch.randn(5, INPUTS, dtype=torch.float64, generator=torch.Generator().manual_seed(2))
    torch.testing.assert_close(root.unweigh(root.weigh(some)), some)


def test_the_diagonal_plus_low_rank_has_the_diagonal_of_the_second_moments():
    x = correlated_inputs().double()
    root = statistics_of(x.float(), "diagonal_low_rank").root("0", "diagonal_low_rank", low_rank=2)
    F = root.weigh(torch.eye(INPUTS).double())
    approximation, second = F @ F.T, x.T @ x
    torch.testing.assert_close(approximation.diag() / approximation.trace(), second.diag() / second.trace(), atol=1e-6, rtol=1e-4)
    rest = approximation - approximation.diag().diag()
    # Off the diagonal it is that of the best approximation of rank 2.
    values, vectors = torch.linalg.eigh(second)
    best = (vectors[:, -2:] * values[-2:]) @ vectors[:, -2:].T * approximation.trace() / second.trace()
    torch.testing.assert_close(rest, best - best.diag().diag(), atol=1e-5 * best.abs().max().item(), rtol=1e-3)


@pytest.mark.parametrize("weighting", ["diagonal", "diagonal_low_rank", "covariance"])
def test_the_condition_number_is_that_of_the_root_written_out(weighting):
    statistics = statistics_of(correlated_inputs(), weighting)
    singular_values = torch.linalg.svdvals(statistics.root("0", weighting, 2).weigh(torch.eye(INPUTS).double()))
    assert statistics.condition_number("0", weighting, 2) == pytest.approx((singular_values[0] / singular_values[-1]).item())
    if weighting == "covariance":
        largest, *_, least = torch.linalg.svdvals(correlated_inputs().double())
        assert statistics.condition_number("0", weighting) == pytest.approx((largest / least).item(), rel=1e-4)


def test_inputs_that_are_all_zero_have_the_identity_as_their_root():
    for weighting in WEIGHTINGS:
        root = statistics_of(torch.zeros(20, INPUTS), weighting).root("0", weighting)
        torch.testing.assert_close(root.weigh(torch.eye(INPUTS).double()), torch.eye(INPUTS).double())


def test_a_root_relative_to_its_largest_singular_value_has_a_largest_one_of_one():
    root = statistics_of(correlated_inputs(), "covariance").root("0", "covariance").relative()
    assert torch.linalg.matrix_norm(root.weigh(torch.eye(INPUTS).double()), 2).item() == pytest.approx(1)
    assert InputRoot.diagonal(torch.tensor([1.0, 4.0])).relative().scale.tolist() == [0.25, 1.0]


# Robust diagonals


def with_outlier(x):
    x = x.clone()
    x[7] = 300 * torch.linspace(0, 1, INPUTS)
    return x


@pytest.mark.parametrize("weighting", ROBUST)
def test_one_outlier_token_changes_a_robust_scale_by_at_most_a_bin_and_the_diagonal_by_far_more(weighting):
    x = torch.randn(TOKENS, INPUTS, generator=torch.Generator().manual_seed(0)) * torch.linspace(1, 3, INPUTS)
    scales = [statistics_of(inputs, weighting).scale("0", weighting) for inputs in (x, with_outlier(x))]
    assert (scales[1] / scales[0]).log2().abs().max() < 1.01 / 8
    diagonal = [statistics_of(inputs, "diagonal").scale("0") for inputs in (x, with_outlier(x))]
    assert (diagonal[1] / diagonal[0])[-1] > 3


@pytest.mark.parametrize("weighting", ROBUST)
def test_an_outlier_token_raises_the_condition_number_of_the_diagonal_only(weighting):
    x = torch.randn(TOKENS, INPUTS, generator=torch.Generator().manual_seed(0))
    x[7, 0] = 1000
    robust = statistics_of(x, weighting)
    assert robust.condition_number("0", weighting) < 1.5
    assert robust.condition_number("0", "diagonal") > 20


def test_robust_scales_equal_the_statistics_of_the_sorted_inputs_within_a_bin():
    x = correlated_inputs()
    magnitudes = x.abs().sort(dim=0).values
    expected = {
        "quantile": magnitudes[round(0.95 * TOKENS) - 1],
        "trimmed": magnitudes[: round(0.95 * TOKENS)].square().mean(dim=0).sqrt(),
    }
    for weighting, scale in expected.items():
        assert (statistics_of(x, weighting).scale("0", weighting) / scale).log2().abs().max() < 1 / 15.9


def test_the_huber_scale_solves_its_equation_and_is_the_standard_deviation_of_normal_inputs():
    x = 3 * torch.randn(20000, INPUTS, generator=torch.Generator().manual_seed(0))
    scale = statistics_of(x, "huber").scale("0", "huber")
    torch.testing.assert_close(scale, torch.full((INPUTS,), 3.0), atol=0, rtol=0.03)
    outlying = with_outlier(correlated_inputs())
    scale = statistics_of(outlying, "huber").scale("0", "huber")
    normal = torch.randn(10**6, generator=torch.Generator().manual_seed(0)).square().clamp_max(HUBER_THRESHOLD**2).mean()
    clipped = torch.minimum(outlying.square(), (HUBER_THRESHOLD * scale).square()).mean(dim=0)
    torch.testing.assert_close(clipped, normal * scale.square(), atol=0, rtol=0.05)


# Collecting and storing


@pytest.mark.parametrize("weighting", list(MOMENTS))
@pytest.mark.parametrize("kind", MODELS)
def test_moments_of_every_kind_of_layer_are_those_of_its_stacked_inputs(kind, weighting):
    model, inputs, targets = MODELS[kind]()
    rows = {}

    def record(name):
        def hook(module, args):
            x = args[0].detach()
            if isinstance(module, nn.Conv2d):
                # A convolution with one weight of 1 per output channel reads the patches.
                eye = torch.eye(module.weight[0].numel()).view(-1, *module.weight.shape[1:])
                x = module._conv_forward(x, eye, None).permute(0, 2, 3, 1)
            rows[name] = x.flatten(0, -2).double()

        return hook

    statistics = calibrate(model, lambda: model(*inputs), targets, weighting=weighting)
    for name in statistics:
        model.get_submodule(name).register_forward_pre_hook(record(name))
    model(*inputs)
    for name in statistics:
        x, moments = rows[name], statistics.moments[name]
        if weighting == "covariance":
            torch.testing.assert_close(moments, x.T @ x, atol=1e-5, rtol=1e-5)
        elif weighting == "diagonal_low_rank":
            F = statistics.root(name, weighting, low_rank=x.shape[1]).weigh(torch.eye(x.shape[1]).double())
            # A sketch as wide as the inputs loses nothing; a narrower one keeps the diagonal.
            relative = (F @ F.T).diag() / (F @ F.T).trace()
            torch.testing.assert_close(relative, x.square().sum(dim=0) / x.square().sum(), atol=1e-5, rtol=1e-2)
        else:
            assert (moments.sum(dim=1) == len(x)).all()


@pytest.mark.parametrize("weighting", list(MOMENTS))
def test_statistics_with_moments_are_saved_and_loaded_exactly(tmp_path, weighting):
    statistics = statistics_of(correlated_inputs(), weighting)
    statistics.save(tmp_path / "stats.safetensors")
    loaded = ActivationStatistics.load(tmp_path / "stats.safetensors")
    assert loaded.supports(weighting)
    assert torch.equal(loaded.moments["0"], statistics.moments["0"])
    assert torch.equal(loaded["0"], statistics["0"])
    assert torch.equal(
        loaded.root("0", weighting).weigh(torch.eye(INPUTS)), statistics.root("0", weighting).weigh(torch.eye(INPUTS))
    )


def test_statistics_without_moments_are_refused_by_weightings_that_need_them():
    statistics = statistics_of(correlated_inputs(), "diagonal")
    assert statistics.supports("none")
    assert not statistics.supports("huber")
    message = (
        r"'covariance' needs activation statistics with the covariance .* have only their squares. Call calibrate with weighting="
    )
    with pytest.raises(ValueError, match=message):
        statistics.root("0", "covariance")
    with pytest.raises(ValueError, match=r"needs activation statistics with the histogram.*these have the covariance"):
        statistics_of(correlated_inputs(), "covariance").scale("0", "huber")


def test_a_file_with_moments_of_another_shape_is_refused_by_the_layers_name(tmp_path):
    tensors = {"0": torch.ones(4), "0:covariance": torch.ones(4, 3, dtype=torch.float64)}
    metadata = {"nora_activation_statistics": '{"0": "x"}', "nora_activation_moments": "covariance"}
    write_tensors(tmp_path / "stats.safetensors", tensors, metadata)
    with pytest.raises(AdapterFileError, match=r"the covariance of '0' must be a matrix \(4, 4\)"):
        ActivationStatistics.load(tmp_path / "stats.safetensors")


def rank_moments(rank, x, path):
    torch.set_num_threads(1)
    torch.distributed.init_process_group("gloo", init_method=f"file://{path}/store", rank=rank, world_size=2)
    for weighting in ("covariance", "huber"):
        statistics_of(x.chunk(2)[rank], weighting).save(f"{path}/{weighting}-{rank}.safetensors")
    torch.distributed.destroy_process_group()


def test_all_ranks_get_the_moments_of_all_inputs(tmp_path):
    x = correlated_inputs()
    torch.multiprocessing.start_processes(rank_moments, (x, str(tmp_path)), nprocs=2, start_method="fork")
    for weighting in ("covariance", "huber"):
        expected = statistics_of(x, weighting).moments["0"]
        for rank in (0, 1):
            reduced = ActivationStatistics.load(tmp_path / f"{weighting}-{rank}.safetensors").moments["0"]
            torch.testing.assert_close(reduced, expected)


# Files


@pytest.mark.parametrize("weighting", WEIGHTINGS)
def test_a_compact_file_is_written_exactly_where_one_scale_for_each_input_determines_the_factors(tmp_path, weighting):
    model, (x,), targets = mlp()
    inject_adapter_in_model(config_for(targets, init_weights=True, outer_init="awsvd", weighting=weighting), model)
    initialize_nora_weights(model, calibrate(model, lambda: model(x), weighting=weighting))
    for layer in nora_layers(model).values():
        nn.init.normal_(layer.nora_inner_B["default"])
    if weighting in ("diagonal_low_rank", "covariance"):
        with pytest.raises(AdapterFileError, match=rf"not saved as a compact file: with the weighting '{weighting}'"):
            save_adapter(model, tmp_path, compact=True)
        assert not list(tmp_path.iterdir())
    else:
        assert (save_adapter(model, tmp_path, compact=True) / "adapter_model.safetensors").exists()


def test_an_unknown_weighting_is_refused():
    with pytest.raises(ValueError, match=r"weighting must be one of .*'covariance'.*, got 'robust'"):
        NoraConfig(weighting="robust")
