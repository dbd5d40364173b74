"""Adapters saved by PEFT, and all ways in which PEFT loads them."""

import pytest
import torch
from peft import (
    PeftModel,
    get_peft_model,
    get_peft_model_state_dict,
    inject_adapter_in_model,
    set_peft_model_state_dict,
)
from safetensors.torch import load_file
from small_models import MODELS, change_weights, config_for, output

from nora_vision.layer import nora_layers

STARTS = {
    "svd": {"init_weights": True},
    "random": {"init_weights": False},
    "preserved": {"init_weights": True, "preserve_output": True, "inner_init": "gaussian"},
}


@pytest.fixture(params=MODELS)
def kind(request):
    return request.param


@pytest.fixture(params=STARTS)
def start(request):
    return STARTS[request.param]


def trained(kind, adapter_name="default", **fields):
    """A PEFT model with a changed adapter, its inputs and its output."""
    model, inputs, targets = MODELS[kind]()
    model = get_peft_model(model, config_for(targets, **fields), adapter_name).eval()
    change_weights(model)
    return model, inputs, output(model, inputs)


@pytest.mark.parametrize("low_cpu_mem_usage", [False, True])
@pytest.mark.parametrize("is_trainable", [False, True])
def test_from_pretrained_gives_the_same_output_to_the_bit(kind, start, low_cpu_mem_usage, is_trainable, tmp_path):
    model, inputs, expected = trained(kind, **start)
    model.save_pretrained(tmp_path)
    base, _, _ = MODELS[kind]()
    loaded = PeftModel.from_pretrained(base, tmp_path, low_cpu_mem_usage=low_cpu_mem_usage, is_trainable=is_trainable).eval()
    assert torch.equal(output(loaded, inputs), expected)
    assert not any(tensor.is_meta for tensor in loaded.state_dict().values())
    trainable = {name for name, p in loaded.named_parameters() if p.requires_grad}
    assert trainable == ({name for name, p in model.named_parameters() if p.requires_grad} if is_trainable else set())


def test_saved_keys_are_free_of_the_adapters_name(kind, tmp_path):
    model, _, _ = trained(kind, "some_name", preserve_output=True)
    model.save_pretrained(tmp_path)
    keys = load_file(tmp_path / "some_name" / "adapter_model.safetensors").keys()
    names = [name.removeprefix("base_model.model.") for name in nora_layers(model)]
    state = ("nora_A", "nora_B", "nora_inner_A", "nora_inner_B", "nora_inner_A0", "nora_inner_B0", "nora_activation_scale")
    assert keys == {f"base_model.model.{name}.{entry}" for name in names for entry in state}


def test_without_preserve_output_no_frozen_start_is_saved(kind):
    model, _, _ = trained(kind)
    assert {key.rsplit(".", 1)[1] for key in get_peft_model_state_dict(model)} == {
        "nora_A", "nora_B", "nora_inner_A", "nora_inner_B", "nora_activation_scale",
    }  # fmt: skip


def test_an_adapter_is_loaded_under_another_name_beside_the_first(kind, tmp_path):
    model, inputs, expected = trained(kind)
    model.save_pretrained(tmp_path)
    base, _, targets = MODELS[kind]()
    other = get_peft_model(base, config_for(targets), "first").eval()
    first = output(other, inputs)
    other.load_adapter(tmp_path, "second")
    assert torch.equal(output(other, inputs), first)
    other.set_adapter("second")
    assert torch.equal(output(other, inputs), expected)


@pytest.mark.parametrize("low_cpu_mem_usage", [False, True])
@pytest.mark.parametrize("from_keys", [False, True])
def test_a_state_dict_is_injected_into_a_plain_model(kind, start, low_cpu_mem_usage, from_keys):
    model, inputs, expected = trained(kind, **start)
    state_dict = {key.removeprefix("base_model.model."): value for key, value in get_peft_model_state_dict(model).items()}
    plain, _, targets = MODELS[kind]()
    arguments = {"state_dict": state_dict} if from_keys else {}
    config = config_for(targets, **start)
    inject_adapter_in_model(config, plain, "other", low_cpu_mem_usage=low_cpu_mem_usage, **arguments)
    result = set_peft_model_state_dict(plain, state_dict, "other", low_cpu_mem_usage=low_cpu_mem_usage)
    assert not result.unexpected_keys
    assert not [key for key in result.missing_keys if "nora_" in key]
    assert torch.equal(output(plain, inputs), expected)


def test_the_keys_of_a_state_dict_determine_the_adapted_layers(kind):
    model, inputs, expected = trained(kind)
    state_dict = {key.removeprefix("base_model.model."): value for key, value in get_peft_model_state_dict(model).items()}
    plain, _, _ = MODELS[kind]()
    with pytest.warns(RuntimeWarning, match="an inconsistency was discovered"):
        inject_adapter_in_model(config_for(r"first|.*\.0\..*c_attn|.*\.0\..*fc1"), plain, state_dict=state_dict)
    set_peft_model_state_dict(plain, state_dict)
    assert torch.equal(output(plain, inputs), expected)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("low_cpu_mem_usage", [False, True])
def test_half_precision_models_are_loaded_with_float32_trained_factors(dtype, low_cpu_mem_usage, tmp_path):
    base, inputs, targets = MODELS["linear"]()
    model = get_peft_model(base.to(dtype), config_for(targets, init_weights=True))
    change_weights(model)
    model.save_pretrained(tmp_path)
    base, _, _ = MODELS["linear"]()
    loaded = PeftModel.from_pretrained(base.to(dtype), tmp_path, low_cpu_mem_usage=low_cpu_mem_usage)
    assert loaded.base_model.model.first.nora_inner_A["default"].dtype == torch.float32
    assert loaded.base_model.model.first.nora_A["default"].dtype == dtype
    inputs = (inputs[0].to(dtype),)
    assert torch.equal(output(loaded, inputs), output(model, inputs))


def test_modules_to_save_are_saved_and_loaded(tmp_path):
    model, inputs, expected = trained("linear", modules_to_save=["head"])
    model.save_pretrained(tmp_path)
    base, _, _ = MODELS["linear"]()
    assert torch.equal(output(PeftModel.from_pretrained(base, tmp_path), inputs), expected)


def test_a_saved_rank_pattern_gives_the_same_shapes_again(tmp_path):
    model, inputs, expected = trained("linear", rank_pattern={"second": 6}, inner_rank_pattern={"first": 2})
    model.save_pretrained(tmp_path)
    base, _, _ = MODELS["linear"]()
    assert torch.equal(output(PeftModel.from_pretrained(base, tmp_path), inputs), expected)


def test_an_adapter_saved_from_a_merged_model_is_the_adapter(kind, tmp_path):
    model, inputs, expected = trained(kind)
    model.merge_adapter()
    model.save_pretrained(tmp_path)
    base, _, _ = MODELS[kind]()
    assert torch.equal(output(PeftModel.from_pretrained(base, tmp_path), inputs), expected)


def test_an_adapter_without_its_weights_is_refused_when_it_is_used():
    base, inputs, targets = MODELS["linear"]()
    model = get_peft_model(base, config_for(targets, init_weights=True, inference_mode=True))
    with pytest.raises(ValueError, match="outer factors of NoRA adapter 'default' are not set"):
        output(model, inputs)


@pytest.mark.parametrize("kind", ["conv1d", "text_encoder"])
def test_transformers_saves_and_loads_the_adapter_of_its_own_model(kind, tmp_path):
    model, inputs, targets = MODELS[kind]()
    model.add_adapter(config_for(targets, preserve_output=True), "first")
    change_weights(model)
    model.save_pretrained(tmp_path)
    plain, _, _ = MODELS[kind]()
    plain.load_adapter(str(tmp_path), adapter_name="second")
    assert torch.equal(output(plain, inputs), output(model, inputs))


def test_the_state_dict_of_the_whole_model_restores_it(kind):
    model, inputs, expected = trained(kind, preserve_output=True)
    base, _, targets = MODELS[kind]()
    other = get_peft_model(base, config_for(targets, init_weights=True, outer_init="awsvd", preserve_output=True))
    other.load_state_dict(model.state_dict())
    assert torch.equal(output(other, inputs), expected)
