import pytest
import torch

from nora_vision import awsvd


def decaying_weight(size=1280):
    """A random matrix with singular values i^-0.5."""
    generator = torch.Generator().manual_seed(0)
    U, V = (torch.linalg.qr(torch.randn(size, size, generator=generator)).Q for _ in range(2))
    return (U * torch.arange(1, size + 1).float().rsqrt()) @ V


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


@pytest.mark.parametrize("method", ["exact", "randomized"])
def test_scaling_the_activations_leaves_the_product_unchanged(weight, scale, method):
    B, A = awsvd(weight, scale, rank=4, method=method)
    scaled_B, scaled_A = awsvd(weight, 1000 * scale, rank=4, method=method)
    torch.testing.assert_close(scaled_B @ scaled_A, B @ A, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("method", ["exact", "randomized"])
def test_the_largest_entry_of_each_right_singular_vector_is_positive(weight, scale, method):
    _, A = awsvd(weight, scale, rank=6, method=method)
    V = A * scale
    assert (V.gather(1, V.abs().argmax(dim=1, keepdim=True)) > 0).all()


def test_a_negated_weight_negates_only_the_left_factor(weight, scale):
    B, A = awsvd(weight, scale, rank=4)
    negated_B, negated_A = awsvd(-weight, scale, rank=4)
    torch.testing.assert_close(negated_A, A, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(negated_B, -B, rtol=1e-4, atol=1e-5)


def test_the_randomized_method_agrees_with_the_exact_one_where_its_block_spans_the_matrix(weight, scale):
    B, A = awsvd(weight, scale, rank=4, method="exact")
    random_B, random_A = awsvd(weight, scale, rank=4, method="randomized")
    torch.testing.assert_close(random_A, A, rtol=1e-3, atol=1e-4)
    torch.testing.assert_close(random_B, B, rtol=1e-3, atol=1e-4)


def test_the_randomized_method_is_within_one_percent_of_optimal():
    weight = decaying_weight()
    scale = torch.rand(1280, generator=torch.Generator().manual_seed(1)) + 0.5
    S = torch.linalg.svdvals(weight * scale)
    B, A = awsvd(weight, scale, 64, method="randomized")
    assert ((weight - B @ A) * scale).norm() <= 1.01 * S[64:].norm()


def test_the_randomized_method_uses_only_its_generator(weight, scale):
    weight, scale = decaying_weight(200), torch.ones(200)
    state = torch.get_rng_state()
    B, A = awsvd(weight, scale, 8, method="randomized")
    again_B, again_A = awsvd(weight, scale, 8, method="randomized")
    assert torch.equal(B, again_B)
    assert torch.equal(A, again_A)
    assert torch.equal(torch.get_rng_state(), state)
    other_B, _ = awsvd(weight, scale, 8, method="randomized", generator=torch.Generator().manual_seed(5))
    assert not torch.equal(B, other_B)


def test_auto_takes_the_exact_method_for_small_and_the_randomized_one_for_large_matrices(weight, scale):
    assert torch.equal(awsvd(weight, scale, 4)[0], awsvd(weight, scale, 4, method="exact")[0])
    large = decaying_weight(200)
    assert torch.equal(awsvd(large, torch.ones(200), 8)[0], awsvd(large, torch.ones(200), 8, method="randomized")[0])


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
        ({"weight": torch.randn(3, 4, 5)}, r"weight must be a matrix .* got shape \(3, 4, 5\)"),
        ({"weight": torch.full((24, 16), torch.nan)}, "weight must be finite"),
        ({"activation_scale": torch.ones(15)}, r"activation_scale must have shape \(16,\), got \(15,\)"),
        ({"activation_scale": torch.zeros(16)}, "activation_scale must be finite and above 0, got a smallest entry of 0.0"),
        ({"activation_scale": torch.full((16,), torch.inf)}, "activation_scale must be finite"),
        ({"method": "fast"}, "method must be 'auto', 'exact' or 'randomized', got 'fast'"),
    ],
)
def test_bad_arguments_are_refused(weight, scale, change, message):
    arguments = {"weight": weight, "activation_scale": scale, "rank": 4} | change
    with pytest.raises(ValueError, match=message):
        awsvd(**arguments)
