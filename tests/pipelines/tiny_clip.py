"""A tiny open_clip model with random weights, in the shapes that open_clip's models have."""

import copy
import functools

import open_clip
import torch
from torch import nn
from torch.nn import functional as F

from pipelines import mini_clip
from pipelines.cache import module_digest

VOCABULARY, CONTEXT, END = 50, 12, 49
CONFIG = {
    "embed_dim": 24,
    "vision_cfg": {"image_size": 16, "layers": 3, "width": 32, "head_width": 8, "patch_size": 8},
    "text_cfg": {"context_length": CONTEXT, "vocab_size": VOCABULARY, "width": 16, "heads": 2, "layers": 2},
}


def tiny_clip(**changes):
    """A model of the class CLIP, or CustomTextCLIP with `custom_text=True`, with frozen weights."""
    torch.manual_seed(0)
    config = copy.deepcopy(CONFIG)
    custom_text = changes.pop("custom_text", False)
    for part, values in changes.items():
        config[part] |= values
    model = (open_clip.CustomTextCLIP if custom_text else open_clip.CLIP)(**config)
    # The biases start at zero, and the weights so small that attention is flat: neither would show a mistake.
    for parameter in model.parameters():
        nn.init.normal_(parameter, std=0.3)
    return model.eval().requires_grad_(False)


def tiny_coca():
    """A model of the class CoCa, whose encoders return tokens too and whose image encoder ends in attention pooling."""
    torch.manual_seed(0)
    vision = {**CONFIG["vision_cfg"], "attentional_pool": True, "attn_pooler_heads": 4, "output_tokens": True}
    text = {**CONFIG["text_cfg"], "embed_cls": True, "output_tokens": True, "width": 24}
    decoder = {"context_length": CONTEXT, "vocab_size": VOCABULARY, "width": 24, "heads": 2, "layers": 1}
    model = open_clip.CoCa(24, multimodal_cfg=decoder, text_cfg=text, vision_cfg=vision)
    for parameter in model.parameters():
        nn.init.normal_(parameter, std=0.3)
    return model.eval().requires_grad_(False)


def prompts(*lengths):
    """Token ids (n, CONTEXT), each with its end token at `length - 1` and zeros behind it."""
    generator = torch.Generator().manual_seed(0)
    tokens = torch.randint(1, END, (len(lengths), CONTEXT), generator=generator)
    places = torch.arange(CONTEXT)
    ends = torch.tensor(lengths)[:, None] - 1
    return torch.where(places < ends, tokens, torch.where(places == ends, END, 0))


def images(count, seed=0):
    """(count, 3, 16, 16)."""
    return torch.randn(count, 3, 16, 16, generator=torch.Generator().manual_seed(seed))


class NextAttention(nn.Module):
    """The call and the state dict of the Attention that follows release 3 of open_clip: keys and values are arguments."""

    def __init__(self, dim, num_heads, kdim=None):
        super().__init__()
        self.num_heads, self.logit_scale_max = num_heads, 4.6
        self.in_proj_weight = self.q_proj_weight = self.k_proj_weight = self.v_proj_weight = None
        if kdim is None:
            self.in_proj_weight = nn.Parameter(torch.randn(3 * dim, dim))
        else:
            self.q_proj_weight = nn.Parameter(torch.randn(dim, dim))
            self.k_proj_weight, self.v_proj_weight = (nn.Parameter(torch.randn(dim, kdim)) for _ in range(2))
        self.in_proj_bias = nn.Parameter(torch.randn(3 * dim))
        self.ln_q, self.ln_k, self.ln_inner = nn.Identity(), nn.Identity(), nn.Identity()
        self.logit_scale = self.head_scale = None
        self.attn_drop, self.out_drop = nn.Dropout(0.0), nn.Dropout(0.0)
        self.out_proj = nn.Linear(dim, dim)

    def forward(self, x, k_x=None, v_x=None, attn_mask=None):
        """Attention by its definition, without the fused kernel; a boolean mask is True where a key is seen."""
        weights = (self.q_proj_weight, self.k_proj_weight, self.v_proj_weight)
        weights = weights if self.in_proj_weight is None else self.in_proj_weight.chunk(3)
        inputs = (x, x if k_x is None else k_x, x if v_x is None else v_x)
        q, k, v = (
            F.linear(values, weight, bias).unflatten(-1, (self.num_heads, -1)).transpose(1, 2)
            for values, weight, bias in zip(inputs, weights, self.in_proj_bias.chunk(3), strict=True)
        )
        scores = q @ k.transpose(-1, -2) / q.shape[-1] ** 0.5
        if attn_mask is not None:
            if attn_mask.ndim == 3:
                attn_mask = attn_mask.unflatten(0, (-1, self.num_heads))
            scores = scores.masked_fill(~attn_mask, -torch.inf) if attn_mask.dtype == torch.bool else scores + attn_mask
        return self.out_drop(self.out_proj(self.ln_inner((scores.softmax(-1) @ v).transpose(1, 2).flatten(2))))


@functools.cache
def base_sha256(folder):
    """Of the weights of the CLIP in `folder`, as classifiers name them."""
    return module_digest(mini_clip.load_model(folder))
