"""The requirements of PEFT's own tests for tuners, on every kind of layer. See also test_saving.py and test_injection.py."""

import pytest
import torch
from peft import get_peft_model
from small_models import MODELS, change_weights, config_for, output

from nora_vision.layer import nora_layers

TOLERANCE = {"rtol": 1e-4, "atol": 1e-4}


@pytest.fixture(params=MODELS)
def kind(request):
    return request.param


def with_adapters(kind, *names, **fields):
    """A PEFT model with the adapters named, the first one active, its inputs, and the base model's output."""
    model, inputs, targets = MODELS[kind]()
    before = output(model, inputs).detach()
    peft_model = get_peft_model(model, config_for(targets, **fields), adapter_name=names[0]).eval()
    for name in names[1:]:
        peft_model.add_adapter(name, config_for(targets, **fields))
    return peft_model, inputs, before


def test_the_default_start_is_the_base_model_and_a_random_start_is_not(kind):
    model, inputs, before = with_adapters(kind, "default", init_weights=True)
    assert torch.equal(output(model, inputs), before)
    model, inputs, before = with_adapters(kind, "default", init_weights=False)
    assert not torch.allclose(output(model, inputs), before, **TOLERANCE)


def test_only_adapter_parameters_train_and_they_do(kind):
    model, inputs, _ = with_adapters(kind, "default")
    before = {name: parameter.clone() for name, parameter in model.named_parameters()}
    trained = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    assert all(".nora_inner_" in name for name in trained)
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=1.0)
    output(model, inputs).square().sum().backward()
    optimizer.step()
    changed = {name for name, parameter in model.named_parameters() if not torch.equal(parameter, before[name])}
    assert changed == trained
    assert all(parameter.grad is None for name, parameter in model.named_parameters() if name not in trained)


def test_frozen_outer_factors_stay_as_they_are_in_training(kind):
    model, inputs, _ = with_adapters(kind, "default")
    layer = next(iter(nora_layers(model).values()))
    A, B = layer.nora_A["default"].clone(), layer.nora_B["default"].clone()
    output(model.train(), inputs).square().sum().backward()
    torch.optim.AdamW([p for p in model.parameters() if p.requires_grad]).step()
    assert torch.equal(layer.nora_A["default"], A)
    assert torch.equal(layer.nora_B["default"], B)


@pytest.mark.parametrize("safe_merge", [False, True])
def test_merging_keeps_the_output_and_unmerging_restores_the_weights(kind, safe_merge):
    model, inputs, before = with_adapters(kind, "default")
    adapted = output(model, inputs)
    model.merge_adapter(safe_merge=safe_merge)
    torch.testing.assert_close(output(model, inputs), adapted, **TOLERANCE)
    model.unmerge_adapter()
    torch.testing.assert_close(output(model, inputs), adapted, **TOLERANCE)
    with model.disable_adapter():
        torch.testing.assert_close(output(model, inputs), before, **TOLERANCE)


def test_merging_twice_is_merging_once(kind):
    model, inputs, _ = with_adapters(kind, "default")
    adapted = output(model, inputs)
    model.merge_adapter()
    with pytest.warns(UserWarning, match="All adapters are already merged"):
        model.merge_adapter()
    torch.testing.assert_close(output(model, inputs), adapted, **TOLERANCE)
    model.unmerge_adapter()
    with pytest.warns(UserWarning, match="Already unmerged"):
        model.unmerge_adapter()
    torch.testing.assert_close(output(model, inputs), adapted, **TOLERANCE)


def test_merge_and_unload_leaves_a_plain_model_with_the_adapted_output(kind):
    model, inputs, _ = with_adapters(kind, "default")
    adapted = output(model, inputs)
    names = {name for name, _ in MODELS[kind]()[0].named_modules()}
    merged = model.merge_and_unload()
    torch.testing.assert_close(output(merged, inputs), adapted, **TOLERANCE)
    assert {name for name, _ in merged.named_modules()} == names


def test_unload_leaves_the_base_model(kind):
    model, inputs, before = with_adapters(kind, "default")
    assert torch.equal(output(model.unload(), inputs), before)


def test_several_adapters_merge_one_after_the_other_as_they_do_at_once(kind):
    one_by_one, inputs, _ = with_adapters(kind, "default", "other")
    at_once, _, _ = with_adapters(kind, "default", "other")
    at_once.load_state_dict(one_by_one.state_dict())
    one_by_one.merge_adapter(["default"])
    with pytest.warns(UserWarning, match="additionally merging other"):
        one_by_one.merge_adapter(["other"])
    at_once.merge_adapter(["default", "other"])
    torch.testing.assert_close(output(one_by_one, inputs), output(at_once, inputs), **TOLERANCE)
    one_by_one.unmerge_adapter()
    at_once.base_model.set_adapter("default")
    torch.testing.assert_close(output(one_by_one, inputs), output(at_once, inputs), **TOLERANCE)


def test_active_adapters_add_up(kind):
    model, inputs, before = with_adapters(kind, "default", "other")
    first = output(model, inputs)
    model.set_adapter("other")
    second = output(model, inputs)
    assert not torch.allclose(first, second, **TOLERANCE)
    model.base_model.set_adapter(["default", "other"])
    both = output(model, inputs)
    model.merge_adapter()
    torch.testing.assert_close(output(model, inputs), both, **TOLERANCE)
    for layer in nora_layers(model).values():
        assert layer.merged_adapters == ["default", "other"]
    with model.disable_adapter():
        torch.testing.assert_close(output(model, inputs), before, rtol=1e-3, atol=1e-3)


def test_a_mixed_batch_gives_each_sample_its_own_adapter(kind):
    model, inputs, before = with_adapters(kind, "default", "other")
    expected = {"__base__": before, "default": output(model, inputs)}
    model.set_adapter("other")
    expected["other"] = output(model, inputs)
    names = ["other", "__base__", "default", "other", "default"][: len(before)]
    mixed = model(*inputs, adapter_names=names)
    mixed = mixed if isinstance(mixed, torch.Tensor) else mixed.last_hidden_state
    for sample, name in enumerate(names):
        torch.testing.assert_close(mixed[sample], expected[name][sample], **TOLERANCE)
    torch.testing.assert_close(output(model, inputs), expected["other"], rtol=0, atol=0)


def test_mixed_batches_are_refused_in_training_with_unknown_names_a_wrong_count_or_merged_adapters():
    model, inputs, _ = with_adapters("linear", "default")
    with pytest.raises(ValueError, match=r"non-existing adapter\(s\): absent"):
        model(*inputs, adapter_names=["absent"] * 5)
    with pytest.raises(ValueError, match="one adapter for each of the 5 inputs, got 2"):
        model(*inputs, adapter_names=["default"] * 2)
    model.merge_adapter()
    with pytest.raises(ValueError, match="when there are merged adapters"):
        model(*inputs, adapter_names=["default"] * 5)
    with pytest.raises(ValueError, match="in training mode"):
        model.train()(*inputs, adapter_names=["default"] * 5)


@pytest.mark.parametrize("value", [torch.nan, torch.inf])
def test_safe_merge_refuses_values_that_are_not_finite_and_changes_nothing(kind, value):
    model, _, _ = with_adapters(kind, "default")
    layer = next(iter(nora_layers(model).values()))
    layer.nora_inner_A["default"].data[0, 0] = value
    before = [layer.get_base_layer().weight.clone() for layer in nora_layers(model).values()]
    with pytest.raises(ValueError, match=r"NaNs detected in the merged weights\. The adapter default seems to be broken"):
        model.merge_adapter(safe_merge=True)
    for layer, weight in zip(nora_layers(model).values(), before, strict=True):
        assert torch.equal(layer.get_base_layer().weight, weight)
        assert not layer.merged


def test_disabled_adapters_give_the_base_model_and_come_back(kind):
    model, inputs, before = with_adapters(kind, "default")
    adapted = output(model, inputs)
    for _ in range(2):
        with model.disable_adapter():
            assert torch.equal(output(model, inputs), before)
        assert torch.equal(output(model, inputs), adapted)
    assert all(p.requires_grad for name, p in model.named_parameters() if ".nora_inner_" in name)


def test_disabling_merged_adapters_unmerges_them(kind):
    model, inputs, before = with_adapters(kind, "default")
    model.merge_adapter()
    with model.disable_adapter():
        torch.testing.assert_close(output(model, inputs), before, **TOLERANCE)
    assert not any(layer.merged for layer in nora_layers(model).values())


def test_deleting_the_active_adapter_activates_one_that_is_left(kind):
    model, inputs, _ = with_adapters(kind, "default", "other")
    model.set_adapter("other")
    other = output(model, inputs)
    model.set_adapter("default")
    with pytest.warns(UserWarning, match="default was active which is now deleted"):
        model.delete_adapter("default")
    assert model.active_adapters == ["other"]
    assert torch.equal(output(model, inputs), other)
    assert not any("default" in key for key in model.state_dict() if "nora_" in key)


def test_deleting_an_inactive_adapter_changes_nothing(kind):
    model, inputs, _ = with_adapters(kind, "default", "other")
    adapted = output(model, inputs)
    model.delete_adapter("other")
    assert model.active_adapters == ["default"]
    assert torch.equal(output(model, inputs), adapted)


def test_deleting_the_only_adapter_leaves_the_base_model(kind):
    model, inputs, before = with_adapters(kind, "default")
    model.delete_adapter("default")
    assert torch.equal(output(model.base_model, inputs), before)
    assert not any(layer.r for layer in nora_layers(model).values())


def test_deleting_an_unknown_or_a_merged_adapter_is_refused(kind):
    model, inputs, _ = with_adapters(kind, "default")
    adapted = output(model, inputs)
    with pytest.raises(ValueError, match="absent does not exist"):
        model.delete_adapter("absent")
    model.merge_adapter()
    with pytest.raises(ValueError, match=r"Cannot delete adapter\(s\) \['default'\] while they are merged"):
        model.delete_adapter("default")
    torch.testing.assert_close(output(model, inputs), adapted, **TOLERANCE)


def test_deleting_a_merged_adapter_from_a_layer_is_refused():
    model, _, _ = with_adapters("linear", "default")
    model.merge_adapter()
    with pytest.raises(ValueError, match="Cannot delete adapter 'default' while it is merged"):
        next(iter(nora_layers(model).values())).delete_adapter("default")


def test_modules_to_save_are_trained_in_full_for_each_adapter():
    model, inputs, before = with_adapters("linear", "default", modules_to_save=["head"])
    head = model.base_model.model.head
    original = head.original_module.weight.clone()
    assert head.modules_to_save["default"].weight.requires_grad
    assert not head.original_module.weight.requires_grad
    change_weights(model)
    assert torch.equal(head.original_module.weight, original)
    with model.disable_adapter():
        assert torch.equal(output(model, inputs), before)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_models_train_float32_factors_and_keep_outer_factors_in_half(kind, dtype):
    model, inputs, targets = MODELS[kind]()
    model = get_peft_model(model.to(dtype), config_for(targets))
    inputs = tuple(x.to(dtype) if x.is_floating_point() else x for x in inputs)
    for layer in nora_layers(model).values():
        assert layer.nora_A["default"].dtype == layer.nora_B["default"].dtype == dtype
        assert layer.nora_inner_A["default"].dtype == layer.nora_inner_B["default"].dtype == torch.float32
    adapted = output(model, inputs)
    assert adapted.dtype == dtype
    adapted.float().square().mean().backward()
    assert all(p.grad.isfinite().all() for p in model.parameters() if p.requires_grad)
    model.merge_adapter()
    torch.testing.assert_close(output(model, inputs), adapted, rtol=0.1, atol=0.1)


def test_autocast_adapter_dtype_false_keeps_trained_factors_in_the_base_dtype():
    model, inputs, targets = MODELS["linear"]()
    model = get_peft_model(model.bfloat16(), config_for(targets), autocast_adapter_dtype=False)
    assert {p.dtype for p in model.parameters()} == {torch.bfloat16}
    assert output(model, (inputs[0].bfloat16(),)).dtype == torch.bfloat16


def test_a_model_cast_as_a_whole_still_runs(kind):
    model, inputs, _ = with_adapters(kind, "default", preserve_output=True)
    model.bfloat16()
    inputs = tuple(x.bfloat16() if x.is_floating_point() else x for x in inputs)
    assert output(model, inputs).isfinite().all()


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_autocast_stays_close_to_full_precision(kind, dtype):
    model, inputs, _ = with_adapters(kind, "default")
    with torch.autocast("cpu", dtype):
        result = output(model, inputs)
    torch.testing.assert_close(result.float(), output(model, inputs), rtol=0.1, atol=0.1)


def test_peft_reports_the_status_of_the_adapters():
    model, _, _ = with_adapters("linear", "default", "other")
    status = model.get_model_status()
    assert status.available_adapters == ["default", "other"]
    assert status.peft_types == {"default": "NORA", "other": "NORA"}
    assert status.trainable_params == 2 * 2 * 8 * 4
    assert model.base_model.supports_lora_conversion()
