"""LoRA files as other programs write them, and the weight that each makes, by the algebra of its own program."""

import torch
from torch.func import functional_call


def randn(*shape):
    return torch.randn(*shape) * 0.4


def by_rows(weight):
    """The length of each row, shaped as LyCORIS stores it with `wd_on_output`."""
    return weight.flatten(1).norm(dim=1).reshape(-1, *[1] * (weight.ndim - 1))


def by_columns(weight):
    """The length of each column, shaped as LyCORIS and OneTrainer store it."""
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
    # With both sides whole, LyCORIS ignores alpha.
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
    """A DoRA's `dora_scale` and weight, with other lengths than the base model's, by rows or by columns."""
    scale = lengths(weight) * (1 + 0.3 * torch.rand(lengths(weight).shape))
    return scale, scale * (weight + change) / lengths(weight + change)


def module_of(pipe, layer):
    """A layer by component and name, whatever level of names its text encoder has."""
    component, _, name = layer.partition(".")
    model = getattr(pipe, component)
    return dict(model.named_modules()).get(name) or model.get_submodule(name.removeprefix("text_model."))


def assert_is(module, weight=None, bias=None):
    """Check that a layer, with what is around it, computes what its base layer would with these parameters."""
    base = module.get_base_layer() if hasattr(module, "get_base_layer") else module
    inputs = {torch.nn.Linear: (3, getattr(base, "in_features", 0)), torch.nn.Conv2d: (2, getattr(base, "in_channels", 0), 6, 6)}
    inputs |= {torch.nn.GroupNorm: (2, getattr(base, "num_channels", 0), 4, 4)}
    x = torch.randn(*inputs.get(type(base), (3, len(base.weight))))
    given = {"weight": weight, "bias": bias}
    expected = functional_call(base, {name: value for name, value in given.items() if value is not None}, (x,))
    torch.testing.assert_close(module(x), expected, rtol=1e-4, atol=1e-4)
