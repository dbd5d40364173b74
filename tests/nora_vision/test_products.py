"""The nested product of the forward pass: its gradients are those of the two plain products, and x is not saved."""

import contextlib

import pytest
import torch
from torch.nn import functional as F

from nora_vision.products import NestedProduct, nested_product


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


def test_it_saves_the_projected_input_and_no_other_tensor_of_all_tokens():
    x, A, D = torch.randn(50, 20, requires_grad=True), torch.randn(6, 20), torch.randn(3, 6, requires_grad=True)
    saved = []
    with torch.autograd.graph.saved_tensors_hooks(
        lambda tensor: saved.append(tuple(tensor.shape)) or tensor, lambda tensor: tensor
    ):
        NestedProduct.apply(x, A, D)
    assert sorted(saved) == [(3, 6), (6, 20), (50, 6)]
