"""NoRA layers: a frozen base layer, frozen outer factors, and small trained inner factors."""

from __future__ import annotations

import math
import warnings
from typing import Any

import torch
from peft.tuners._buffer_dict import BufferDict
from peft.tuners.tuners_utils import BaseTunerLayer, check_adapters_to_merge
from peft.utils.integrations import dequantize_module_weight
from torch import nn
from torch.nn import functional as F

from .config import NoraConfig
from .decomposition import is_finite, reproducible_awsvd


class NoraLayer(nn.Module, BaseTunerLayer):
    """Base class of NoRA layers. Subclasses define the base layer's weight as a matrix, and products with its input.

        h = W x + s B B' A' A x                               [serial NoRA]
        h = W x + s B (B' A' - B'_0 A'_0) A x                 [with preserve_output]

    State, by adapter name: `nora_A` (r, in) and `nora_B` (out, r) frozen, in the base layer's dtype; `nora_inner_A` A'
    (inner_r, r) and `nora_inner_B` B' (r, inner_r) trained, in float32; with preserve_output their frozen start in
    `nora_inner_A0`, `nora_inner_B0`. A and B were computed from the weight and `nora_activation_scale` (in,), which is all ones
    for the plain SVD. `in` is the number of inputs of one output value: in_channels * kh * kw for a convolution.
    """

    adapter_layer_names = ("nora_inner_A", "nora_inner_B")
    other_param_names = (
        "nora_A", "nora_B", "nora_inner_A0", "nora_inner_B0", "nora_activation_scale",
        "nora_dropout", "r", "inner_r", "alpha", "scaling", "reproducible", "outer_slice",
    )  # fmt: skip

    def __init__(self, base_layer: nn.Module, adapter_name: str, config: NoraConfig, layer_name: str) -> None:
        super().__init__()
        self.base_layer = base_layer
        self.r: dict[str, int] = {}
        self.inner_r: dict[str, int] = {}
        self.alpha: dict[str, float] = {}
        self.scaling: dict[str, float] = {}
        self.outer_slice: dict[str, tuple[int, int]] = {}
        self.nora_A = BufferDict(persistent=True)
        self.nora_B = BufferDict(persistent=True)
        self.nora_inner_A = nn.ParameterDict()
        self.nora_inner_B = nn.ParameterDict()
        self.nora_inner_A0 = BufferDict(persistent=True)
        self.nora_inner_B0 = BufferDict(persistent=True)
        self.nora_activation_scale = BufferDict(persistent=True)
        self.nora_dropout = nn.ModuleDict()
        self.merged_adapters: list[str] = []
        self._merged_scaling: dict[str, float] = {}
        self._without_outer_factors: set[str] = set()
        # Digests of the source of the outer factors, and of the factors; see `nora_vision.reproducible`.
        self.reproducible: dict[str, tuple[str, str]] = {}
        self.out_features, self.in_features = self.matrix_shape(self.get_base_layer())
        self._active_adapter = adapter_name
        self.update_layer(adapter_name, config, layer_name)

    # Defined by subclasses

    @staticmethod
    def matrix_shape(base_layer: nn.Module) -> tuple[int, int]:
        """(out, in) of the base layer's weight read as a matrix."""
        raise NotImplementedError

    @staticmethod
    def input_squares(base_layer: nn.Module, x: torch.Tensor) -> torch.Tensor:
        """(in,): squares of the inputs of the base layer's output values, summed over all tokens of `x` (..., in)."""
        return x.flatten(0, -2).square().sum(dim=0)

    def _as_matrix(self, weight: torch.Tensor) -> torch.Tensor:
        """The base layer's weight as a matrix (out, in)."""
        return weight

    def _as_weight(self, matrix: torch.Tensor) -> torch.Tensor:
        """An (out, in) matrix in the shape of the base layer's weight."""
        return matrix

    def _project_input(self, x: torch.Tensor, A: torch.Tensor) -> torch.Tensor:
        """A x for an input `x` of the base layer and `A` (r, in)."""
        return F.linear(x, A)

    def _multiply(self, x: torch.Tensor, matrix: torch.Tensor) -> torch.Tensor:
        """`matrix` (p, q) times the q features of `x`."""
        return F.linear(x, matrix)

    # Adding an adapter

    def update_layer(self, adapter_name: str, config: NoraConfig, layer_name: str) -> None:
        """Add the adapter `adapter_name` to this layer and initialise it according to `config`.

        Raises: ValueError if a rank does not fit the layer `layer_name`.
        """
        check_rank((self.out_features, self.in_features), config, layer_name)
        r, inner_r = config.ranks_for(layer_name)
        self.r[adapter_name], self.inner_r[adapter_name] = r, inner_r
        self.alpha[adapter_name] = config.alpha
        self.outer_slice[adapter_name] = config.slice_and_count
        self.scaling[adapter_name] = config.alpha / inner_r
        self.nora_dropout[adapter_name] = nn.Dropout(config.dropout) if config.dropout else nn.Identity()
        # Trained in float32 for every dtype of the base layer: half precision loses small updates.
        self.nora_inner_A[adapter_name] = nn.Parameter(torch.zeros(inner_r, r))
        self.nora_inner_B[adapter_name] = nn.Parameter(torch.zeros(r, inner_r))
        # PEFT's low_cpu_mem_usage moves parameters to the meta device as they are registered, but not buffers.
        device = self.nora_inner_A[adapter_name].device
        self.nora_A[adapter_name] = torch.zeros(r, self.in_features, device=device)
        self.nora_B[adapter_name] = torch.zeros(self.out_features, r, device=device)
        self.nora_activation_scale[adapter_name] = torch.ones(self.in_features, device=device)
        if config.preserve_output:
            self.nora_inner_A0[adapter_name] = torch.zeros(inner_r, r, device=device)
            self.nora_inner_B0[adapter_name] = torch.zeros(r, inner_r, device=device)
        self._without_outer_factors.add(adapter_name)
        self._move_adapter_to_device_of_base_layer(adapter_name)
        if device.type != "meta" and self.get_base_layer().weight.device.type != "meta":
            self._initialise(adapter_name, config, layer_name)
        self.set_adapter(self.active_adapters, inference_mode=config.inference_mode)

    def _initialise(self, adapter_name: str, config: NoraConfig, layer_name: str) -> None:
        if not config.init_weights:
            self._initialise_at_random(adapter_name)
            return
        self.reset_inner_factors(adapter_name, config)
        # The weights of an adapter added for inference are about to be loaded.
        if config.outer_init == "svd" and not config.inference_mode:
            weight = self.finite_weight_matrix(layer_name)
            factors = reproducible_awsvd(weight, None, self.r[adapter_name], self.outer_slice[adapter_name])
            self.set_outer_factors(adapter_name, *factors)

    def _initialise_at_random(self, adapter_name: str) -> None:
        A, B = self.nora_A[adapter_name], self.nora_B[adapter_name]
        self.set_outer_factors(adapter_name, torch.randn_like(B), torch.randn_like(A) / math.sqrt(self.in_features))
        nn.init.normal_(self.nora_inner_A[adapter_name], std=self.r[adapter_name] ** -0.5)
        nn.init.normal_(self.nora_inner_B[adapter_name], std=self.r[adapter_name] ** -0.5)

    @torch.no_grad()
    def reset_inner_factors(self, adapter_name: str, config: NoraConfig, generator: torch.Generator | None = None) -> None:
        """Initialise the inner factors according to `config` and, with preserve_output, store their start."""
        r, inner_r = self.r[adapter_name], self.inner_r[adapter_name]
        inner_A, inner_B = self.nora_inner_A[adapter_name], self.nora_inner_B[adapter_name]
        # Sampled on the CPU, so that every device starts from the same values.
        inner_A.copy_(r**-0.5 * torch.randn(inner_r, r, generator=generator))
        if config.inner_init == "gaussian":
            inner_B.copy_(config.inner_std * torch.randn(r, inner_r, generator=generator))
        else:
            inner_B.zero_()
        if adapter_name in self.nora_inner_A0:
            self.nora_inner_A0[adapter_name].copy_(inner_A)
            self.nora_inner_B0[adapter_name].copy_(inner_B)

    @torch.no_grad()
    def set_outer_factors(self, adapter_name: str, B: torch.Tensor, A: torch.Tensor) -> None:
        """Set the frozen factors `B` (out, r) and `A` (r, in), as `awsvd` returns them."""
        self.nora_B[adapter_name].copy_(B)
        self.nora_A[adapter_name].copy_(A)
        self._without_outer_factors.discard(adapter_name)

    def finite_weight_matrix(self, layer_name: str) -> torch.Tensor:
        """The base layer's weight as a matrix (out, in), dequantised and at least float32.

        Raises: ValueError naming the layer if it is not finite.
        """
        weight = self._as_matrix(dequantize_module_weight(self.get_base_layer()).detach())
        weight = weight.to(torch.promote_types(weight.dtype, torch.float32))
        if not is_finite(weight):
            raise ValueError(f"The weight of {layer_name!r} must be finite, got NaN or infinite entries.")
        return weight

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *args: Any) -> None:
        super()._load_from_state_dict(state_dict, prefix, *args)
        loaded = {name for name in self.r if {f"{prefix}nora_A.{name}", f"{prefix}nora_B.{name}"} <= state_dict.keys()}
        self._without_outer_factors -= loaded

    def _move_adapter_to_device_of_base_layer(self, adapter_name: str, device: torch.device | None = None) -> None:
        """Move the adapter to the base layer's device; the outer factors also get its dtype."""
        base_device, dtype = self._get_base_layer_device_and_dtype(self.get_base_layer())
        device = device or base_device
        # A quantised base layer may have no floating point dtype before its first call.
        outer_dtype = dtype if dtype is not None and dtype.is_floating_point else None
        buffers_only = ("nora_A", "nora_B", "nora_inner_A0", "nora_inner_B0", "nora_activation_scale")
        for name in (*buffers_only, *self.adapter_layer_names):
            factors = getattr(self, name)
            if adapter_name in factors and factors[adapter_name].device.type != "meta":
                factors[adapter_name] = factors[adapter_name].to(device, outer_dtype if name in ("nora_A", "nora_B") else None)

    def delete_adapter(self, adapter_name: str) -> None:
        """Remove the adapter from this layer.

        Raises: ValueError while it is merged, since it could not be unmerged afterwards.
        """
        if adapter_name in self.merged_adapters:
            raise ValueError(f"Cannot delete adapter {adapter_name!r} while it is merged. Unmerge it first.")
        super().delete_adapter(adapter_name)
        self._without_outer_factors.discard(adapter_name)

    # The weight change and its scale

    def _inner_factors(self, adapter_name: str, scaling: float) -> tuple[torch.Tensor, torch.Tensor]:
        """`up` (r, k) and `down` (k, r) with up @ down = s B' A', less the frozen start; k is inner_r, or 2 inner_r."""
        if adapter_name in self._without_outer_factors:
            raise ValueError(
                f"The outer factors of NoRA adapter {adapter_name!r} are not set. "
                "Call initialize_nora_weights(model, calibrate(model, run_model)) or load saved weights first."
            )
        up, down = self.nora_inner_B[adapter_name], self.nora_inner_A[adapter_name]
        if adapter_name in self.nora_inner_A0:
            up_0, down_0 = self.nora_inner_B0[adapter_name], self.nora_inner_A0[adapter_name]
            # B'A' - B'_0 A'_0 written as (B' - B'_0) A' + B'_0 (A' - A'_0): every term is an exact zero at step 0.
            up, down = torch.cat([up - up_0, up_0], dim=1), torch.cat([down, down - down_0], dim=0)
        return scaling * up, down

    def low_rank_factors(self, adapter_name: str) -> tuple[torch.Tensor, torch.Tensor]:
        """`up` (out, k) and `down` (k, in), float32, whose product is the change of the weight matrix, including the scaling."""
        return self._low_rank_factors(adapter_name, self.scaling[adapter_name])

    @torch.no_grad()
    def _low_rank_factors(self, adapter_name: str, scaling: float) -> tuple[torch.Tensor, torch.Tensor]:
        up, down = self._inner_factors(adapter_name, scaling)
        return self.nora_B[adapter_name].float() @ up.float(), down.float() @ self.nora_A[adapter_name].float()

    def get_delta_weight(self, adapter_name: str) -> torch.Tensor:
        """The weight change s B B' A' A, or s B (B' A' - B'_0 A'_0) A with `preserve_output`, which merging adds.

        Returns: in the shape of the base layer's weight, float32.
        """
        up, down = self.low_rank_factors(adapter_name)
        return self._as_weight(up @ down)

    def set_scale(self, adapter_name: str, scale: float) -> None:
        """Set the adapter's scaling to `scale` times alpha / inner_r."""
        if adapter_name in self.scaling:
            self.scaling[adapter_name] = scale * self.alpha[adapter_name] / self.inner_r[adapter_name]

    def scale_layer(self, scale: float) -> None:
        """Multiply the scaling of every active adapter by `scale`."""
        for adapter_name in self._own_active_adapters():
            self.scaling[adapter_name] *= scale

    def unscale_layer(self, scale: float | None = None) -> None:
        """Divide the scaling of every active adapter by `scale`, or reset it if `scale` is None."""
        for adapter_name in self._own_active_adapters():
            if scale is None:
                self.set_scale(adapter_name, 1.0)
            else:
                self.scaling[adapter_name] /= scale

    def _own_active_adapters(self) -> list[str]:
        return [name for name in self.active_adapters if name in self.nora_inner_A]

    # Merging

    def merge(self, safe_merge: bool = False, adapter_names: list[str] | None = None) -> None:
        """Add the weight change of each adapter (default: the active ones) to the base layer's weight.

        Raises: ValueError with `safe_merge` if the sum is not finite; the weight is not changed then.
        """
        for adapter_name in check_adapters_to_merge(self, adapter_names):
            if adapter_name not in self.nora_inner_A:
                continue
            scaling = self.scaling[adapter_name]
            merged = self._weight_plus_change(adapter_name, scaling)
            if safe_merge and not torch.isfinite(merged).all():
                raise ValueError(f"NaNs detected in the merged weights. The adapter {adapter_name} seems to be broken")
            self.get_base_layer().weight.data = merged
            self.merged_adapters.append(adapter_name)
            self._merged_scaling[adapter_name] = scaling

    def unmerge(self) -> None:
        """Subtract all merged weight changes, each at the scaling it was merged with."""
        if not self.merged:
            warnings.warn("Already unmerged. Nothing to do.", stacklevel=2)
        while self.merged_adapters:
            adapter_name = self.merged_adapters.pop()
            self.get_base_layer().weight.data = self._weight_plus_change(adapter_name, -self._merged_scaling.pop(adapter_name))

    def _weight_plus_change(self, adapter_name: str, scaling: float) -> torch.Tensor:
        weight = self.get_base_layer().weight.data
        if not weight.is_floating_point():
            raise ValueError(
                f"Merging needs floating point weights, got {weight.dtype}. Load the base model without quantisation."
            )
        up, down = self._low_rank_factors(adapter_name, scaling)
        # Summed in float32 or better: half precision would round the change away.
        return (self._as_weight(up @ down) + weight).to(weight.dtype)

    def supports_lora_conversion(self, adapter_name: str = "default") -> bool:
        """True, since the weight change is a product of two low-rank factors."""
        return True

    # Forward

    def forward(self, x: torch.Tensor, *args: Any, adapter_names: list[str] | None = None, **kwargs: Any) -> torch.Tensor:
        """The base layer's output plus s B B' A' A x for every active adapter, in the shape and dtype of the base layer's output.

        Args:
            x: the input of the base layer.
            adapter_names: one adapter (or "__base__") for each sample of the batch, instead of the active adapters.
        """
        if self.disable_adapters:
            if self.merged:
                self.unmerge()
            return self.base_layer(x, *args, **kwargs)
        if adapter_names is not None:
            return self._forward_mixed_batch(x, adapter_names, *args, **kwargs)
        result = self.base_layer(x, *args, **kwargs)
        if not self.merged:
            for adapter_name in self._own_active_adapters():
                result = result + self._change_of_output(x, adapter_name, result.dtype)
        return result

    def _change_of_output(self, x: torch.Tensor, adapter_name: str, dtype: torch.dtype) -> torch.Tensor:
        A, B = self.nora_A[adapter_name], self.nora_B[adapter_name]
        up, down = self._inner_factors(adapter_name, self.scaling[adapter_name])
        # A is frozen, so autograd saves A x (r features) instead of x; for the same reason dropout comes after A.
        # Autocast casts the factors of every product itself.
        if not torch.is_autocast_enabled(x.device.type):
            x, B = self._cast_input_dtype(x, A.dtype), B.to(up.dtype)
        hidden = self.nora_dropout[adapter_name](self._project_input(x, A))
        hidden = self._multiply(hidden.to(down.dtype), down)
        # B up (out, k) costs a product of weights, but saves a product of all tokens with B.
        return self._multiply(hidden.to(dtype), (B @ up).to(dtype))

    def _forward_mixed_batch(self, x: torch.Tensor, adapter_names: list[str], *args: Any, **kwargs: Any) -> torch.Tensor:
        if len(x) != len(adapter_names):
            raise ValueError(f"adapter_names must name one adapter for each of the {len(x)} inputs, got {len(adapter_names)}.")
        if self.merged:
            raise ValueError("Cannot pass `adapter_names` when there are merged adapters, please call `unmerge_adapter` first.")
        result = self.base_layer(x, *args, **kwargs)
        for adapter_name in sorted(set(adapter_names) & self.nora_inner_A.keys()):
            rows = torch.tensor([i for i, name in enumerate(adapter_names) if name == adapter_name], device=x.device)
            result = result.index_add(0, rows, self._change_of_output(x[rows], adapter_name, result.dtype).to(result.dtype))
        return result


def nora_layers(model: nn.Module) -> dict[str, NoraLayer]:
    """All NoRA layers of `model` by name."""
    return {name: module for name, module in model.named_modules() if isinstance(module, NoraLayer)}


def check_rank(shape: tuple[int, int], config: NoraConfig, layer_name: str) -> None:
    """Check that the ranks in `config` for the layer `layer_name` fit its weight of shape (out, in).

    Raises: ValueError naming the layer if a rank is out of range.
    """
    r, _ = config.ranks_for(layer_name)
    _, count = config.slice_and_count
    largest = min(shape) // count
    if r > largest:
        slices = f" and outer_slice={config.outer_slice!r}, which needs {count} r directions" if count > 1 else ""
        raise ValueError(
            f"r must be in [1, {largest}] for {layer_name!r}, whose weight is {shape[0]} x {shape[1]}, got {r}{slices}. "
            "Lower r, set a rank for this layer in rank_pattern, or add it to exclude_modules."
        )
