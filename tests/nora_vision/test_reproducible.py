"""Outer factors are decomposed once: records avoid a second decomposition, and are used only while valid."""

import copy

import pytest
import torch
from peft import get_peft_model, inject_adapter_in_model
from small_models import MODELS, change_weights, config_for, mlp
from torch import nn

from nora_vision import calibrate, decomposition, initialization, initialize_nora_weights
from nora_vision.files import AdapterFileError
from nora_vision.layer import nora_layers
from nora_vision.loading import load_adapter
from nora_vision.reproducible import is_reproducible, record_reproducible
from nora_vision.saving import save_adapter

REFUSED = "must be that of the adapter"


@pytest.fixture
def decompositions(monkeypatch):
    """A list with one entry per decomposition."""
    calls = []
    once = decomposition.awsvd
    monkeypatch.setattr(decomposition, "awsvd", lambda *given, **more: (calls.append(1), once(*given, **more))[1])
    return calls


def started(kind="linear", **fields):
    """A model with a NoRA adapter, initialised from activations and then changed."""
    model, inputs, targets = MODELS[kind]()
    model = get_peft_model(model, config_for(targets, **{"init_weights": True, "outer_init": "awsvd"} | fields))
    initialize_nora_weights(model, calibrate(model, lambda: model(*inputs)))
    change_weights(model)
    return model


def first_layer(model):
    return next(iter(nora_layers(model).values()))


@pytest.mark.parametrize("kind", MODELS)
def test_one_decomposition_per_layer_is_enough_for_initialisation_and_all_saves(kind, decompositions, tmp_path):
    model = started(kind)
    assert len(decompositions) == len(nora_layers(model))
    for step in range(3):
        change_weights(model, seed=step)
        save_adapter(model, tmp_path / str(step), compact=True)
        save_adapter(model, tmp_path / f"full-{step}")
    assert len(decompositions) == len(nora_layers(model))


def test_a_loaded_full_adapter_is_decomposed_only_at_its_first_compact_save(decompositions, tmp_path):
    save_adapter(started(), tmp_path / "full")
    base, _, _ = mlp()
    load_adapter(base, tmp_path / "full")
    decompositions.clear()
    for step in range(2):
        save_adapter(base, tmp_path / str(step), compact=True)
    assert len(decompositions) == len(nora_layers(base))


def test_a_loaded_compact_adapter_is_not_decomposed_again(decompositions, tmp_path):
    save_adapter(started(), tmp_path / "first", compact=True)
    base, _, _ = mlp()
    decompositions.clear()
    load_adapter(base, tmp_path / "first")
    save_adapter(base, tmp_path / "second", compact=True)
    assert len(decompositions) == len(nora_layers(base))
    first, second = ((tmp_path / name / "adapter_model.safetensors").read_bytes() for name in ("first", "second"))
    assert first == second


def test_a_loaded_checkpoint_copies_the_outer_factors_of_the_adapter_in_training(decompositions, tmp_path):
    model = started().base_model.model
    save_adapter(model, tmp_path / "kept", compact=True)
    change_weights(model)
    decompositions.clear()
    load_adapter(model, tmp_path / "kept", "kept")
    assert not decompositions
    base, _, _ = mlp()
    load_adapter(base, tmp_path / "kept")
    for beside, alone in zip(nora_layers(model).values(), nora_layers(base).values(), strict=True):
        assert torch.equal(beside.get_delta_weight("kept"), alone.get_delta_weight("default"))
        assert beside.nora_B["kept"].data_ptr() != beside.nora_B["default"].data_ptr()


@pytest.mark.parametrize("difference", ["rank", "scale", "changed factors"])
def test_an_adapter_of_another_source_is_decomposed(difference, decompositions, tmp_path):
    other = started(r=6) if difference == "rank" else started()
    if difference == "scale":
        inputs = torch.randn(7, 20) * torch.linspace(0.1, 3.0, 20)
        initialize_nora_weights(other, calibrate(other, lambda: other(inputs)))
        change_weights(other)
    save_adapter(other, tmp_path / "other", compact=True)
    model = started().base_model.model
    if difference == "changed factors":
        for layer in nora_layers(model).values():
            layer.nora_B["default"].data.mul_(1.5)
    decompositions.clear()
    load_adapter(model, tmp_path / "other", "other")
    assert len(decompositions) == len(nora_layers(model))
    for ours, theirs in zip(nora_layers(model).values(), nora_layers(other).values(), strict=True):
        torch.testing.assert_close(ours.get_delta_weight("other"), theirs.get_delta_weight("default"))


def earlier_factors(weight, rank):
    """The outer factors (out, rank) and (rank, in) of a weight (out, in) by the subspace iteration of earlier versions."""
    generator = torch.Generator().manual_seed(0)
    Q = torch.linalg.qr(weight @ torch.randn(weight.shape[1], rank + 16, generator=generator, dtype=torch.float64)).Q
    for _ in range(2):
        Q = torch.linalg.qr(weight @ torch.linalg.qr(weight.T @ Q).Q).Q
    U, S, V = torch.linalg.svd(Q @ Q.T @ weight, full_matrices=False)
    signs = V[:rank].gather(1, V[:rank].abs().argmax(dim=1, keepdim=True)).sign()
    return U[:, :rank] * S[:rank] * signs.T, V[:rank] * signs


@pytest.mark.parametrize("beside", [False, True], ids=["alone", "beside an adapter of this version"])
def test_a_compact_file_of_an_earlier_version_loads_and_is_saved_again_unchanged(beside, tmp_path):
    torch.manual_seed(0)
    base = nn.Sequential(nn.Linear(80, 72))
    model = get_peft_model(base, config_for(["0"], init_weights=True))
    layer = first_layer(model)
    change_weights(model)
    saved_now = layer.get_delta_weight("default")
    layer.set_outer_factors("default", *earlier_factors(layer.get_base_layer().weight.detach().double(), layer.r["default"]))
    earlier = layer.get_delta_weight("default")
    assert (earlier - saved_now).norm() > 0.01 * earlier.norm()
    save_adapter(model, tmp_path / "earlier", compact=True)

    other = nn.Sequential(nn.Linear(80, 72))
    other.load_state_dict({"0.weight": layer.get_base_layer().weight, "0.bias": layer.get_base_layer().bias})
    if beside:
        inject_adapter_in_model(config_for(["0"], init_weights=True), other, "present")
        record_reproducible(first_layer(other), "present")
    load_adapter(other, tmp_path / "earlier", "earlier")
    torch.testing.assert_close(first_layer(other).get_delta_weight("earlier"), earlier)
    save_adapter(other, tmp_path / "again", "earlier", compact=True)
    first, second = ((tmp_path / name / "adapter_model.safetensors").read_bytes() for name in ("earlier", "again"))
    assert first == second


def added_in_place(layer):
    with torch.no_grad():
        layer.get_base_layer().weight.add_(torch.randn_like(layer.get_base_layer().weight))


def added_to_data(layer):
    weight = layer.get_base_layer().weight
    weight.data.add_(torch.randn_like(weight))


def other_data(layer):
    layer.get_base_layer().weight.data = torch.randn_like(layer.get_base_layer().weight)


def negated(layer):
    layer.get_base_layer().weight.data[0].neg_()


def merged(layer):
    layer.merge()


def factors_set(layer):
    layer.set_outer_factors("default", torch.randn_like(layer.nora_B["default"]), layer.nora_A["default"])


def factors_loaded(layer):
    state = {name: torch.randn_like(value) for name, value in layer.state_dict().items() if "nora_A" in name or "nora_B" in name}
    layer.load_state_dict(state, strict=False)


def factor_changed_in_place(layer):
    layer.nora_A["default"].data[0].mul_(2.0)


def scale_changed(layer):
    layer.nora_activation_scale["default"].data[:10].mul_(0.01)


CHANGES = [added_in_place, added_to_data, other_data, negated, merged]
CHANGES += [factors_set, factors_loaded, factor_changed_in_place, scale_changed]


@pytest.mark.parametrize("change", CHANGES)
def test_a_changed_weight_scale_or_factor_is_detected_and_refused(change, decompositions, tmp_path):
    torch.manual_seed(0)
    model = started()
    save_adapter(model, tmp_path / "first", compact=True)
    decompositions.clear()
    change(first_layer(model))
    with pytest.raises(AdapterFileError, match=REFUSED):
        save_adapter(model, tmp_path / "second", compact=True)
    assert decompositions
    assert not (tmp_path / "second").exists()


def test_a_refused_adapter_is_saved_after_the_change_is_undone(decompositions, tmp_path):
    model = started()
    layer = first_layer(model)
    before = layer.get_base_layer().weight.detach().clone()
    model.merge_adapter()
    with pytest.raises(AdapterFileError, match=REFUSED):
        save_adapter(model, tmp_path / "merged", compact=True)
    model.unmerge_adapter()
    for one in nora_layers(model).values():
        assert not one.merged
    layer.get_base_layer().weight.data = before
    decompositions.clear()
    save_adapter(model, tmp_path / "unmerged", compact=True)
    assert is_reproducible(layer, "default")


@pytest.mark.parametrize("moved", ["new parameter", "copied model", "other strides"])
def test_records_stay_valid_if_values_are_moved(moved, decompositions, tmp_path):
    model = started()
    decompositions.clear()
    model = copy.deepcopy(model) if moved == "copied model" else model
    for layer in nora_layers(model).values():
        base = layer.get_base_layer()
        if moved == "new parameter":
            base.weight = nn.Parameter(base.weight.detach().clone(), requires_grad=False)
        if moved == "other strides":
            base.weight.data = base.weight.data.T.contiguous().T
    save_adapter(model, tmp_path, compact=True)
    assert not decompositions


def test_a_cast_base_weight_is_another_weight(decompositions, tmp_path):
    model = started()
    decompositions.clear()
    model.to(torch.bfloat16).to(torch.float32)
    with pytest.raises(AdapterFileError, match=REFUSED):
        save_adapter(model, tmp_path, compact=True)
    assert decompositions


def test_factors_with_a_zero_weight_change_are_not_recorded(tmp_path):
    base, _, targets = mlp()
    model = get_peft_model(base, config_for(targets, init_weights=True, outer_init="svd", inner_init="zero"))
    layer = first_layer(model)
    layer.set_outer_factors("default", torch.randn_like(layer.nora_B["default"]), torch.randn_like(layer.nora_A["default"]))
    save_adapter(model, tmp_path / "zero", compact=True)
    change_weights(model)
    with pytest.raises(AdapterFileError, match=REFUSED):
        save_adapter(model, tmp_path / "trained", compact=True)


def test_a_deleted_adapter_leaves_nothing_behind(tmp_path):
    model = started()
    layer = first_layer(model)
    assert set(layer.reproducible) == {"default"}
    model.delete_adapter("default")
    assert not layer.reproducible


def test_a_compared_weight_can_be_resized_as_fsdp_does():
    layer = first_layer(started())
    weight = layer.get_base_layer().weight
    weight.data = weight.data.clone()
    assert is_reproducible(layer, "default")
    weight.untyped_storage().resize_(0)


@pytest.mark.parametrize("sharded", [False, True])
def test_the_outer_factors_of_earlier_versions_can_be_restored_and_are_reproducible(sharded, tmp_path):
    torch.manual_seed(0)
    model = get_peft_model(nn.Sequential(nn.Linear(80, 72)), config_for(["0"], init_weights=True))
    layer, base = first_layer(model), first_layer(model).get_base_layer()
    expected = earlier_factors(base.weight.detach().double(), layer.r["default"])
    assert (layer.nora_B["default"] - expected[0]).norm() > 0.01 * expected[0].norm()
    if sharded:
        torch.distributed.init_process_group("gloo", init_method=f"file://{tmp_path / 'store'}", rank=0, world_size=1)
        mesh = torch.distributed.init_device_mesh("cpu", (1,))
        base.weight = nn.Parameter(torch.distributed.tensor.distribute_tensor(base.weight.detach(), mesh))
    try:
        initialization.use_decomposition(model, "default", decomposition.EARLIER)
        assert is_reproducible(layer, "default")
    finally:
        if sharded:
            torch.distributed.destroy_process_group()
    for actual, factor in zip((layer.nora_B["default"], layer.nora_A["default"]), expected, strict=True):
        torch.testing.assert_close(actual.double(), factor, atol=1e-5, rtol=1e-5)
    assert initialization.decomposition_of(model, "default") == decomposition.EARLIER
