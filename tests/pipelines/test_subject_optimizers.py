"""Optimisers, their learning rates and the moving average: PEFT, torch and algebra are the oracles."""

import sys

import pytest
import torch
from diffusers.training_utils import EMAModel
from peft.optimizers import create_loraplus_optimizer
from tiny_options import TINY
from torch import nn

from pipelines.adapter_options import AdapterOptions
from pipelines.errors import InputError
from pipelines.optimizers import OptimizerSettings, Rates, averaged, parameter_groups, trainable_parameters
from pipelines.subject import adapters
from pipelines.subject.loss import DenoisingLoss


def rates_by_parameter(groups):
    return {id(parameter): group["lr"] for group in groups for parameter in group["params"]}


def options_of(method, **changes):
    return AdapterOptions(method=method, rank=4, inner_r=2, **TINY, train_text_encoder=True, **changes)


def adapted(pipe, method, **changes):
    adapters.attach(pipe, options_of(method, **changes))
    return DenoisingLoss(pipe)


def faster(method, ratio):
    """The method's factor on the learning rate, with LoRA+."""
    return options_of(method, lora_plus_ratio=ratio).create().learning_rate_factor


def test_lora_plus_gives_the_learning_rates_of_peft(pipe):
    loss = adapted(pipe, "lora")
    ours = parameter_groups(loss, Rates(1e-3, factor=faster("lora", 16.0)))
    peft = create_loraplus_optimizer(loss, torch.optim.AdamW, lr=1e-3, loraplus_lr_ratio=16.0)
    assert rates_by_parameter(ours) == rates_by_parameter(peft.param_groups)


@pytest.mark.parametrize("method", AdapterOptions.method_options["lora_plus_ratio"].methods)
def test_lora_plus_raises_the_rate_of_the_factors_that_start_at_zero(pipe, method):
    components = adapters.attach(pipe, AdapterOptions(method=method, rank=4, inner_r=2, **TINY))
    rates = Rates(1.0, factor=faster(method, 2.0))
    names = [name for name, parameter in components["unet"].named_parameters() if parameter.requires_grad]
    at_zero = {name for name in names if not components["unet"].get_parameter(name).any()}
    assert {name for name in names if rates.of(name) == 2.0} == at_zero


def test_text_encoders_have_separate_rates_and_every_parameter_is_in_one_group(pipe):
    loss = adapted(pipe, "nora")
    groups = parameter_groups(loss, Rates(1e-3, (1e-5,), faster("nora", 4.0)))
    rates = rates_by_parameter(groups)
    for name, parameter in loss.named_parameters():
        if parameter.requires_grad:
            expected = (1e-3 if name.startswith("unet.") else 1e-5) * (4 if "inner_B" in name else 1)
            assert rates.pop(id(parameter)) == expected
    assert not rates
    assert groups[0]["lr"] == 1e-3


def test_a_single_rate_makes_a_single_group(pipe):
    assert len(parameter_groups(adapted(pipe, "nora"), Rates(1e-3))) == 1


def descend(adam, parameter, steps=50, lr=0.05):
    """Train `parameter` towards ones."""
    optimizer = adam.optimizer([{"params": [parameter], "lr": lr}])
    for _ in range(steps):
        optimizer.zero_grad()
        (parameter - 1).square().mean().backward()
        optimizer.step()
    return optimizer


def test_adamw_is_torchs():
    ours, theirs = nn.Parameter(torch.zeros(5)), nn.Parameter(torch.zeros(5))
    descend(OptimizerSettings(betas=(0.5, 0.9), epsilon=1e-4, weight_decay=0.1), ours)
    optimizer = torch.optim.AdamW([theirs], 0.05, (0.5, 0.9), 1e-4, 0.1)
    for _ in range(50):
        theirs.grad = 2 * (theirs.detach() - 1) / 5
        optimizer.step()
    torch.testing.assert_close(ours, theirs)


def test_eight_bit_adamw_follows_adamw_with_moments_in_bytes():
    pytest.importorskip("bitsandbytes")
    start = torch.randn(64, 64, generator=torch.Generator().manual_seed(0))
    exact, coarse = nn.Parameter(start.clone()), nn.Parameter(start.clone())
    descend(OptimizerSettings(), exact)
    optimizer = descend(OptimizerSettings(eight_bit=True), coarse)
    assert (coarse - exact).abs().mean() < 0.05 * (exact - start).abs().mean()
    assert optimizer.state[coarse]["state1"].dtype == torch.uint8


@pytest.mark.parametrize("shape", [(8, 32), (32, 8), (2, 64), (1, 16)])
def test_muon_moves_a_matrix_by_its_gradient_with_equal_singular_values_and_by_the_size_of_adamws_steps(shape):
    parameter = nn.Parameter(torch.zeros(shape))
    u, s, vt = torch.linalg.svd(torch.randn(shape, generator=torch.Generator().manual_seed(0)), full_matrices=False)
    optimizer = OptimizerSettings("Muon").optimizer([{"params": [parameter], "lr": 0.1}])
    # Singular values that differ by up to 100 times.
    parameter.grad = u @ torch.diag(torch.logspace(0, -2, len(s))) @ vt
    optimizer.step()
    along = u.T @ -parameter.detach() @ vt.T
    expected = 0.1 * 0.2 * max(shape) ** 0.5
    # Five iterations of Newton and Schulz in bfloat16 leave them between 0.7 and 1.2.
    assert ((along.diag() / expected > 0.6) & (along.diag() / expected < 1.3)).all()
    assert (along - along.diag().diag()).abs().max() < 0.1 * expected


def test_muon_trains_the_matrices_of_a_stack_and_of_a_convolution_as_if_each_were_alone():
    generator = torch.Generator().manual_seed(1)
    stack, convolution = nn.Parameter(torch.ones(3, 4, 8)), nn.Parameter(torch.ones(6, 2, 3, 3))
    alone = [nn.Parameter(torch.ones(4, 8)) for _ in range(3)] + [nn.Parameter(torch.ones(6, 18))]
    layouts = [stack.stride(), convolution.stride()]
    optimizer, reference = (
        OptimizerSettings("Muon").optimizer([{"params": parameters, "lr": 0.1}]) for parameters in ([stack, convolution], alone)
    )
    for _ in range(3):
        stack.grad, convolution.grad = (torch.randn(each.shape, generator=generator) for each in (stack, convolution))
        gradients = [*stack.grad.clone(), convolution.grad.flatten(1).clone()]
        for parameter, gradient in zip(alone, gradients, strict=True):
            parameter.grad = gradient
        optimizer.step()
        reference.step()
        torch.testing.assert_close(stack.grad, torch.stack(gradients[:3]), rtol=0, atol=0)
    assert [stack.stride(), convolution.stride()] == layouts
    # Muon's iterations are in bfloat16.
    torch.testing.assert_close(stack.detach(), torch.stack(alone[:3]).detach(), rtol=0, atol=2e-3)
    torch.testing.assert_close(convolution.detach().flatten(1), alone[3].detach(), rtol=0, atol=2e-3)


def test_muon_trains_vectors_by_adamw_at_the_same_rate_and_says_so(caplog):
    matrix, vectors = nn.Parameter(torch.zeros(4, 4)), [nn.Parameter(torch.zeros(5)), nn.Parameter(torch.zeros(3))]
    settings = OptimizerSettings("Muon", epsilon=1e-3)
    optimizer = settings.optimizer([{"params": [vectors[0], matrix], "lr": 0.1}, {"params": [vectors[1]], "lr": 0.2}])
    assert "AdamW trains the other 8 parameters." in caplog.text
    for parameter in (matrix, *vectors):
        parameter.grad = torch.randn(parameter.shape, generator=torch.Generator().manual_seed(1))
    optimizer.step()
    assert {id(each) for each in trainable_parameters(optimizer)} == {id(matrix), *map(id, vectors)}
    for parameter, rate in zip(vectors, (0.1, 0.2), strict=True):
        torch.testing.assert_close(parameter.detach(), -rate * parameter.grad / (parameter.grad.abs() + 1e-3))


def test_prodigy_finds_the_size_of_its_steps():
    pytest.importorskip("prodigyopt")
    parameter = nn.Parameter(torch.full((5,), 30.0))
    optimizer = descend(OptimizerSettings("Prodigy", weight_decay=0.0), parameter, steps=300, lr=1.0)
    assert optimizer.param_groups[0]["d"] > 1e-3
    torch.testing.assert_close(parameter.detach(), torch.ones(5), atol=0.5, rtol=0)


@pytest.mark.parametrize(
    ("adam", "package"), [(OptimizerSettings("Prodigy"), "prodigyopt"), (OptimizerSettings(eight_bit=True), "bitsandbytes")]
)
def test_a_missing_package_is_reported_with_the_command_that_installs_it(adam, package, monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    monkeypatch.delitem(sys.modules, package, raising=False)
    with pytest.raises(InputError, match=rf"needs the package {package}.*pip install {package}"):
        adam.optimizer([{"params": [nn.Parameter(torch.zeros(1))], "lr": 1.0}])


def test_a_parameter_without_gradient_is_neither_moved_nor_decayed():
    for adam in (
        OptimizerSettings(weight_decay=0.5),
        OptimizerSettings(eight_bit=True, weight_decay=0.5),
        OptimizerSettings("Prodigy", weight_decay=0.5),
        OptimizerSettings("Muon", weight_decay=0.5),
    ):
        moved, left = nn.Parameter(torch.ones(3)), nn.Parameter(torch.ones(3))
        optimizer = adam.optimizer([{"params": [moved, left], "lr": 1.0}])
        moved.grad = torch.ones(3)
        optimizer.step()
        assert not torch.equal(moved, torch.ones(3))
        assert torch.equal(left, torch.ones(3))


def test_parameters_hold_their_average_within_the_context_only():
    parameters = [nn.Parameter(torch.zeros(2)), nn.Parameter(torch.zeros(3))]
    optimizer = OptimizerSettings().optimizer([{"params": parameters[:1], "lr": 1.0}, {"params": parameters[1:], "lr": 2.0}])
    ema = EMAModel(trainable_parameters(optimizer), decay=0.5)
    average = 0.0
    for step in range(1, 6):
        with torch.no_grad():
            for parameter in parameters:
                parameter.fill_(step)
        ema.step(trainable_parameters(optimizer))
        decay = min(0.5, step / (9 + step)) if step > 1 else 0.0
        average = decay * average + (1 - decay) * step
    with averaged(ema, optimizer):
        assert all(torch.allclose(parameter, torch.tensor(average)) for parameter in parameters)
    assert all(torch.equal(parameter, torch.full_like(parameter, 5.0)) for parameter in parameters)


def test_without_an_average_parameters_are_unchanged():
    parameter = nn.Parameter(torch.ones(2))
    with averaged(None, OptimizerSettings().optimizer([{"params": [parameter], "lr": 1.0}])):
        assert torch.equal(parameter, torch.ones(2))
