"""LoRA files in the formats of other programs, and the weights that they give by the equations of these programs."""

import torch
from torch.func import functional_call

from nora_vision.kohya import kohya_name

# Of the tiny model's middle block.
WIDTH = 16
LINEAR = "unet.mid_block.attentions.0.transformer_blocks.0.attn1.to_q"
OUTPUT = "unet.mid_block.attentions.0.transformer_blocks.0.attn1.to_out.0"
CONVOLUTION = "unet.mid_block.resnets.0.conv1"
STRIDED = "unet.down_blocks.0.downsamplers.0.conv"
NORM = "unet.mid_block.attentions.0.transformer_blocks.0.norm1"
GROUP_NORM = "unet.mid_block.resnets.0.norm1"
TEXT = "text_encoder.text_model.encoder.layers.0.self_attn.q_proj"
TEXT_2 = "text_encoder_2.text_model.encoder.layers.0.mlp.fc1"


def randn(*shape):
    return torch.randn(*shape) * 0.4


def by_rows(weight):
    """The norm of each row, in the shape that LyCORIS stores with `wd_on_output`."""
    return weight.flatten(1).norm(dim=1).reshape(-1, *[1] * (weight.ndim - 1))


def by_columns(weight):
    """The norm of each column, in the shape that LyCORIS and OneTrainer store."""
    swapped = weight.transpose(0, 1)
    return by_rows(swapped).transpose(0, 1)


def lora(weight):
    kernel = weight.shape[2:]
    up, down = randn(len(weight), 3, *[1] * len(kernel)), randn(3, *weight.shape[1:])
    parts = {"lora_up.weight": up, "lora_down.weight": down, "alpha": torch.tensor(1.5)}
    return parts, (0.5 * up.flatten(1) @ down.flatten(1)).reshape(weight.shape)


def lora_without_alpha(weight):
    parts, change = lora(weight)
    del parts["alpha"]
    return parts, 2 * change


def tucker(weight):
    out, into, *kernel = weight.shape
    up, mid, down = randn(out, 4, 1, 1), randn(4, 3, *kernel), randn(3, into, 1, 1)
    parts = {"lora_up.weight": up, "lora_mid.weight": mid, "lora_down.weight": down, "alpha": torch.tensor(6.0)}
    return parts, 2 * torch.einsum("om,mnkl,ni->oikl", up[..., 0, 0], mid, down[..., 0, 0])


def loha(weight, rank=2):
    out, columns = len(weight), weight[0].numel()
    a1, b1, a2, b2 = randn(out, rank), randn(rank, columns), randn(out, rank), randn(rank, columns)
    parts = {"hada_w1_a": a1, "hada_w1_b": b1, "hada_w2_a": a2, "hada_w2_b": b2, "alpha": torch.tensor(1.0)}
    return parts, ((a1 @ b1) * (a2 @ b2) / rank).reshape(weight.shape)


def loha_of_full_rank(weight):
    return loha(weight, rank=8)


def loha_tucker(weight):
    out, into, *kernel = weight.shape
    parts, product = {"alpha": torch.tensor(3.0)}, 1.5
    for place in (1, 2):
        core, left, right = randn(2, 2, *kernel), randn(2, out), randn(2, into)
        parts |= {f"hada_t{place}": core, f"hada_w{place}_a": left, f"hada_w{place}_b": right}
        product = product * torch.einsum("abkl,bi,ao->oikl", core, right, left)
    return parts, product


def kron(first, second, weight):
    return torch.kron(first, second.contiguous().flatten(1)).reshape(weight.shape)


def lokr(weight):
    out, into, *kernel = weight.shape
    w1, w2 = randn(2, 4), randn(out // 2, into // 4, *kernel)
    # If neither side is factorised, LyCORIS ignores alpha.
    return {"lokr_w1": w1, "lokr_w2": w2, "alpha": torch.tensor(7.0)}, kron(w1, w2, weight)


def lokr_factored(weight):
    out, columns = len(weight), weight[0].numel()
    w1, a, b = randn(2, 2), randn(out // 2, 2), randn(2, columns // 2)
    return {"lokr_w1": w1, "lokr_w2_a": a, "lokr_w2_b": b, "alpha": torch.tensor(1.0)}, kron(w1, a @ b, weight) / 2


def lokr_factored_twice(weight):
    out, columns = len(weight), weight[0].numel()
    a1, b1, a2, b2 = randn(4, 2), randn(2, 4), randn(out // 4, 2), randn(2, columns // 4)
    parts = {"lokr_w1_a": a1, "lokr_w1_b": b1, "lokr_w2_a": a2, "lokr_w2_b": b2, "alpha": torch.tensor(1.0)}
    return parts, kron(a1 @ b1, a2 @ b2, weight) / 2


def lokr_tucker(weight):
    out, into, *kernel = weight.shape
    w1, core, left, right = randn(2, 2), randn(3, 3, *kernel), randn(3, out // 2), randn(3, into // 2)
    parts = {"lokr_w1": w1, "lokr_t2": core, "lokr_w2_a": left, "lokr_w2_b": right, "alpha": torch.tensor(1.5)}
    return parts, 0.5 * kron(w1, torch.einsum("abkl,bi,ao->oikl", core, right, left), weight)


def diff(weight):
    change = randn(*weight.shape)
    return {"diff": change}, change


FOR_LINEAR = (lora, lora_without_alpha, loha, loha_of_full_rank, lokr, lokr_factored, lokr_factored_twice, diff)
FOR_CONVOLUTION = (*FOR_LINEAR, tucker, loha_tucker, lokr_tucker)


def decomposed(weight, change, lengths):
    """A DoRA's `dora_scale` and weight, with row or column norms that differ from the base model's."""
    scale = lengths(weight) * (1 + 0.3 * torch.rand(lengths(weight).shape))
    return scale, scale * (weight + change) / lengths(weight + change)


def module_of(pipe, layer):
    """A layer by component and name, with or without `text_model.` in a text encoder."""
    component, _, name = layer.partition(".")
    model = getattr(pipe, component)
    return dict(model.named_modules()).get(name) or model.get_submodule(name.removeprefix("text_model."))


def assert_is(module, weight=None, bias=None):
    """Check that a layer with its adapters computes what its base layer would with these parameters."""
    base = module.get_base_layer() if hasattr(module, "get_base_layer") else module
    inputs = {torch.nn.Linear: (3, getattr(base, "in_features", 0)), torch.nn.Conv2d: (2, getattr(base, "in_channels", 0), 6, 6)}
    inputs |= {torch.nn.GroupNorm: (2, getattr(base, "num_channels", 0), 4, 4)}
    x = torch.randn(*inputs.get(type(base), (3, len(base.weight))))
    given = {"weight": weight, "bias": bias}
    expected = functional_call(base, {name: value for name, value in given.items() if value is not None}, (x,))
    torch.testing.assert_close(module(x), expected, rtol=1e-4, atol=1e-4)


def kohya(layer):
    component, _, name = layer.partition(".")
    return kohya_name(component, name, 1)


def weight_of(pipe, layer):
    module = module_of(pipe, layer)
    return (module.get_base_layer() if hasattr(module, "get_base_layer") else module).weight.detach()


@torch.no_grad()
def output_of(unet):
    """The output of a UNet for fixed inputs, (1, 4, 8, 8)."""
    generator = torch.Generator().manual_seed(0)
    width, pooled = unet.config.cross_attention_dim, unet.config.projection_class_embeddings_input_dim - 48
    noisy, text, embeds = (torch.randn(1, *shape, generator=generator) for shape in ((4, 8, 8), (3, width), (pooled,)))
    more = {"text_embeds": embeds, "time_ids": torch.zeros(1, 6)}
    return unet(noisy, torch.tensor([5]), encoder_hidden_states=text, added_cond_kwargs=more).sample


def good(layer=LINEAR, width=WIDTH):
    return {f"{kohya(layer)}.lora_up.weight": torch.ones(width, 2), f"{kohya(layer)}.lora_down.weight": torch.ones(2, width)}
