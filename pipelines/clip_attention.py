"""Replace the packed attention of a CLIP model by attention with one nn.Linear each for query, key, value and output.

open_clip stores the three input projections in one parameter that no module multiplies by, timm in one Linear. Adapters need a
Linear for each projection. `separate` replaces the modules in place and `repack` undoes it, with the same outputs and state-dict
keys as before.
"""

from __future__ import annotations

import inspect

import open_clip.transformer
import torch
from peft.tuners.tuners_utils import BaseTunerLayer
from timm.layers.attention import Attention as TimmAttention
from timm.layers.attention import AttentionRope
from timm.models.beit import Attention as BeitAttention
from timm.models.eva import EvaAttention
from timm.models.fastvit import Attention as FastVitAttention
from timm.models.maxxvit import AttentionCl
from timm.models.swin_transformer import WindowAttention
from timm.models.swin_transformer_v2 import WindowAttention as WindowAttentionV2
from timm.models.vision_transformer_relpos import RelPosAttention
from torch import nn
from torch.nn import functional as F

# Classes that call `qkv` and split its output into queries, keys and values (for each head, with `head_first`).
TIMM_CLASSES = (
    TimmAttention,
    AttentionRope,
    BeitAttention,
    EvaAttention,
    FastVitAttention,
    AttentionCl,
    WindowAttention,
    WindowAttentionV2,
    RelPosAttention,
)
INPUTS = ("q", "k", "v")
LAYERS = (*INPUTS, "out")


def separate(model: nn.Module) -> int:
    """Give every packed attention of `model` separate `q_proj`, `k_proj`, `v_proj` and output Linears, in place.

    Returns: the number of replaced modules; separate ones are skipped.
    Raises: ValueError naming an attention that cannot be separated.
    """
    swapped = 0
    for name, module in list(model.named_modules()):
        if type(module) is nn.MultiheadAttention:
            _replace(model, name, SeparateMultiheadAttention(module, name))
        elif type(module) is open_clip.transformer.Attention:
            _replace(model, name, SeparateOpenClipAttention(module))
        elif isinstance(module, TIMM_CLASSES) and isinstance(module.qkv, nn.Linear):
            module.qkv = SeparateProjection(module)
        else:
            continue
        swapped += 1
    return swapped


def repack(model: nn.Module) -> int:
    """Undo `separate` in place with the current weights: restores the original classes and state-dict keys.

    Returns: the number of replaced modules.
    Raises: ValueError naming a layer that still has adapters; nothing is replaced then.
    """
    separate = [(name, m) for name, m in model.named_modules() if isinstance(m, (SeparateAttention, SeparateProjection))]
    for name, module in separate:
        for layer, child in module.named_children():
            if isinstance(child, BaseTunerLayer):
                raise ValueError(f"Cannot repack {name}.{layer}: it has adapters. Merge them into the weights first.")
    for name, module in separate:
        if isinstance(module, SeparateProjection):
            module.give_back(model.get_submodule(name.rpartition(".")[0]))
        else:
            _replace(model, name, module.packed())
    return len(separate)


def attention_layers(tower: nn.Module) -> list[dict[str, str]]:
    """The names of the "q", "k", "v" and "out" Linears of each separate attention of `tower`, in order."""
    layers = []
    for name, module in tower.named_modules():
        prefix = f"{name}." if name else ""
        if isinstance(module, SeparateAttention):
            layers.append({layer: f"{prefix}{layer}_proj" for layer in LAYERS})
        elif isinstance(module, TIMM_CLASSES):
            # Some attentions of timm are separate from the start.
            inside = f"{prefix}qkv." if isinstance(module.qkv, SeparateProjection) else prefix
            layers.append({**{layer: f"{inside}{layer}_proj" for layer in INPUTS}, "out": f"{prefix}proj"})
    return layers


class SeparateAttention(nn.Module):
    """Base class of replacements for attention whose packed input projection is a parameter.

    Keeps the packed module without its weights, which `packed` gives back.
    """

    def __init__(self, packed: nn.Module) -> None:
        super().__init__()
        self.num_heads = packed.num_heads
        biases = (None,) * 3 if packed.in_proj_bias is None else packed.in_proj_bias.chunk(3)
        self._in_one = packed.in_proj_weight is not None
        weights = packed.in_proj_weight.chunk(3) if self._in_one else [getattr(packed, f"{n}_proj_weight") for n in INPUTS]
        for layer, weight, bias in zip(INPUTS, weights, biases, strict=True):
            setattr(self, f"{layer}_proj", _linear(weight, bias, packed.out_proj.weight.requires_grad))
            if not self._in_one:
                setattr(packed, f"{layer}_proj_weight", None)
        # nn.MultiheadAttention has a subclass of nn.Linear here that adapters refuse.
        self.out_proj = _linear(packed.out_proj.weight, packed.out_proj.bias, packed.out_proj.weight.requires_grad)
        packed.in_proj_weight = packed.in_proj_bias = packed.out_proj.weight = packed.out_proj.bias = None
        # In a tuple, so that it is not registered as a submodule.
        self._aside = (packed,)
        self.train(packed.training)

    def packed(self) -> nn.Module:
        """The original module with the current weights."""
        (packed,) = self._aside
        projections = [getattr(self, f"{layer}_proj") for layer in INPUTS]
        if self._in_one:
            packed.in_proj_weight = _stacked([projection.weight for projection in projections])
        else:
            for layer, projection in zip(INPUTS, projections, strict=True):
                setattr(packed, f"{layer}_proj_weight", projection.weight)
        if projections[0].bias is not None:
            packed.in_proj_bias = _stacked([projection.bias for projection in projections])
        packed.out_proj.weight, packed.out_proj.bias = self.out_proj.weight, self.out_proj.bias
        return packed.train(self.training)

    def _heads(self, x: torch.Tensor) -> torch.Tensor:
        """(n, tokens, heads * d) as (n, heads, tokens, d)."""
        return x.unflatten(-1, (self.num_heads, -1)).transpose(1, 2)

    def _mask(self, mask: torch.Tensor | None, dtype: torch.dtype, true_is_seen: bool) -> torch.Tensor | None:
        """A mask (queries, keys) or (n * heads, queries, keys) as scaled_dot_product_attention takes it."""
        if mask is None:
            return None
        mask = mask.unflatten(0, (-1, self.num_heads)) if mask.ndim == 3 else mask
        if mask.dtype == torch.bool:
            return mask if true_is_seen else ~mask
        return mask.to(dtype)


class SeparateMultiheadAttention(SeparateAttention):
    """Replaces nn.MultiheadAttention, for the arguments that open_clip passes.

    Raises: ValueError naming the attention if it has bias_k or add_zero_attn, which no open_clip model has.
    """

    def __init__(self, packed: nn.MultiheadAttention, name: str) -> None:
        if packed.bias_k is not None or packed.add_zero_attn:
            raise ValueError(f"Cannot separate {name!r}: add_bias_kv and add_zero_attn must be False. Build it without.")
        super().__init__(packed)
        self.batch_first, self.dropout = packed.batch_first, packed.dropout

    def forward(
        self,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        need_weights: bool = True,
        attn_mask: torch.Tensor | None = None,
    ) -> tuple[torch.Tensor, None]:
        """nn.MultiheadAttention without the attention weights.

        Args:
            query, key, value: (n, tokens, width), or (tokens, n, width) without batch_first.
            attn_mask: (queries, keys) or (n * heads, queries, keys), added to the scores, or boolean and True for hidden keys.
        Returns: like `query`, and None.
        Raises: ValueError if `need_weights` is true.
        """
        if need_weights:
            raise ValueError("Separate attention returns no attention weights. Pass need_weights=False.")
        inputs = (query, key, value) if self.batch_first else (x.transpose(0, 1) for x in (query, key, value))
        q, k, v = (self._heads(layer(x)) for layer, x in zip((self.q_proj, self.k_proj, self.v_proj), inputs, strict=True))
        mask = self._mask(attn_mask, q.dtype, true_is_seen=False)
        x = F.scaled_dot_product_attention(q, k, v, mask, dropout_p=self.dropout if self.training else 0.0)
        x = self.out_proj(x.transpose(1, 2).flatten(2))
        return (x if self.batch_first else x.transpose(0, 1)), None


class SeparateOpenClipAttention(SeparateAttention):
    """Replaces open_clip's Attention, that of release 3 and the later one, which also takes k_x and v_x."""

    def __init__(self, packed: nn.Module) -> None:
        super().__init__(packed)
        # Without k_x and v_x, True in a boolean mask hides a key; in the later version it shows the key.
        self._true_is_seen = "k_x" in inspect.signature(packed.forward).parameters
        self.logit_scale_max = packed.logit_scale_max
        for name in ("ln_q", "ln_k", "ln_inner", "attn_drop", "out_drop", "logit_scale", "head_scale"):
            setattr(self, name, getattr(packed, name))

    def forward(
        self,
        x: torch.Tensor,
        *,
        k_x: torch.Tensor | None = None,
        v_x: torch.Tensor | None = None,
        attn_mask: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """open_clip's Attention.

        Args:
            x: (n, tokens, width), also the keys and values without `k_x` and `v_x`.
            k_x, v_x: (n, keys, width).
            attn_mask: (tokens, keys) or (n * heads, tokens, keys).
        Returns: like `x`.
        """
        q = self._heads(self.q_proj(x))
        k = self._heads(self.k_proj(x if k_x is None else k_x))
        v = self._heads(self.v_proj(x if v_x is None else v_x))
        scale = None
        if self.logit_scale is None:
            q, k = self.ln_q(q), self.ln_k(k)
        else:
            q = F.normalize(q, dim=-1) * self.logit_scale.clamp(max=self.logit_scale_max).exp().to(q.dtype)
            k, scale = F.normalize(k, dim=-1), 1.0
        mask = self._mask(attn_mask, q.dtype, self._true_is_seen)
        dropout = self.attn_drop.p if self.training else 0.0
        x = F.scaled_dot_product_attention(q, k, v, mask, dropout_p=dropout, scale=scale)
        if self.head_scale is not None:
            x = x * self.head_scale
        return self.out_drop(self.out_proj(self.ln_inner(x.transpose(1, 2).flatten(2))))


class SeparateProjection(nn.Module):
    """Replaces the `qkv` Linear of an attention of timm, whose forward otherwise stays the same."""

    def __init__(self, attention: nn.Module) -> None:
        super().__init__()
        packed = attention.qkv
        # With head_first the rows are q, k, v of the first head, then of the second, and so on.
        self.groups = attention.num_heads if getattr(attention, "head_first", False) else 1
        biases = (None,) * 3 if packed.bias is None else self._split(packed.bias)
        for layer, weight, bias in zip(INPUTS, self._split(packed.weight), biases, strict=True):
            setattr(self, f"{layer}_proj", _linear(weight, bias, packed.weight.requires_grad))
        # If the biases are stored outside of the Linear, timm calls the Linear only with qkv_bias_separate.
        self._bias_apart = getattr(attention, "qkv_bias_separate", None)
        if self._bias_apart is not None:
            attention.qkv_bias_separate = True
        self.train(packed.training)

    def _split(self, packed: torch.Tensor) -> tuple[torch.Tensor, ...]:
        """The rows of q, k and v of a packed weight (3 width, in) or bias (3 width,)."""
        return tuple(rows.flatten(0, 1) for rows in packed.unflatten(0, (self.groups, 3, -1)).unbind(1))

    def _joined(self, parts: list[torch.Tensor]) -> torch.Tensor:
        """Three of (..., width) as one (..., 3 width): undoes `_split`, along the last dimension."""
        return torch.stack([part.unflatten(-1, (self.groups, -1)) for part in parts], dim=-2).flatten(-3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """(..., in) to (..., 3 width), in the order of the packed Linear."""
        return self._joined([self.q_proj(x), self.k_proj(x), self.v_proj(x)])

    def give_back(self, attention: nn.Module) -> None:
        """Put one packed Linear with the current weights into `attention`."""
        projections = (self.q_proj, self.k_proj, self.v_proj)
        weight = self._joined([projection.weight.T for projection in projections]).T.contiguous()
        bias = None if self.q_proj.bias is None else self._joined([projection.bias for projection in projections])
        attention.qkv = _linear(weight, bias, self.q_proj.weight.requires_grad).train(self.training)
        if self._bias_apart is not None:
            attention.qkv_bias_separate = self._bias_apart


def _linear(weight: torch.Tensor, bias: torch.Tensor | None, requires_grad: bool) -> nn.Linear:
    """An nn.Linear with `weight` (out, in) and `bias` (out,); parameters are used without a copy."""
    layer = nn.Linear(1, 1, bias=bias is not None, device="meta")
    layer.out_features, layer.in_features = weight.shape
    layer.weight = _parameter(weight, requires_grad)
    if bias is not None:
        layer.bias = _parameter(bias, requires_grad)
    return layer


def _parameter(values: torch.Tensor, requires_grad: bool) -> nn.Parameter:
    if isinstance(values, nn.Parameter):
        return values
    # A copy: a view would keep all of the packed storage alive, and safetensors refuses shared storage.
    return nn.Parameter(values.detach().clone(), requires_grad)


def _stacked(parts: list[nn.Parameter]) -> nn.Parameter:
    return nn.Parameter(torch.cat([part.detach() for part in parts]), requires_grad=parts[0].requires_grad)


def _replace(model: nn.Module, name: str, module: nn.Module) -> None:
    parent, _, child = name.rpartition(".")
    setattr(model.get_submodule(parent), child, module)
