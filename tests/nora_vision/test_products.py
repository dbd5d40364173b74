"""The products of the forward pass: their gradients are those of plain products, and they save less for backward."""

import contextlib

import pytest
import torch
from torch.nn import functional as F
from torch.utils.flop_counter import FlopCounterMode

from nora_vision.products import FrozenProduct, NestedProduct, frozen_product, is_cheaper_first, nested_product


@pytest.fixture(params=[torch.float64, torch.bfloat16, "autocast"], ids=str)
def case(request):
    """x, A and D, the context of both passes, and the tolerance."""
    dtype = torch.bfloat16 if request.param == "autocast" else request.param
    generator = torch.Generator().manual_seed(0)
    sizes = ((2, 7, 20), (6, 20), (3, 6))
    x, A, D = (torch.randn(*size, generator=generator, dtype=torch.float64) for size in sizes)
    # As in a layer: the trained factor is in float32 or better.
    tensors = (x.to(dtype).requires_grad_(), A.to(dtype), D.to(torch.promote_types(dtype, torch.float32)).requires_grad_())
    context = torch.autocast("cpu", torch.bfloat16) if request.param == "autocast" else contextlib.nullcontext()
    return *tensors, context, 1e-12 if dtype == torch.float64 else 0.02


def test_its_value_and_gradients_are_those_of_the_two_products(case):
    x, A, D, context, tolerance = case
    with context:
        product, projected = NestedProduct.apply(x, A, D)
    gradient = torch.randn(product.shape, generator=torch.Generator().manual_seed(1)).to(product.dtype)
    of_x, of_D = torch.autograd.grad(product, (x, D), gradient)
    assert (of_x.dtype, of_D.dtype) == (x.dtype, D.dtype)
    exact_x, exact_D = x.detach().double().requires_grad_(), D.detach().double().requires_grad_()
    expected = F.linear(F.linear(exact_x, A.double()), exact_D)
    expected_gradients = torch.autograd.grad(expected, (exact_x, exact_D), gradient.double())
    for value, exact in zip((product, of_x, of_D), (expected, *expected_gradients), strict=True):
        assert (value.double() - exact).norm() <= tolerance * exact.norm()
    assert not projected.requires_grad
    with context:
        assert torch.equal(nested_product(x.detach(), A, D), product)


def saved_by(product):
    """The shapes and dtypes of the tensors that `product()` saves for backward."""
    saved = []
    with torch.autograd.graph.saved_tensors_hooks(
        lambda tensor: saved.append((tuple(tensor.shape), tensor.dtype)) or tensor, lambda tensor: tensor
    ):
        product()
    return saved


def test_it_saves_the_projected_input_and_no_other_tensor_of_all_tokens():
    x, A, D = torch.randn(50, 20, requires_grad=True), torch.randn(6, 20), torch.randn(3, 6, requires_grad=True)
    saved = saved_by(lambda: NestedProduct.apply(x, A, D))
    assert sorted(shape for shape, _ in saved) == [(3, 6), (6, 20), (50, 6)]


def test_a_second_derivative_which_would_need_x_is_refused():
    x, A, D = torch.randn(5, 20, requires_grad=True), torch.randn(6, 20), torch.randn(3, 6, requires_grad=True)
    (of_D,) = torch.autograd.grad(nested_product(x, A, D).square().sum(), D, create_graph=True)
    with pytest.raises(RuntimeError, match="differentiate twice"):
        of_D.square().sum().backward()


def test_a_frozen_factor_of_another_dtype_is_saved_as_it_is_and_the_gradient_is_that_of_the_plain_product():
    generator = torch.Generator().manual_seed(0)
    B = torch.randn(12, 6, generator=generator).bfloat16()
    C = torch.randn(6, 3, generator=generator).requires_grad_()
    assert saved_by(lambda: frozen_product(B, C)) == [((12, 6), torch.bfloat16)]
    product, plain = frozen_product(B, C), B.float() @ C
    assert torch.equal(product, plain)
    gradient = torch.randn(12, 3, generator=generator)
    assert torch.equal(*(torch.autograd.grad(value, C, gradient)[0] for value in (product, plain)))
    assert torch.autograd.gradgradcheck(
        lambda C: FrozenProduct.apply(B, C).square(), C.detach().double().requires_grad_(), atol=1e-6
    )


@pytest.mark.parametrize("sizes", [(14336, 500, 64), (1280, 64, 16), (30, 8, 8)])
def test_the_order_of_two_products_is_the_one_with_fewer_multiplications(sizes):
    m, r, k = sizes
    for tokens in (1, 10, 20, 30, 70, 80, 1000):
        B, C, h = (torch.empty(size, device="meta") for size in ((m, r), (r, k), (k, tokens)))
        with FlopCounterMode(display=False) as first:
            (B @ C) @ h
        with FlopCounterMode(display=False) as second:
            B @ (C @ h)
        assert is_cheaper_first(B, C, tokens) == (first.get_total_flops() <= second.get_total_flops())
