"""Outer factors from gradients, against the full singular value decomposition."""

import pytest
import torch
from peft import inject_adapter_in_model
from small_models import config_for, mlp

from nora_vision import AdapterFileError, NoraConfig, calibrate, initialize_nora_weights, load_adapter, save_adapter
from nora_vision.factors import Factors
from nora_vision.gradient_basis import gradient_factors
from nora_vision.layer import nora_layers
from nora_vision.outer import scaled_outer_factors
from nora_vision.saving import adapter_tensors
from nora_vision.weighting import InputRoot, covariance_root

OUT, IN, RANK = 14, 18, 6


def example(seed=0):
    """A weight, a gradient, and the scale of its inputs."""
    generator = torch.Generator().manual_seed(seed)
    weight, gradient = torch.randn(2, OUT, IN, generator=generator)
    return weight.double(), gradient.double(), torch.rand(IN, generator=generator).double() + 0.1


def projector(rows):
    """The orthogonal projector on the span of the rows of a matrix."""
    return torch.linalg.pinv(rows) @ rows


@pytest.mark.parametrize("kind", ["diagonal", "covariance"])
def test_the_directions_are_the_leading_singular_vectors_of_the_weighted_negative_gradient(kind):
    weight, gradient, scale = example()
    if kind == "diagonal":
        root, F = InputRoot.diagonal(scale), torch.diag(scale / scale.max())
    else:
        second = torch.cov(torch.randn(IN, 60, generator=torch.Generator().manual_seed(1)).double())
        root, (values, vectors) = covariance_root(second), torch.linalg.eigh(second)
        F = vectors @ torch.diag((values / values.max()).sqrt()) @ vectors.T
    B, A = gradient_factors(weight, gradient, root, RANK)
    U, S, Vh = torch.linalg.svd(-gradient @ F)
    torch.testing.assert_close(projector(A @ F), projector(Vh[:RANK]))
    torch.testing.assert_close(projector(B.T), projector(U[:, :RANK].T))
    # The change of steepest descent in the weighted norm, cut to rank r, is in the basis: B diag(m) A with m above 0.
    level = torch.linalg.svdvals(weight)[:RANK].mean()
    torch.testing.assert_close(B @ torch.diag(S[:RANK] / level) @ A @ F, (U[:, :RANK] * S[:RANK]) @ Vh[:RANK])


def test_the_size_is_the_mean_of_the_weights_leading_singular_values_or_follows_those_of_the_gradient():
    weight, gradient, scale = example()
    root, leading = InputRoot.diagonal(scale), torch.linalg.svdvals(weight)
    columns = gradient_factors(weight, gradient, root, RANK)[0].norm(dim=0)
    torch.testing.assert_close(columns, leading[:RANK].mean().expand(RANK))
    columns = gradient_factors(weight, gradient, root, RANK, scale="gradient")[0].norm(dim=0)
    values = torch.linalg.svdvals(gradient * scale)[:RANK]
    torch.testing.assert_close(columns, values * leading[0] / values[0])


@pytest.mark.parametrize(("share", "count"), [(0.5, 3), (0.3, 2), (0.0, 0), (1.0, 6)])
def test_a_mixed_basis_has_the_share_of_directions_from_the_gradient_and_the_weights_best_others(share, count):
    weight, gradient, scale = example()
    B, A = gradient_factors(weight, gradient, InputRoot.diagonal(scale), RANK, share=share)
    F = torch.diag(scale / scale.max())
    # All rows are orthonormal in the weighted sense, and all columns orthogonal.
    torch.testing.assert_close(A @ F @ F @ A.T, torch.eye(RANK).double())
    across = B.T @ B
    torch.testing.assert_close(across, across.diag().diag())
    U, _, Vh = torch.linalg.svd(-gradient @ F)
    torch.testing.assert_close(projector(A[:count] @ F), projector(Vh[:count]) if count else torch.zeros(IN, IN).double())
    out_of_gradient = weight @ F - U[:, :count] @ U[:, :count].T @ weight @ F
    out_of_gradient = out_of_gradient - out_of_gradient @ Vh[:count].T @ Vh[:count]
    left, values, right = torch.linalg.svd(out_of_gradient)
    best = (left[:, : RANK - count] * values[: RANK - count]) @ right[: RANK - count]
    torch.testing.assert_close(B[:, count:] @ A[count:] @ F, best)


@pytest.mark.parametrize("rank_of_gradient", [0, 2])
def test_a_gradient_of_lower_rank_leaves_the_other_directions_to_the_weight(rank_of_gradient):
    weight, gradient, scale = example()
    U, S, Vh = torch.linalg.svd(gradient)
    S[rank_of_gradient:] = 0
    low = U @ torch.diag(S) @ Vh[: len(S)]
    B, A = gradient_factors(weight, low.float(), InputRoot.diagonal(scale), RANK)
    expected = gradient_factors(weight, low, InputRoot.diagonal(scale), RANK, share=rank_of_gradient / RANK)
    torch.testing.assert_close(B @ A, expected[0] @ expected[1], atol=1e-4, rtol=1e-4)


def test_the_scale_of_the_inputs_and_of_the_gradient_do_not_matter():
    weight, gradient, scale = example()
    one = gradient_factors(weight, gradient, InputRoot.diagonal(scale), RANK, share=0.5)
    other = gradient_factors(weight, 1e-6 * gradient, InputRoot.diagonal(1000 * scale), RANK, share=0.5)
    for ours, theirs in zip(one, other, strict=True):
        torch.testing.assert_close(ours, theirs)


# Adapters with such a basis


def started(dtype=torch.float32, calibration="data", **fields):
    model, (x,), targets = mlp()
    model.to(dtype)
    config = config_for(
        targets, init_weights=True, outer_init="awsvd", **{"basis": "gradient", "inner_init": "gaussian", **fields}
    )
    inject_adapter_in_model(config, model)
    factors = {
        name: Factors(*gradient_factors(layer.get_base_layer().weight, torch.randn_like(layer.get_base_layer().weight),
                                        InputRoot.diagonal(torch.ones(layer.in_features)), layer.r["default"]))
        for name, layer in nora_layers(model).items()
    }  # fmt: skip
    initialize_nora_weights(model, calibrate(model, lambda: model(x.to(dtype))), factors=factors, calibration=calibration)
    return model, x, factors


def test_the_layers_get_the_given_factors_with_the_configured_scaling():
    model, _, factors = started()
    for name, layer in nora_layers(model).items():
        torch.testing.assert_close(layer.nora_B["default"], factors[name].up.float())
        torch.testing.assert_close(layer.nora_A["default"], factors[name].down.float())
    model, _, _ = started(outer_scaling="none")
    for layer in nora_layers(model).values():
        torch.testing.assert_close(layer.nora_B["default"].norm(dim=0), torch.ones(8))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("fields", [{}, {"basis": "mixed", "outer_scaling": "A"}, {"calibration": "base"}])
def test_a_compact_file_contains_outer_factors_of_4_bits_exactly(tmp_path, dtype, fields):
    model, x, factors = started(dtype, outer_dtype="int4", **fields)
    for name, layer in nora_layers(model).items():
        exact = scaled_outer_factors(factors[name].up, factors[name].down, layer.outer_scaling["default"])
        for rounded, given in zip((layer.nora_B["default"].T, layer.nora_A["default"]), (exact[0].T, exact[1]), strict=True):
            error = (rounded.float() - given).norm(dim=1) / given.norm(dim=1)
            assert 0.01 < error.max() < 0.2
    for compact in (False, True):
        save_adapter(model, tmp_path / str(compact), compact=compact)
        fresh = mlp()[0].to(dtype)
        load_adapter(fresh, tmp_path / str(compact))
        expected = adapter_tensors(model, "default")
        assert all(torch.equal(tensor, expected[name]) for name, tensor in adapter_tensors(fresh, "default").items())
        assert torch.equal(fresh(x.to(dtype)), model(x.to(dtype)))
    sizes = [(tmp_path / str(compact) / "adapter_model.safetensors").stat().st_size for compact in (True, False)]
    count = sum(layer.nora_A["default"].numel() + layer.nora_B["default"].numel() for layer in nora_layers(model).values())
    assert sizes[0] < sizes[1] - count * (dtype.itemsize - 0.6)


def test_a_direction_of_zeros_and_an_odd_number_of_entries_are_stored(tmp_path):
    model = mlp()[0]
    model.second = torch.nn.Linear(30, 21, bias=False)
    inject_adapter_in_model(
        config_for(["second"], r=3, inner_r=2, basis="gradient", outer_dtype="int4", outer_init="awsvd"), model
    )
    layer = nora_layers(model)["second"]
    B, A = torch.randn(21, 3), torch.randn(3, 30)
    B[:, 1] = 0
    initialize_nora_weights(model, factors={"second": Factors(B, A)})
    save_adapter(model, tmp_path, compact=True)
    fresh = mlp()[0]
    fresh.second = torch.nn.Linear(30, 21, bias=False)
    load_adapter(fresh, tmp_path)
    assert torch.equal(nora_layers(fresh)["second"].nora_B["default"], layer.nora_B["default"])
    assert not layer.nora_B["default"][:, 1].any()


def test_factors_that_are_not_rounded_are_refused_as_a_compact_file(tmp_path):
    model, _, _ = started(outer_dtype="int4")
    layer = nora_layers(model)["second"]
    layer.set_outer_factors("default", layer.nora_B["default"] + 1e-4, layer.nora_A["default"])
    with pytest.raises(AdapterFileError, match=r"outer_dtype is 'int4', but its outer factors are not rounded"):
        save_adapter(model, tmp_path / "compact", compact=True)
    assert not (tmp_path / "compact").exists()


def test_factors_too_small_for_half_precision_are_refused_before_the_training():
    model = mlp()[0].half()
    inject_adapter_in_model(config_for(["second"], r=8, basis="gradient", outer_dtype="int4", outer_init="awsvd"), model)
    tiny = Factors(1e-6 * torch.randn(20, 8), torch.randn(8, 30))
    with pytest.raises(ValueError, match=r"'second' must be at least 6e-05 or 0 in torch.float16 to be exact"):
        initialize_nora_weights(model, factors={"second": tiny})


def test_factors_that_the_weights_determine_are_not_rounded():
    with pytest.raises(ValueError, match=r"outer_dtype must be 'base' for outer factors that are computed again"):
        NoraConfig(outer_dtype="int4")


def test_a_full_file_restores_the_basis_and_a_compact_one_is_refused(tmp_path):
    model, x, _ = started()
    with pytest.raises(AdapterFileError, match=r"with the basis 'gradient', its outer factors cannot be .*full file contains"):
        save_adapter(model, tmp_path / "compact", compact=True)
    assert not (tmp_path / "compact").exists()
    save_adapter(model, tmp_path / "full")
    fresh, _, _ = mlp()
    load_adapter(fresh, tmp_path / "full")
    assert fresh.peft_config["default"].basis == "gradient"
    assert torch.equal(fresh(x), model(x))


def test_factors_and_basis_must_belong_together():
    model, x, factors = started()
    with pytest.raises(ValueError, match=r"The basis 'gradient' needs factors"):
        initialize_nora_weights(model, calibrate(model, lambda: model(x)))
    with pytest.raises(ValueError, match=r"factors must name every adapted layer, but 'second' is missing \(1 in all\)"):
        initialize_nora_weights(model, factors={"first": factors["first"]})
    model.peft_config["default"].basis = "weight"
    with pytest.raises(ValueError, match=r"The basis 'weight' needs no factors"):
        initialize_nora_weights(model, factors=factors)


def test_a_basis_from_gradients_has_no_slices():
    with pytest.raises(ValueError, match=r"outer_slice must be 1/1 for the basis 'mixed', got 1/2"):
        NoraConfig(basis="mixed", outer_slice="1/2")
    with pytest.raises(ValueError, match=r"basis must be one of"):
        NoraConfig(basis="both")
