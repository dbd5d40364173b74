"""A scale for the layers of every PEFT tuner, which diffusers sets; most of them have none of their own."""

from __future__ import annotations

from functools import cache
from typing import TYPE_CHECKING, Any

from pipelines.adapter_method import tuner_layers
from pipelines.lazy_modules import nn, torch

if TYPE_CHECKING:
    from peft.tuners.tuners_utils import BaseTunerLayer

CONVOLUTION = ("groups", "kernel_size", "stride", "padding", "dilation")


class ScalableLayer:
    """A mixin in front of a PEFT layer's class:  h = W x + sum_i s_i (f_i(x) - W x),  with f_i the layer under adapter i alone.

    With one adapter at scale 1 the layer is PEFT's own.
    """

    def set_scale(self, adapter_name: str, scale: float) -> None:
        """Scale the adapter's change of the output by `scale`, 1 as trained."""
        self.output_scales[adapter_name] = scale

    def scale_layer(self, scale: float) -> None:
        """Multiply the scales of the active adapters by `scale`."""
        for name in self.active_adapters:
            self.output_scales[name] = scale * self.output_scales.get(name, 1.0)

    def unscale_layer(self, scale: float | None = None) -> None:
        """Undo `scale_layer`; without `scale`, set the scale to 1."""
        for name in self.active_adapters:
            self.output_scales[name] = 1.0 if scale is None else self.output_scales.get(name, 1.0) / scale

    def delete_adapter(self, adapter_name: str) -> None:
        """Delete the adapter and its scale, which a later adapter of this name must not have."""
        super().delete_adapter(adapter_name)
        self.output_scales.pop(adapter_name, None)

    def forward(self, x: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
        """The base layer's output plus the scaled changes of the active adapters."""
        if x.dtype in (torch.float16, torch.bfloat16) and not torch.is_autocast_enabled(x.device.type):
            # Outside of autocast, some layers of PEFT multiply trained float32 values by half-precision buffers, or the reverse.
            with torch.autocast(x.device.type, x.dtype):
                return self.forward(x, *args, **kwargs)
        if x.ndim > 3 and isinstance(self.get_base_layer(), nn.Linear):
            # Some layers of PEFT take every input with four dimensions for an image.
            return self(x.flatten(0, -3), *args, **kwargs).unflatten(0, x.shape[:-2])
        active = self.active_adapters
        scales = [self.output_scales.get(name, 1.0) for name in active]
        if self.disable_adapters or self.merged or scales == [1.0]:
            return super().forward(x, *args, **kwargs)
        base = self.base_layer(x, *args, **kwargs)
        result = base
        try:
            for name, scale in zip(active, scales, strict=True):
                self._active_adapter = [name]
                result = result + scale * (super().forward(x, *args, **kwargs) - base)
        finally:
            self._active_adapter = active
        return result

    def merge(self, safe_merge: bool = False, adapter_names: list[str] | None = None) -> None:
        """Merge the scaled changes of the adapters, by default of the active ones:  W <- W + sum_i s_i (W_i - W).

        The weight before is kept until `unmerge`.

        Raises: ValueError for a scale other than 1 or several adapters on a quantised weight; with `safe_merge`, for values
            that are not finite.
        """
        from peft.tuners.tuners_utils import check_adapters_to_merge

        names = [name for name in check_adapters_to_merge(self, adapter_names) if name in names_of_adapters(self)]
        scales = [self.output_scales.get(name, 1.0) for name in names]
        base = self.get_base_layer()
        if not base.weight.is_floating_point():
            if [*self.merged_adapters, *scales] not in ([], [1.0]):
                raise ValueError(f"Only one adapter at scale 1 can be merged into a quantised weight, got the scales {scales}.")
            super().merge(safe_merge, names)
            return
        before = base.weight.data.clone()
        if not self.merged:
            self.unmerged_weight = before
        total = before.clone()
        for name, scale in zip(names, scales, strict=True):
            base.weight.data = self.unmerged_weight.clone()
            super().merge(safe_merge, [name])
            total += scale * (base.weight.data - self.unmerged_weight)
        base.weight.data = total

    def unmerge(self) -> None:
        """Restore the weight before merging, bit for bit."""
        base = self.get_base_layer()
        if not self.merged or not base.weight.is_floating_point():
            super().unmerge()
            return
        base.weight.data = self.unmerged_weight.to(base.weight.data)
        self.unmerged_weight = None
        self.merged_adapters.clear()


def names_of_adapters(layer: BaseTunerLayer) -> set[str]:
    """The names of the adapters on `layer`."""
    return {name for part in layer.adapter_layer_names for name in getattr(layer, part)}


@cache
def _scalable(kind: type[nn.Module]) -> type[nn.Module]:
    return type(f"Scalable{kind.__name__}", (ScalableLayer, kind), {})


def make_scalable(model: nn.Module) -> None:
    """Give every layer of PEFT's tuners in `model`, except of LoRA, a scale."""
    from peft.tuners.lora import LoraLayer

    from nora_vision.layer import NoraLayer

    for layer in tuner_layers(model).values():
        if not isinstance(layer, LoraLayer | NoraLayer | ScalableLayer):
            layer.output_scales, layer.unmerged_weight = {}, None
            layer.__class__ = _scalable(type(layer))
            expose_convolution(layer)


def expose_convolution(layer: BaseTunerLayer) -> None:
    """Copy the base layer's attributes of a convolution, which a LoRA that is added on top of this layer reads."""
    base = layer.get_base_layer()
    if isinstance(base, nn.Conv2d):
        vars(layer).update({name: getattr(base, name) for name in CONVOLUTION})
