"""Invalid configurations are refused by layer and value, and leave the model unchanged."""

import pytest
import torch
from peft import LoraConfig, get_peft_model, inject_adapter_in_model
from peft.utils.error import NoMatchingPeftModuleError
from small_models import Mlp, config_for, gpt2, mlp, output
from tiny_pipeline import tiny_unet
from torch import nn

from nora_vision import NoraConfig
from nora_vision.layer import nora_layers


def snapshot(model):
    """The state of a model that a refused adapter might change."""
    return (
        [(name, type(module)) for name, module in model.named_modules()],
        [(name, parameter.requires_grad, parameter.dtype) for name, parameter in model.named_parameters()],
        hasattr(model, "peft_config"),
        getattr(model, "_hf_peft_config_loaded", False),
    )


REFUSED = {
    "rank above a layer's": (
        {"r": 25, "target_modules": ["first", "second"]},
        r"r must be in \[1, 20\] for 'first', whose weight is 30 x 20, got 25",
    ),
    "rank pattern above a layer's": (
        {"rank_pattern": {"second": 21}, "target_modules": ["first", "second"]},
        r"r must be in \[1, 20\] for 'second', whose weight is 20 x 30, got 21",
    ),
    "inner rank above a layer's outer rank": (
        {"rank_pattern": {"second": 3}, "target_modules": ["first", "second"]},
        r"inner_r must be in \[1, r=3\] for 'second', got 4",
    ),
    "a rank pattern without a match": (
        {"rank_pattern": {"second": 6, "thrid": 4}, "target_modules": ["first", "second"]},
        r"rank_pattern \['thrid'\] match no adapted layer of Mlp, which has 2: 'first', 'second'\. Remove them",
    ),
    "a rank pattern of a layer that is not adapted": (
        {"rank_pattern": {"head": 3}, "inner_r": 2, "target_modules": ["first"]},
        r"rank_pattern \['head'\] match no adapted layer of Mlp, which has 1: 'first'",
    ),
    "part of a name as a rank pattern": (
        {"rank_pattern": {"econd": 3}, "target_modules": ["first", "second"]},
        r"rank_pattern \['econd'\] match no",
    ),
    "an inner rank pattern without a match": (
        {"inner_rank_pattern": {r".*\.attn1\..*": 2}, "target_modules": ["first", "second"]},
        r"inner_rank_pattern \['.*attn1.*'\] match no adapted layer",
    ),
    "one unknown target": (
        {"target_modules": ["first", "frist"]},
        r"target_modules \['frist'\] match no module of Mlp",
    ),
    "part of a name": ({"target_modules": ["irst"]}, r"target_modules \['irst'\] match no module"),
    "unknown module to save": (
        {"target_modules": ["first"], "modules_to_save": ["tail"]},
        r"modules_to_save \['tail'\] match no module of Mlp",
    ),
    "no targets": ({"target_modules": None}, "Please specify `target_modules`"),
    "a regular expression without a match": ({"target_modules": "third.*"}, "Target modules third.* not found in the base model"),
    "all targets excluded": (
        {"target_modules": ["first"], "exclude_modules": ["first"]},
        "No modules were targeted for adaptation",
    ),
}


@pytest.mark.parametrize(("fields", "message"), REFUSED.values(), ids=REFUSED)
@pytest.mark.parametrize("add", [get_peft_model, lambda model, config: inject_adapter_in_model(config, model)])
def test_a_refused_configuration_leaves_the_model_as_it_was(add, fields, message):
    model, inputs, _ = mlp()
    before, result = snapshot(model), output(model, inputs)
    with pytest.raises((ValueError, NoMatchingPeftModuleError), match=message):
        add(model, NoraConfig(**({"r": 8, "inner_r": 4} | fields)))
    assert snapshot(model) == before
    assert torch.equal(output(model, inputs), result)
    add(model, config_for(["first", "second"]))
    assert len(nora_layers(model)) == 2


@pytest.mark.parametrize(
    ("module", "message"),
    [
        (nn.Conv2d(16, 16, 3, groups=4), "Cannot adapt 'layer': groups must be 1, got 4"),
        (nn.Conv1d(16, 16, 3), "Cannot adapt 'layer': NoRA supports nn.Linear, .* got Conv1d"),
        (nn.Embedding(16, 16), "got Embedding"),
    ],
)
def test_layers_of_other_kinds_are_refused_by_name(module, message):
    model = nn.ModuleDict({"fine": nn.Linear(16, 16), "layer": module})
    before = snapshot(model)
    with pytest.raises(ValueError, match=message):
        inject_adapter_in_model(config_for(["fine", "layer"]), model)
    assert snapshot(model) == before


def test_the_output_projection_of_multihead_attention_is_refused_since_it_is_never_called():
    model = nn.ModuleDict({"attention": nn.MultiheadAttention(16, 2)})
    with pytest.raises(ValueError, match=r"Cannot adapt 'attention.out_proj': .* without calling it"):
        inject_adapter_in_model(config_for(["out_proj"]), model)


def test_a_weight_that_is_not_finite_is_refused_by_name_and_earlier_layers_are_restored():
    model, _, targets = mlp()
    model.second.weight.data[0, 0] = torch.nan
    before = snapshot(model)
    with pytest.raises(ValueError, match="The weight of 'second' must be finite"):
        get_peft_model(model, config_for(targets, init_weights=True))
    assert snapshot(model) == before


def test_a_refused_second_adapter_leaves_the_first_as_it_was():
    model, inputs, targets = mlp()
    model = get_peft_model(model, config_for(targets))
    before, result = snapshot(model), output(model, inputs)
    with pytest.raises(ValueError, match="for 'first'"):
        model.add_adapter("other", config_for(targets, r=21))
    assert snapshot(model) == before
    assert list(model.peft_config) == ["default"]
    assert torch.equal(output(model, inputs), result)


def test_an_adapter_name_in_use_is_refused_and_its_adapter_kept():
    model, inputs, targets = mlp()
    inject_adapter_in_model(config_for(targets), model)
    config, result = model.peft_config["default"], output(model, inputs)
    with pytest.raises(ValueError, match="Adapter with name 'default' already exists"):
        inject_adapter_in_model(config_for(targets), model)
    assert model.peft_config == {"default": config}
    assert torch.equal(output(model, inputs), result)


def test_a_diffusers_model_takes_an_adapter_after_it_refused_one():
    unet = tiny_unet()
    before = snapshot(unet)
    with pytest.raises(ValueError, match=r"r must be in \[1, 16\] for 'down_blocks.1.attentions.0.*to_q'"):
        unet.add_adapter(NoraConfig(r=24, target_modules=["to_q"]))
    assert snapshot(unet) == before
    unet.add_adapter(config_for(["to_q"]))
    with pytest.raises(ValueError, match="match no module"):
        unet.add_adapter(config_for(["absent"]), "other")
    assert list(unet.peft_config) == ["default"]


def test_a_transformers_model_takes_an_adapter_after_it_refused_one():
    model, inputs, targets = gpt2()
    before = snapshot(model)
    with pytest.raises(ValueError, match=r"r must be in \[1, 32\] for 'h.0.attn.c_attn'"):
        model.add_adapter(config_for(targets, r=33))
    assert snapshot(model) == before
    model.add_adapter(config_for(targets))
    assert output(model, inputs).isfinite().all()


def test_only_a_plain_svd_start_warns(recwarn):
    get_peft_model(Mlp(), config_for(["first"], init_weights=True))
    assert "starts from the plain SVD" in str(recwarn.pop(UserWarning).message)
    get_peft_model(Mlp(), config_for(["first"], init_weights=True, outer_init="awsvd"))
    get_peft_model(Mlp(), config_for(["first"], init_weights=False))
    get_peft_model(Mlp(), config_for(["first"], init_weights=True, inference_mode=True))
    assert not [w for w in recwarn if "plain SVD" in str(w.message)]


def test_nora_wraps_layers_with_another_peft_method():
    model, inputs, targets = mlp()
    inject_adapter_in_model(LoraConfig(r=4, target_modules=targets, init_lora_weights=False), model, "lora")
    with_lora = output(model, inputs)
    inject_adapter_in_model(config_for(targets), model, "nora")
    for layer in nora_layers(model).values():
        layer.set_adapter("nora")
        layer.base_layer.set_adapter("lora")
    with_both = output(model, inputs)
    assert not torch.allclose(with_both, with_lora)
    for layer in nora_layers(model).values():
        layer.enable_adapters(False)
    assert torch.equal(output(model, inputs), with_lora)
