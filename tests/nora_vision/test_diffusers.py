"""diffusers handles NoRA like LoRA: the oracle is a LoRA adapter with the same weight changes."""

import copy

import pytest
import torch
from peft import LoraConfig
from small_models import change_weights, config_for
from tiny_pipeline import tiny_pipeline, tiny_unet

from nora_vision.layer import nora_layers

TARGETS = ["to_q", "to_v", "to_out.0", "proj_in", "ff.net.2", "conv1"]
SCALES_BY_BLOCK = {"down": 0.3, "mid": 0.7, "up": {"block_0": 0.1, "block_1": 0.9}}


def unet_output(unet, **kwargs):
    generator = torch.Generator().manual_seed(7)
    sample, context = torch.randn(2, 4, 8, 8, generator=generator), torch.randn(2, 7, 40, generator=generator)
    conditions = {"text_embeds": torch.randn(2, 24, generator=generator), "time_ids": torch.randn(2, 6, generator=generator)}
    with torch.no_grad():
        return unet(sample, 3, context, added_cond_kwargs=conditions, **kwargs).sample


def add_same_change_as_lora(unet, adapter_name, source):
    """Add a LoRA adapter to `unet` that changes every weight as the NoRA adapter of `source` does."""
    factors = {name: layer.low_rank_factors(adapter_name) for name, layer in nora_layers(source).items()}
    unet.add_adapter(LoraConfig(r=4, lora_alpha=4, target_modules=TARGETS), adapter_name)
    for name, (up, down) in factors.items():
        lora, weight = unet.get_submodule(name), source.get_submodule(name).weight
        lora.lora_B[adapter_name].weight.data = up.reshape(lora.lora_B[adapter_name].weight.shape)
        lora.lora_A[adapter_name].weight.data = down.reshape(4, *weight.shape[1:])


@pytest.fixture(scope="module")
def original_pair():
    """A UNet with NoRA adapters "a" and "b", and its LoRA twin."""
    torch.manual_seed(0)
    nora = tiny_unet().eval()
    lora = tiny_unet().eval()
    lora.load_state_dict(nora.state_dict())
    for name in ("a", "b"):
        nora.add_adapter(config_for(TARGETS, r=4, alpha=2.0), name)
        change_weights(nora)
        add_same_change_as_lora(lora, name, nora)
    return nora, lora


@pytest.fixture
def pair(original_pair):
    """A copy of the pair, which the test may change."""
    return copy.deepcopy(original_pair)


def both(pair, action, **kwargs):
    """Do `action` to both UNets, compare their outputs, and return NoRA's."""
    for unet in pair:
        action(unet)
    nora, lora = (unet_output(unet, **kwargs) for unet in pair)
    torch.testing.assert_close(nora, lora, rtol=1e-3, atol=1e-3)
    return nora


def test_the_last_adapter_added_is_active(pair):
    both(pair, lambda unet: None)
    assert pair[0].active_adapters() == pair[1].active_adapters() == ["b"]


@pytest.mark.parametrize(
    ("names", "weights"),
    [
        ("a", None),
        ("a", 0.4),
        (["a", "b"], None),
        (["a", "b"], [0.5, -0.3]),
        ("b", SCALES_BY_BLOCK),
        (["a", "b"], [SCALES_BY_BLOCK, 2.0]),
    ],
)
def test_set_adapters_takes_names_and_weights(pair, names, weights):
    before = unet_output(pair[0])
    after = both(pair, lambda unet: unet.set_adapters(names, weights))
    assert not torch.allclose(before, after)


def test_the_scale_of_one_call_applies_to_that_call_alone(pair):
    before = unet_output(pair[0])
    scaled = both(pair, lambda unet: None, cross_attention_kwargs={"scale": 0.3})
    assert not torch.allclose(before, scaled)
    none = both(pair, lambda unet: None, cross_attention_kwargs={"scale": 0.0})
    torch.testing.assert_close(both(pair, lambda unet: None), before)
    torch.testing.assert_close(both(pair, lambda unet: unet.disable_lora()), none, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(("names", "scale"), [(None, 0.6), (["a"], 1.0), (["a", "b"], 0.6)])
def test_fusing_and_unfusing(pair, names, scale):
    both(pair, lambda unet: unet.set_adapters(["a", "b"], [0.5, 0.8]))
    weights = {name: layer.get_base_layer().weight.clone() for name, layer in nora_layers(pair[0]).items()}
    both(pair, lambda unet: unet.fuse_lora(scale, safe_fusing=True, adapter_names=names))
    both(pair, lambda unet: unet.unfuse_lora())
    for name, layer in nora_layers(pair[0]).items():
        torch.testing.assert_close(layer.get_base_layer().weight, weights[name], rtol=1e-4, atol=1e-5)


def test_disabling_gives_the_base_model_and_enabling_the_adapter_again(pair):
    before = unet_output(pair[0])
    disabled = both(pair, lambda unet: unet.disable_lora())
    assert not torch.allclose(disabled, before)
    assert torch.equal(both(pair, lambda unet: unet.enable_lora()), before)
    assert torch.equal(both(pair, lambda unet: unet.disable_adapters()), disabled)
    assert torch.equal(both(pair, lambda unet: unet.enable_adapters()), before)


def test_deleting_adapters_one_by_one_ends_at_the_base_model(pair):
    disabled = both(pair, lambda unet: unet.disable_lora())
    both(pair, lambda unet: unet.enable_lora())
    both(pair, lambda unet: unet.delete_adapters("b"))
    assert list(pair[0].peft_config) == ["a"]
    last = both(pair, lambda unet: unet.delete_adapters(["a"]))
    assert torch.equal(last, disabled)
    pair[0].add_adapter(config_for(TARGETS, r=4), "a")
    assert not torch.allclose(unet_output(pair[0]), disabled)


def test_unloading_gives_a_plain_model_back(pair):
    disabled = both(pair, lambda unet: unet.disable_lora())
    assert torch.equal(both(pair, lambda unet: unet.unload_lora()), disabled)
    assert not nora_layers(pair[0])
    assert [name for name, _ in pair[0].named_modules()] == [name for name, _ in tiny_unet().named_modules()]


def test_a_half_precision_unet_trains_float32_factors():
    unet = tiny_unet().to(torch.bfloat16).requires_grad_(False)
    unet.add_adapter(config_for(["to_q"]))
    assert {p.dtype for p in unet.parameters() if p.requires_grad} == {torch.float32}
    assert {layer.nora_A["default"].dtype for layer in nora_layers(unet).values()} == {torch.bfloat16}


def test_a_pipeline_drives_unet_and_text_encoders_together():
    pipe = tiny_pipeline()

    def embeds_and_sample():
        with torch.no_grad():
            prompt, _, pooled, _ = pipe.encode_prompt("a red star", do_classifier_free_guidance=False)
        conditions = {"text_embeds": pooled, "time_ids": torch.zeros(1, 6)}
        with torch.no_grad():
            sample = pipe.unet(torch.ones(1, 4, 8, 8), 3, prompt, added_cond_kwargs=conditions).sample
        return torch.cat([prompt.flatten(), pooled.flatten(), sample.flatten()])

    base = embeds_and_sample()
    for name in ("a", "b"):
        pipe.unet.add_adapter(config_for(TARGETS, r=4), name)
        pipe.text_encoder.add_adapter(config_for(["q_proj"]), name)
        pipe.text_encoder_2.add_adapter(config_for(["fc1"]), name)
    pipe.set_adapters(["a", "b"], [1.0, 0.5])
    assert pipe.get_list_adapters() == {c: ["a", "b"] for c in ("unet", "text_encoder", "text_encoder_2")}
    adapted = embeds_and_sample()
    assert not torch.allclose(adapted, base)
    pipe.fuse_lora(components=["unet", "text_encoder", "text_encoder_2"])
    assert pipe.num_fused_loras == 2
    torch.testing.assert_close(embeds_and_sample(), adapted, rtol=1e-3, atol=1e-3)
    pipe.unfuse_lora(components=["unet", "text_encoder", "text_encoder_2"])
    torch.testing.assert_close(embeds_and_sample(), adapted, rtol=1e-3, atol=1e-3)
    pipe.disable_lora()
    torch.testing.assert_close(embeds_and_sample(), base, rtol=1e-4, atol=1e-4)
    pipe.enable_lora()
    pipe.delete_adapters(["a", "b"])
    torch.testing.assert_close(embeds_and_sample(), base, rtol=1e-4, atol=1e-4)
