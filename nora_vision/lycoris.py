"""Weight changes in LyCORIS's own file forms, for kohya files of adapters that are not plain LoRA.

    LoHa    hada_w1_a (out, r), hada_w1_b (r, in), hada_w2_a, hada_w2_b, alpha     ComfyUI and A1111
    LoKr    lokr_w1, lokr_w2, or their factors lokr_w2_a and lokr_w2_b, alpha      ComfyUI and A1111
    IA3     weight (in,) = l - 1, on_input = 1                                     A1111

The OFT and BOFT of these programs rotate the outputs of a layer, and PEFT's rotate its inputs: their forms cannot hold PEFT's.
"""

from __future__ import annotations

from functools import singledispatch
from typing import NamedTuple

import torch
from peft.tuners.ia3 import IA3Layer
from peft.tuners.loha import LoHaLayer
from peft.tuners.lokr import LoKrLayer
from torch import nn

# Parts of a LyCORIS file, by LyCORIS's name of the algorithm.
PARTS = {
    "loha": ("hada_w1_a", "hada_w1_b", "hada_w2_a", "hada_w2_b", "hada_t1", "hada_t2"),
    "lokr": ("lokr_w1", "lokr_w1_a", "lokr_w1_b", "lokr_w2", "lokr_w2_a", "lokr_w2_b", "lokr_t2"),
    "ia3": ("weight", "on_input"),
}


class LycorisForm(NamedTuple):
    """A weight change as LyCORIS writes it: its name of the algorithm, and tensors by the part of their names."""

    algorithm: str
    parts: dict[str, torch.Tensor]


@singledispatch
def lycoris_form(layer: nn.Module, adapter_name: str) -> LycorisForm | None:
    """The form of the layer's weight change at scale 1, in float32; None if it has no such form."""
    return None


@lycoris_form.register
def _(layer: LoHaLayer, adapter_name: str) -> LycorisForm | None:
    """s (w1_a w1_b) * (w2_a w2_b),  s = alpha / r."""
    parts = _parts(layer, "loha", adapter_name)
    return LycorisForm("loha", parts | {"alpha": torch.tensor(float(layer.alpha[adapter_name]))}) if parts else None


@lycoris_form.register
def _(layer: LoKrLayer, adapter_name: str) -> LycorisForm | None:
    """s kron(w1, w2),  s = alpha / r; programs ignore alpha if the file has no factors, so s is then a part of w1."""
    parts = _parts(layer, "lokr", adapter_name)
    if not parts:
        return None
    alpha, rank = float(layer.alpha[adapter_name]), layer.r[adapter_name]
    if not any(name.endswith("_b") for name in parts):
        parts["lokr_w1"] = alpha / rank * parts["lokr_w1"]
    return LycorisForm("lokr", parts | {"alpha": torch.tensor(alpha)})


@lycoris_form.register
def _(layer: IA3Layer, adapter_name: str) -> LycorisForm | None:
    """W diag(weight), for an adapter that scales inputs. One that scales outputs scales the bias too, which no form holds."""
    if adapter_name not in layer.ia3_l or not layer.is_feedforward:
        return None
    scales = layer.ia3_l[adapter_name].detach().float().cpu()
    weight = scales.flatten() if scales.ndim == 2 else scales
    return LycorisForm("ia3", {"weight": weight - 1, "on_input": torch.tensor(1.0)})


def _parts(layer: nn.Module, algorithm: str, adapter_name: str) -> dict[str, torch.Tensor]:
    """The adapter's tensors by their names in PEFT, which are LyCORIS's."""
    present = {name: getattr(layer, name) for name in PARTS[algorithm]}
    return {name: of_all[adapter_name].detach().float().cpu() for name, of_all in present.items() if adapter_name in of_all}
