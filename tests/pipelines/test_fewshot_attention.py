"""Separate attention computes the same as packed attention, and repacks to the same state dict."""

import copy

import open_clip
import pytest
import torch
from open_clip.transformer import Attention, LayerNorm
from peft import LoraConfig, inject_adapter_in_model
from timm.layers.attention import Attention as TimmAttention
from timm.layers.attention import AttentionRope
from timm.models.beit import Attention as BeitAttention
from timm.models.eva import EvaAttention
from timm.models.fastvit import Attention as FastVitAttention
from timm.models.maxxvit import AttentionCl
from timm.models.swin_transformer import WindowAttention
from timm.models.swin_transformer_v2 import WindowAttention as WindowAttentionV2
from timm.models.vision_transformer_relpos import RelPosAttention
from tiny_clip import NextAttention, images, prompts, tiny_clip
from torch import nn

from pipelines.clip_attention import SeparateAttention, attention_layers, repack, separate

TOLERANCE = {"atol": 1e-6, "rtol": 0.0}


def filled(module):
    """`module` with random weights and biases."""
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.copy_(0.2 * torch.randn(parameter.shape, generator=generator))
    return module.eval().requires_grad_(False)


def assert_same_state(model, before):
    after = model.state_dict()
    assert list(after) == list(before)
    for name, tensor in before.items():
        assert torch.equal(after[name], tensor), name


@torch.no_grad()
@pytest.mark.parametrize("custom_text", [False, True])
def test_both_encoders_compute_the_same_and_repack_to_the_same_state(custom_text):
    model = tiny_clip(custom_text=custom_text)
    state = copy.deepcopy(model.state_dict())
    pixels, tokens = images(2), prompts(3, 7, 12)
    image, text = model.encode_image(pixels), model.encode_text(tokens)
    assert separate(model) == 5
    assert not any(isinstance(module, nn.MultiheadAttention) for module in model.modules())
    torch.testing.assert_close(model.encode_image(pixels), image, **TOLERANCE)
    torch.testing.assert_close(model.encode_text(tokens), text, **TOLERANCE)
    assert repack(model) == 5
    assert_same_state(model, state)
    assert torch.equal(model.encode_image(pixels), image)


def test_separating_twice_changes_nothing_more():
    model = tiny_clip()
    separate(model)
    layers = list(model.named_modules())
    assert separate(model) == 0
    assert list(model.named_modules()) == layers


def test_gradients_and_flags_are_those_of_the_packed_attention():
    packed = filled(nn.Sequential(nn.MultiheadAttention(16, 2, batch_first=True)))
    model = copy.deepcopy(packed)
    separate(model)
    assert not any(parameter.requires_grad for parameter in model.parameters())
    model.requires_grad_(True)
    packed.requires_grad_(True)
    x = torch.randn(2, 5, 16)
    packed[0](x, x, x, need_weights=False)[0].square().sum().backward()
    model[0](x, x, x, need_weights=False)[0].square().sum().backward()
    grads = [getattr(model[0], f"{layer}_proj").weight.grad for layer in "qkv"]
    torch.testing.assert_close(torch.cat(grads), packed[0].in_proj_weight.grad)
    repack(model)
    assert all(parameter.requires_grad for parameter in model.parameters())


@torch.no_grad()
@pytest.mark.parametrize("batch_first", [False, True])
@pytest.mark.parametrize("mask", ["none", "float", "hidden", "of every head"])
def test_multihead_attention_is_matched_for_every_mask_and_order_of_dimensions(batch_first, mask):
    packed = filled(nn.MultiheadAttention(16, 2, batch_first=batch_first))
    model = nn.Sequential(copy.deepcopy(packed))
    separate(model)
    hidden = torch.ones(5, 5, dtype=torch.bool).triu(1)
    floats = torch.zeros(5, 5).masked_fill(hidden, -torch.inf)
    each = torch.stack([floats * 0 if head % 3 else floats for head in range(3 * 2)]).nan_to_num(0.0, neginf=-torch.inf)
    given = {"none": None, "float": floats, "hidden": hidden, "of every head": each}[mask]
    x = torch.randn(3, 5, 16) if batch_first else torch.randn(5, 3, 16)
    expected = packed(x, x, x, need_weights=False, attn_mask=given)[0]
    torch.testing.assert_close(model[0](x, x, x, need_weights=False, attn_mask=given)[0], expected, **TOLERANCE)


@torch.no_grad()
def test_keys_of_another_width_are_separated_and_repacked():
    packed = filled(nn.Sequential(nn.MultiheadAttention(16, 2, kdim=12, vdim=8, batch_first=True)))
    state = copy.deepcopy(packed.state_dict())
    q, k, v = torch.randn(2, 3, 16), torch.randn(2, 7, 12), torch.randn(2, 7, 8)
    expected = packed[0](q, k, v, need_weights=False)[0]
    separate(packed)
    torch.testing.assert_close(packed[0](q, k, v, need_weights=False)[0], expected, **TOLERANCE)
    repack(packed)
    assert_same_state(packed, state)


@torch.no_grad()
@pytest.mark.parametrize("options", [{}, {"qkv_bias": False}, {"qk_norm": True, "scale_heads": True, "inner_norm": True}])
def test_open_clips_attention_of_this_release_is_matched(options):
    packed = filled(nn.Sequential(Attention(16, 2, norm_layer=LayerNorm, **options)))
    state = copy.deepcopy(packed.state_dict())
    x, hidden = torch.randn(3, 5, 16), torch.ones(5, 5, dtype=torch.bool).triu(1)
    masks = (None, hidden, torch.zeros(5, 5).masked_fill(hidden, -torch.inf))
    expected = [packed[0](x, attn_mask=mask) for mask in masks]
    separate(packed)
    for mask, output in zip(masks, expected, strict=True):
        torch.testing.assert_close(packed[0](x, attn_mask=mask), output, **TOLERANCE)
    repack(packed)
    assert_same_state(packed, state)


@torch.no_grad()
@pytest.mark.parametrize("kdim", [None, 12])
def test_open_clips_attention_of_the_next_release_is_matched(kdim, monkeypatch):
    monkeypatch.setattr(open_clip.transformer, "Attention", NextAttention)
    packed = filled(nn.Sequential(NextAttention(16, 2, kdim)))
    state = copy.deepcopy(packed.state_dict())
    x, keys = torch.randn(3, 5, 16), torch.randn(3, 5, kdim or 16)
    seen = torch.ones(5, 5, dtype=torch.bool).tril()
    calls = [
        {"k_x": keys, "v_x": keys, "attn_mask": mask}
        for mask in (None, seen, torch.zeros(5, 5).masked_fill(~seen, -torch.inf), seen.expand(6, 5, 5))
    ]
    calls += [] if kdim else [{"attn_mask": seen}]
    expected = [packed[0](x, **call) for call in calls]
    separate(packed)
    assert isinstance(packed[0], SeparateAttention)
    for call, output in zip(calls, expected, strict=True):
        torch.testing.assert_close(packed[0](x, **call), output, **TOLERANCE)
    repack(packed)
    assert_same_state(packed, state)


@torch.no_grad()
def test_a_whole_model_of_the_next_release_is_matched(monkeypatch):
    """Its blocks call the attention with k_x and v_x, and it returns one tensor."""
    model = tiny_clip()
    expected = model.encode_text(prompts(4, 9))
    for block in (*model.transformer.resblocks, *model.visual.transformer.resblocks):
        old = block.attn
        block.attn = NextAttention(old.embed_dim, old.num_heads)
        block.attn.load_state_dict(old.state_dict())
        block.attention = lambda q_x, k_x=None, v_x=None, attn_mask=None, block=block: block.attn(
            q_x, k_x=k_x, v_x=v_x, attn_mask=attn_mask
        )
    monkeypatch.setattr(open_clip.transformer, "Attention", NextAttention)
    assert separate(model) == 5
    torch.testing.assert_close(model.encode_text(prompts(4, 9)), expected, **TOLERANCE)


def test_cosine_attention_multiplies_normalised_queries_and_keys():
    """The packed attention of release 3 fails here, so the oracle is the definition."""
    packed = filled(nn.Sequential(Attention(16, 2, scaled_cosine=True)))
    x = torch.randn(3, 5, 16)
    q, k, v = (
        (x @ weight.T + bias).unflatten(-1, (2, -1)).transpose(1, 2)
        for weight, bias in zip(packed[0].in_proj_weight.chunk(3), packed[0].in_proj_bias.chunk(3), strict=True)
    )
    cosines = torch.cosine_similarity(q[:, :, :, None], k[:, :, None], dim=-1)
    attended = (cosines * packed[0].logit_scale.exp()).softmax(-1) @ v
    expected = packed[0].out_proj(attended.transpose(1, 2).flatten(2))
    separate(packed)
    torch.testing.assert_close(packed[0](x), expected, **TOLERANCE)


TIMM = {
    "plain": lambda: (TimmAttention(16, 2, qkv_bias=True, qk_norm=True, norm_layer=nn.LayerNorm, gated=True), (2, 5, 16)),
    "rope": lambda: (AttentionRope(16, 2), (2, 5, 16)),
    "eva, biases apart": lambda: (EvaAttention(16, 2, norm_layer=nn.LayerNorm), (2, 5, 16)),
    "beit": lambda: (BeitAttention(16, 2, qkv_bias=True, window_size=(2, 2)), (2, 5, 16)),
    "fastvit": lambda: (FastVitAttention(16, head_dim=8), (2, 16, 3, 3)),
    "maxvit": lambda: (AttentionCl(16, dim_head=8, head_first=False), (2, 3, 3, 16)),
    "maxvit, heads first": lambda: (AttentionCl(16, dim_head=8, head_first=True), (2, 3, 3, 16)),
    "swin": lambda: (WindowAttention(16, 2, window_size=(2, 2)), (2, 4, 16)),
    "swin 2": lambda: (WindowAttentionV2(16, (2, 2), 2), (2, 4, 16)),
    "relative positions": lambda: (RelPosAttention(16, 2), (2, 5, 16)),
}


@torch.no_grad()
@pytest.mark.parametrize("kind", TIMM)
def test_timms_packed_linears_are_matched(kind):
    attention, shape = TIMM[kind]()
    packed = filled(nn.Sequential(attention))
    state = copy.deepcopy(packed.state_dict())
    x = torch.randn(shape)
    expected = packed(x)
    assert separate(packed) == 1
    torch.testing.assert_close(packed(x), expected, **TOLERANCE)
    for name in attention_layers(packed)[0].values():
        assert type(packed.get_submodule(name)) is nn.Linear
        assert packed.get_submodule(name).weight.shape == (16, 16)
    repack(packed)
    assert_same_state(packed, state)
    assert torch.equal(packed(x), expected)


def test_the_query_layer_of_timms_attention_computes_only_queries():
    """With query weights of zero every key gets the same attention, and likewise with key weights of zero."""
    for layer in ("q", "k"):
        packed = filled(nn.Sequential(AttentionCl(16, dim_head=8, head_first=True)))
        separate(packed)
        chosen = packed.get_submodule(attention_layers(packed)[0][layer])
        nn.init.zeros_(chosen.weight)
        nn.init.zeros_(chosen.bias)
        output = packed(torch.randn(1, 3, 3, 16))
        torch.testing.assert_close(output, output[:, :1, :1].expand_as(output))


def test_timms_attention_that_is_separate_from_the_start_is_listed():
    model = nn.Sequential(EvaAttention(16, 2, qkv_fused=False, norm_layer=nn.LayerNorm))
    assert separate(model) == 0
    assert attention_layers(model) == [{"q": "0.q_proj", "k": "0.k_proj", "v": "0.v_proj", "out": "0.proj"}]


def test_layers_are_listed_in_order():
    model = tiny_clip()
    separate(model)
    assert [names["out"] for names in attention_layers(model.transformer)] == [f"resblocks.{i}.attn.out_proj" for i in range(2)]


def test_repacking_refuses_layers_with_adapters_and_changes_nothing():
    model = tiny_clip()
    separate(model)
    inject_adapter_in_model(LoraConfig(target_modules=["resblocks.1.attn.v_proj"]), model.transformer)
    with pytest.raises(ValueError, match=r"transformer\.resblocks\.1\.attn\.v_proj: it has adapters"):
        repack(model)
    assert len(attention_layers(model.visual)) == 3


def test_attention_weights_are_refused():
    model = nn.Sequential(nn.MultiheadAttention(16, 2))
    separate(model)
    with pytest.raises(ValueError, match="need_weights=False"):
        model[0](*[torch.randn(2, 3, 16)] * 3)


def test_attention_with_bias_keys_is_refused_by_name():
    model = nn.Sequential(nn.Identity(), nn.MultiheadAttention(16, 2, add_bias_kv=True))
    with pytest.raises(ValueError, match="Cannot separate '1'"):
        separate(model)


def test_a_copy_of_a_separated_model_repacks_by_itself():
    model = tiny_clip()
    state = copy.deepcopy(model.state_dict())
    separate(model)
    twin = copy.deepcopy(model)
    repack(twin)
    assert_same_state(twin, state)
    assert len(attention_layers(model.visual)) == 3
