import pytest
import torch

from nora_vision import awsvd, decomposition
from nora_vision.decomposition import _block_krylov, reproducible_awsvd

RANDOMIZED = ["krylov", "subspace"]


def random_weight(values):
    """A square matrix (n, n) with the singular values `values` (n,) and random singular vectors."""
    generator = torch.Generator().manual_seed(0)
    U, V = (torch.linalg.qr(torch.randn(len(values), len(values), generator=generator, dtype=values.dtype)).Q for _ in range(2))
    return (U * values) @ V


def decaying_weight(size):
    """A random matrix with singular values i^-0.5."""
    return random_weight(torch.arange(1, size + 1).float().rsqrt())


INDEX = torch.arange(1, 321, dtype=torch.float64)
# With rank 16: those that the Krylov space serves, and those at which it falls back to subspace iteration.
WELL_CONDITIONED = {
    "flat": torch.linalg.svdvals(torch.randn(320, 320, generator=torch.Generator().manual_seed(2), dtype=torch.float64)),
    "linear": 1 - (INDEX - 1) / 320,
    "slow": INDEX**-0.5,
    "steep": INDEX**-2,
    "exponential": torch.exp(-INDEX / 16),
    "one large": torch.where(INDEX == 1, 1000.0, INDEX**-0.5),
    "large head": torch.where(INDEX <= 12, 30 / INDEX, 1 - INDEX / 640),
}
DEGENERATE = {
    "all equal": torch.ones(320, dtype=torch.float64),
    "two values": torch.where(INDEX <= 40, 1.0, 0.3).double(),
    "rank deficient": torch.where(INDEX <= 24, INDEX**-0.5, 0.0),
    "a decade each": 10.0**-INDEX,
    "zero": torch.zeros(320, dtype=torch.float64),
}
SPECTRA = WELL_CONDITIONED | DEGENERATE


@pytest.fixture
def weight():
    return torch.randn(24, 16, generator=torch.Generator().manual_seed(0))


@pytest.fixture
def scale():
    return torch.rand(16, generator=torch.Generator().manual_seed(1)) + 0.1


def test_awsvd_attains_the_eckart_young_bound(weight, scale):
    B, A = awsvd(weight, scale, rank=4)
    error = ((weight - B @ A) * scale).norm()
    torch.testing.assert_close(error, torch.linalg.svdvals(weight * scale)[4:].norm())


def test_no_other_pair_of_that_rank_has_a_smaller_weighted_error(weight, scale):
    B, A = awsvd(weight, scale, rank=4)
    error = ((weight - B @ A) * scale).norm()
    plain_B, plain_A = awsvd(weight, torch.ones(16), rank=4)
    assert ((weight - plain_B @ plain_A) * scale).norm() > error
    for seed in range(5):
        noise = torch.randn(24, 4, generator=torch.Generator().manual_seed(seed))
        assert ((weight - (B + 0.1 * noise) @ A) * scale).norm() > error


def test_the_unweighted_error_is_at_most_the_next_singular_value_times_the_condition_of_the_scale(weight, scale):
    scale = scale / scale.max()
    B, A = awsvd(weight, scale, rank=4)
    bound = torch.linalg.svdvals(weight * scale)[4] * scale.max() / scale.min()
    assert torch.linalg.matrix_norm(weight - B @ A, ord=2) <= bound


def test_the_factors_are_the_singular_triples_of_the_weighted_matrix(weight, scale):
    B, A = awsvd(weight, scale, rank=4)
    V = A * scale
    torch.testing.assert_close(V @ V.T, torch.eye(4))
    torch.testing.assert_close(B.T @ B, torch.diag(torch.linalg.svdvals(weight * scale)[:4] ** 2), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("method", ["exact", *RANDOMIZED])
def test_scaling_the_activations_leaves_the_product_unchanged(weight, scale, method):
    B, A = awsvd(weight, scale, rank=4, method=method)
    scaled_B, scaled_A = awsvd(weight, 1000 * scale, rank=4, method=method)
    torch.testing.assert_close(scaled_B @ scaled_A, B @ A, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("method", ["exact", *RANDOMIZED])
def test_the_largest_entry_of_each_right_singular_vector_is_positive(weight, scale, method):
    _, A = awsvd(weight, scale, rank=6, method=method)
    V = A * scale
    assert (V.gather(1, V.abs().argmax(dim=1, keepdim=True)) > 0).all()


def test_a_negated_weight_negates_only_the_left_factor(weight, scale):
    B, A = awsvd(weight, scale, rank=4)
    negated_B, negated_A = awsvd(-weight, scale, rank=4)
    torch.testing.assert_close(negated_A, A, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(negated_B, -B, rtol=1e-4, atol=1e-5)


def test_subspace_iteration_agrees_with_the_exact_method_where_its_block_spans_the_matrix(weight, scale):
    B, A = awsvd(weight, scale, rank=4, method="exact")
    random_B, random_A = awsvd(weight, scale, rank=4, method="subspace")
    torch.testing.assert_close(random_A, A, rtol=1e-3, atol=1e-4)
    torch.testing.assert_close(random_B, B, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("method", RANDOMIZED)
@pytest.mark.parametrize("spectrum", SPECTRA)
def test_randomized_methods_are_within_one_percent_of_optimal(spectrum, method, dtype):
    values = SPECTRA[spectrum]
    weight, scale = random_weight(values).to(dtype), torch.ones(320, dtype=dtype)
    B, A = awsvd(weight, scale, 16, method=method)
    rounding = 100 * torch.finfo(dtype).eps * values.norm()
    assert (weight - B @ A).double().norm() <= 1.01 * values[16:].norm() + rounding
    torch.testing.assert_close(B.T @ B, torch.diag(B.T @ B).diag(), rtol=0, atol=1e-4 * values[0].square().item() + 1e-30)


@pytest.mark.parametrize("spectrum", WELL_CONDITIONED)
def test_the_krylov_space_has_one_block_less_where_singular_values_decay_fast(spectrum, monkeypatch):
    sizes = []
    once = decomposition._leading_eigenvectors
    monkeypatch.setattr(
        decomposition, "_leading_eigenvectors", lambda product, rank: (sizes.append(len(product)), once(product, rank))[1]
    )
    awsvd(random_weight(WELL_CONDITIONED[spectrum]), torch.ones(320), 16, method="krylov")
    assert sizes == [4 * 8 if spectrum in ("steep", "large head") else 5 * 8]


@pytest.mark.parametrize(("size", "rank"), [(1280, 64), (640, 64)])
def test_the_krylov_method_is_within_one_percent_of_optimal_for_the_shapes_of_sdxl(size, rank):
    generator = torch.Generator().manual_seed(3)
    weight, scale = torch.randn(size, size, generator=generator), 0.5 + torch.rand(size, generator=generator)
    B, A = awsvd(weight, scale, rank, method="krylov")
    assert ((weight - B @ A) * scale).norm() <= 1.01 * torch.linalg.svdvals(weight * scale)[rank:].norm()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("spectrum", SPECTRA)
def test_the_krylov_method_falls_back_where_its_gram_matrices_are_ill_conditioned(spectrum, dtype):
    weight = random_weight(SPECTRA[spectrum]).to(dtype)
    _, _, reliable = _block_krylov(weight, torch.ones(1, 320, dtype=dtype), 16, None)
    assert reliable == (spectrum in WELL_CONDITIONED)
    krylov, subspace = (awsvd(weight, torch.ones(320), 16, method=method) for method in RANDOMIZED)
    for factor, fallback in zip(krylov, subspace, strict=True):
        assert torch.equal(factor, fallback) == (spectrum in DEGENERATE)


@pytest.mark.parametrize("method", ["exact", *RANDOMIZED])
@pytest.mark.parametrize("exponent", [-90, 60])
def test_the_size_of_the_weight_matters_only_to_its_left_factor(method, exponent):
    weight, scale = decaying_weight(200), 0.5 + torch.rand(200, generator=torch.Generator().manual_seed(1))
    B, A = awsvd(weight, scale, 8, method=method)
    other_B, other_A = awsvd(torch.ldexp(weight, torch.tensor(exponent)), scale, 8, method=method)
    torch.testing.assert_close(other_A, A)
    torch.testing.assert_close(torch.ldexp(other_B, torch.tensor(-exponent)), B)


@pytest.mark.parametrize("method", ["exact", *RANDOMIZED])
def test_a_batch_gives_the_factors_of_each_of_its_matrices(method):
    generator = torch.Generator().manual_seed(4)
    weights = torch.randn(2, 2, 96, 120, generator=generator, dtype=torch.float64)
    # Falls back, alone.
    weights[0, 1] = torch.eye(96, 120)
    scales = torch.ones(2, 2, 120, dtype=torch.float64)
    scales[1] += torch.rand(2, 120, generator=generator)
    B, A = awsvd(weights, scales, 8, method=method)
    assert (B.shape, A.shape) == ((2, 2, 96, 8), (2, 2, 8, 120))
    for place in ((0, 0), (0, 1), (1, 0), (1, 1)):
        single_B, single_A = awsvd(weights[place], scales[place], 8, method=method)
        torch.testing.assert_close(B[place] @ A[place], single_B @ single_A, rtol=0, atol=1e-8)


@pytest.mark.parametrize("method", ["exact", *RANDOMIZED])
@pytest.mark.parametrize("value", [torch.nan, torch.inf, -torch.inf])
def test_a_single_entry_that_is_not_finite_is_refused_by_every_method(method, value):
    weights = torch.stack([decaying_weight(200)] * 2)
    weights[1, 77, 123] = value
    with pytest.raises(ValueError, match="weight must be finite"):
        awsvd(weights, torch.ones(2, 200), 8, method=method)


@pytest.mark.parametrize("method", RANDOMIZED)
def test_randomized_methods_use_only_their_generator(method):
    weight, scale = decaying_weight(200), torch.ones(200)
    state = torch.get_rng_state()
    B, A = awsvd(weight, scale, 8, method=method)
    again_B, again_A = awsvd(weight, scale, 8, method=method)
    assert torch.equal(B, again_B)
    assert torch.equal(A, again_A)
    assert torch.equal(torch.get_rng_state(), state)
    other_B, _ = awsvd(weight, scale, 8, method=method, generator=torch.Generator().manual_seed(5))
    assert not torch.equal(B, other_B)


def test_auto_takes_the_exact_method_for_small_and_the_krylov_one_for_large_matrices(weight, scale):
    assert torch.equal(awsvd(weight, scale, 4)[0], awsvd(weight, scale, 4, method="exact")[0])
    large = decaying_weight(200)
    assert torch.equal(awsvd(large, torch.ones(200), 8)[0], awsvd(large, torch.ones(200), 8, method="krylov")[0])


@pytest.mark.parametrize("legacy", [False, True])
@pytest.mark.parametrize("spectrum", WELL_CONDITIONED)
def test_the_order_of_summation_does_not_change_reproducible_factors(spectrum, legacy):
    """It differs between machines and numbers of threads. A permutation of outputs permutes the sums over them and nothing else
    except the random start, and so does one of inputs."""
    weight = random_weight(WELL_CONDITIONED[spectrum])
    order = torch.randperm(320, generator=torch.Generator().manual_seed(6))
    # The start multiplies the inputs in subspace iteration, and the outputs for the Krylov space.
    permuted = weight[order] if legacy else weight[:, order]
    B, A = reproducible_awsvd(weight, None, 16, legacy=legacy)
    again_B, again_A = reproducible_awsvd(permuted, None, 16, legacy=legacy)
    expected = (B[order], A) if legacy else (B, A[:, order])
    for factor, again in zip(expected, (again_B, again_A), strict=True):
        assert (again - factor).norm() <= 1e-8 * factor.norm()


@pytest.mark.parametrize(
    ("dtype", "expected"),
    [(torch.bfloat16, torch.float32), (torch.float32, torch.float32), (torch.float64, torch.float64)],
)
def test_factors_are_at_least_float32(weight, scale, dtype, expected):
    B, A = awsvd(weight.to(dtype), scale, rank=4)
    assert (B.dtype, A.dtype) == (expected, expected)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"rank": 17}, r"rank must be in \[1, 16\] for a 24 x 16 weight, got 17"),
        ({"rank": 0}, "got 0"),
        ({"weight": torch.randn(16)}, r"weight must be a matrix .* got shape \(16,\)"),
        ({"weight": torch.randn(3, 24, 16)}, r"activation_scale must have shape \(3, 16\), got \(16,\)"),
        ({"weight": torch.full((24, 16), torch.nan)}, "weight must be finite"),
        ({"activation_scale": torch.ones(15)}, r"activation_scale must have shape \(16,\), got \(15,\)"),
        ({"activation_scale": torch.zeros(16)}, "activation_scale must be finite and above 0, got a smallest entry of 0.0"),
        ({"activation_scale": torch.full((16,), torch.inf)}, "activation_scale must be finite"),
        ({"method": "fast"}, r"method must be one of \('auto', 'exact', 'krylov', 'subspace'\), got 'fast'"),
    ],
)
def test_bad_arguments_are_refused(weight, scale, change, message):
    arguments = {"weight": weight, "activation_scale": scale, "rank": 4} | change
    with pytest.raises(ValueError, match=message):
        awsvd(**arguments)
