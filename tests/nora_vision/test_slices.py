"""Adapters in disjoint slices of one basis: orthogonal by construction, in any order, and refused names for overlaps."""

import copy

import pytest
import torch
from peft import inject_adapter_in_model
from torch import nn

from nora_vision import NoraConfig, calibrate, initialize_nora_weights, load_adapter, save_adapter
from nora_vision.layer import nora_layers
from nora_vision.slices import overlapping_slices

IN, OUT, R = 12, 10, 3


def base():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(IN, OUT), nn.Conv2d(3, 9, 2)).requires_grad_(False)


def run(model):
    generator = torch.Generator().manual_seed(1)
    return lambda: (model[0](torch.randn(30, IN, generator=generator)), model[1](torch.randn(3, 3, 6, 6, generator=generator)))


def add(model, name, outer_slice, scale=1.0, r=R, **options):
    """Add an adapter in a slice, from the statistics of the base model, `scale` unevenly stretched, with random inner factors."""
    config = NoraConfig(r=r, inner_r=2, outer_init="awsvd", target_modules=["0", "1"], outer_slice=outer_slice, **options)
    inject_adapter_in_model(config, model, name)
    statistics = calibrate(model, run(model))
    for key, values in statistics.items():
        statistics._scales[key] = torch.where(torch.arange(len(values)) % 2 == 0, values, scale * values)
    initialize_nora_weights(model, statistics, name, generator=torch.Generator().manual_seed(2))
    for layer in nora_layers(model).values():
        nn.init.normal_(layer.nora_inner_B[name], generator=torch.Generator().manual_seed(len(name)))


def test_slices_are_orthogonal_left_and_in_the_activation_norm_and_so_are_their_changes_of_weight():
    model = base()
    for number in (1, 2, 3):
        add(model, f"subject{number}", f"{number}/3")
    for layer in nora_layers(model).values():
        scale = layer.nora_activation_scale["subject1"].double()
        scale = (scale / scale.mean()).clamp_min(1e-3)
        for i, j in ((1, 2), (1, 3), (2, 3)):
            B_i, B_j = (layer.nora_B[f"subject{k}"].double() for k in (i, j))
            A_i, A_j = (layer.nora_A[f"subject{k}"].double() for k in (i, j))
            assert (B_i.T @ B_j).norm() < 1e-6 * B_i.norm() * B_j.norm()
            assert (A_i * scale**2 @ A_j.T).norm() < 1e-6 * (A_i * scale).norm() * (A_j * scale).norm()
            D_i, D_j = (layer.get_delta_weight(f"subject{k}").flatten(1).double() * scale for k in (i, j))
            assert D_i.norm() > 0.1
            assert (D_i * D_j).sum().abs() < 1e-6 * D_i.norm() * D_j.norm()
            assert (D_i.T @ D_j).norm() < 1e-6 * D_i.norm() * D_j.norm()


def test_all_slices_together_are_the_basis_of_n_times_the_rank():
    model = base()
    add(model, "whole", "1/1", r=3 * R)
    for number in (1, 2, 3):
        add(model, str(number), f"{number}/3")
    for layer in nora_layers(model).values():
        assert torch.equal(torch.stack([layer.nora_B[k] for k in "123"], dim=2).flatten(1), layer.nora_B["whole"])
        assert torch.equal(torch.stack([layer.nora_A[k] for k in "123"], dim=1).flatten(0, 1), layer.nora_A["whole"])


def train(model, name, steps=5):
    """Train one adapter of `model` to its own target, with only this adapter active."""
    for layer in nora_layers(model).values():
        layer.set_adapter(name)
    parameters = [p for n, p in model.named_parameters() if n.endswith(f".{name}")]
    optimizer = torch.optim.Adam(parameters, lr=0.05)
    x = torch.randn(8, IN, generator=torch.Generator().manual_seed(len(name)))
    for _ in range(steps):
        optimizer.zero_grad()
        (model[0](x) - len(name)).square().mean().backward()
        optimizer.step()


def test_subjects_trained_in_either_order_give_the_same_adapters_whose_changes_add_up_exactly():
    forward, backward = base(), base()
    for model, order in ((forward, ("a", "bb")), (backward, ("bb", "a"))):
        for name in order:
            add(model, name, {"a": "1/2", "bb": "2/2"}[name])
            train(model, name)
    ours, theirs = nora_layers(forward)["0"], nora_layers(backward)["0"]
    for name in ("a", "bb"):
        assert torch.equal(ours.get_delta_weight(name), theirs.get_delta_weight(name))
    ours.set_adapter(["a", "bb"])
    x = torch.randn(4, IN)
    both = ours.get_delta_weight("a") + ours.get_delta_weight("bb")
    torch.testing.assert_close(ours(x), ours.get_base_layer()(x) + x @ both.T, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("compact", [False, True])
def test_a_slice_is_saved_and_loads_as_itself_beside_another(compact, tmp_path):
    model = base()
    for name, number in (("a", 1), ("b", 2)):
        add(model, name, f"{number}/2")
        save_adapter(model, tmp_path / name, name, compact=compact)
    fresh = base()
    for name in "ba":
        load_adapter(fresh, tmp_path / name, name)
    for ours, theirs in zip(nora_layers(fresh).values(), nora_layers(model).values(), strict=True):
        for name in "ab":
            torch.testing.assert_close(ours.get_delta_weight(name), theirs.get_delta_weight(name), atol=1e-6, rtol=1e-6)
    assert overlapping_slices(fresh, ["a", "b"]) == []


def test_slices_that_overlap_are_named_with_the_layer_and_the_reason():
    model = base()
    add(model, "first", "1/2")
    add(model, "same", "1/2")
    add(model, "thirds", "2/3")
    add(model, "other inputs", "2/2", scale=1.7)
    add(model, "second", "2/2")
    add(model, "ordinary", "1/1")
    assert overlapping_slices(model, ["first", "second", "ordinary"]) == []
    for other, reason in {
        "same": "both are slice 1/2",
        "thirds": r"1 of 2 slices of rank 3",
        "other inputs": "statistics differ",
    }.items():
        (sentence,) = overlapping_slices(model, ["first", other])
        assert f"'first' and {other!r}" in sentence
        assert reason in sentence
        assert "at '0'" in sentence


@pytest.mark.parametrize("outer_slice", ["0/2", "3/2", "2", "1/0", "a/b", ""])
def test_a_wrong_slice_is_refused_with_an_example(outer_slice):
    with pytest.raises(ValueError, match=r"outer_slice must be i/n with i in \[1, n\], such as 2/4 .*got"):
        NoraConfig(outer_slice=outer_slice)


def test_more_directions_than_the_layer_has_are_refused_by_name_before_anything_changes():
    model = base()
    before = copy.deepcopy(model.state_dict())
    config = NoraConfig(r=4, inner_r=2, target_modules=["0"], outer_slice="1/3")
    with pytest.raises(ValueError, match=r"r must be in \[1, 3\] for '0', whose weight is 10 x 12, got 4 and outer_slice='1/3'"):
        inject_adapter_in_model(config, model)
    assert list(model.state_dict()) == list(before)
