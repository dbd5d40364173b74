"""NoRA layers: a frozen base layer, frozen outer factors, and small trained inner factors."""

from __future__ import annotations

import math
import warnings
from collections.abc import Iterator
from typing import Any

import torch
from peft.tuners._buffer_dict import BufferDict
from peft.tuners.tuners_utils import BaseTunerLayer, check_adapters_to_merge
from torch import nn
from torch.nn import functional as F

from .config import NoraConfig
from .decomposition import is_finite, reproducible_awsvd
from .inner import FROZEN_STARTS, TRAINED, InnerForm, gated
from .outer import OuterScaling, outer_coefficients, scaled_outer_factors
from .products import frozen_product, is_cheaper_first, nested_product
from .quantization import dequantized_weight, is_quantized


class NoraLayer(nn.Module, BaseTunerLayer):
    """Base class of NoRA layers. Subclasses define the base layer's weight as a matrix, and products with its input.

        h = W x + s B M A x,  M = B' A'                       [serial NoRA; `nora_vision.inner` has the other forms of M]
        h = W x + s B (M - M_0) A x                           [with preserve_output]

    State, by adapter name: `nora_A` (r, in) and `nora_B` (out, r) frozen, in the base layer's dtype; `nora_inner_A` A'
    (inner_r, r) and `nora_inner_B` B' (r, inner_r), or the tensors of another form, trained, in float32; with preserve_output
    their frozen start in `nora_inner_A0`, `nora_inner_B0`. A and B were computed from the weight and `nora_activation_scale`
    (in,), which is all ones for the plain SVD. `in` is the number of inputs of one output value: in_channels * kh * kw for a
    convolution.
    """

    adapter_layer_names = TRAINED
    other_param_names = (
        "nora_A", "nora_B", *FROZEN_STARTS.values(), "nora_activation_scale", "nora_dropout", "r", "inner_r", "alpha", "scaling",
        "reproducible", "outer_slice", "inner_form", "outer_scaling",
    )  # fmt: skip

    def __init__(self, base_layer: nn.Module, adapter_name: str, config: NoraConfig, layer_name: str) -> None:
        super().__init__()
        self.base_layer = base_layer
        self.r: dict[str, int] = {}
        self.inner_r: dict[str, int] = {}
        self.alpha: dict[str, float] = {}
        self.scaling: dict[str, float] = {}
        self.outer_slice: dict[str, tuple[int, int]] = {}
        self.inner_form: dict[str, InnerForm] = {}
        self.outer_scaling: dict[str, OuterScaling] = {}
        self.nora_A = BufferDict(persistent=True)
        self.nora_B = BufferDict(persistent=True)
        for name in TRAINED:
            setattr(self, name, nn.ParameterDict())
        for name in FROZEN_STARTS.values():
            setattr(self, name, BufferDict(persistent=True))
        self.nora_activation_scale = BufferDict(persistent=True)
        self.nora_dropout = nn.ModuleDict()
        self.merged_adapters: list[str] = []
        self._merged_scaling: dict[str, float] = {}
        self._without_outer_factors: set[str] = set()
        # Digests of the source of the outer factors, and of the factors; see `nora_vision.reproducible`.
        self.reproducible: dict[str, tuple[str, str]] = {}
        # The weight before quantisation while adapters are initialised from it, and then its hash.
        self.unquantized: torch.Tensor | None = None
        self.unquantized_digest: str | None = None
        self.out_features, self.in_features = self.matrix_shape(self.get_base_layer())
        self._active_adapter = adapter_name
        self.update_layer(adapter_name, config, layer_name)

    # Defined by subclasses

    feature_axis = -1

    @staticmethod
    def matrix_shape(base_layer: nn.Module) -> tuple[int, int]:
        """(out, in) of the base layer's weight read as a matrix."""
        raise NotImplementedError

    @staticmethod
    def input_squares(base_layer: nn.Module, x: torch.Tensor) -> torch.Tensor:
        """(in,): squares of the inputs of the base layer's output values, summed over all tokens of `x` (..., in)."""
        return x.flatten(0, -2).square().sum(dim=0)

    @staticmethod
    def input_rows(base_layer: nn.Module, x: torch.Tensor) -> Iterator[torch.Tensor]:
        """The inputs of the base layer's output values for `x` (..., in), as matrices (tokens, in)."""
        yield x.flatten(0, -2)

    def _as_matrix(self, weight: torch.Tensor) -> torch.Tensor:
        """The base layer's weight as a matrix (out, in)."""
        return weight

    def _as_weight(self, matrix: torch.Tensor) -> torch.Tensor:
        """An (out, in) matrix in the shape of the base layer's weight."""
        return matrix

    def _project_input(self, x: torch.Tensor, A: torch.Tensor) -> torch.Tensor:
        """A x for an input `x` of the base layer and `A` (r, in)."""
        return F.linear(x, A)

    def _nested_product(self, x: torch.Tensor, A: torch.Tensor, down: torch.Tensor) -> torch.Tensor:
        """`down` A x for an input `x` of the base layer, A (r, in) and `down` (k, r)."""
        return nested_product(x, A, down)

    def _multiply(self, x: torch.Tensor, matrix: torch.Tensor) -> torch.Tensor:
        """`matrix` (p, q) times the q features of `x`."""
        return F.linear(x, matrix)

    # Adding an adapter

    def update_layer(self, adapter_name: str, config: NoraConfig, layer_name: str) -> None:
        """Add the adapter `adapter_name` to this layer and initialise it according to `config`.

        Raises: ValueError if a rank does not fit the layer `layer_name`.
        """
        config.check_rank((self.out_features, self.in_features), layer_name)
        form = self.inner_form[adapter_name] = config.inner_form_for(layer_name)
        r, inner_r = form.r, form.inner_r
        self.r[adapter_name], self.inner_r[adapter_name] = r, inner_r
        self.alpha[adapter_name] = config.alpha
        self.outer_slice[adapter_name] = config.slice_and_count
        self.scaling[adapter_name] = config.alpha / inner_r
        self.outer_scaling[adapter_name] = config.outer_scaling
        self.nora_dropout[adapter_name] = nn.Dropout(config.dropout) if config.dropout else nn.Identity()
        # Trained in float32 for every dtype of the base layer: half precision loses small updates.
        for name, shape in form.shapes().items():
            getattr(self, name)[adapter_name] = nn.Parameter(torch.zeros(shape))
            # PEFT's low_cpu_mem_usage moves parameters to the meta device as they are registered, but not buffers.
            device = getattr(self, name)[adapter_name].device
        self.nora_A[adapter_name] = torch.zeros(r, self.in_features, device=device)
        self.nora_B[adapter_name] = torch.zeros(self.out_features, r, device=device)
        self.nora_activation_scale[adapter_name] = torch.ones(self.in_features, device=device)
        if config.preserve_output:
            for name, shape in form.start_shapes().items():
                getattr(self, name)[adapter_name] = torch.zeros(shape, device=device)
        self._without_outer_factors.add(adapter_name)
        self._move_adapter_to_device_of_base_layer(adapter_name)
        if device.type != "meta" and self.get_base_layer().weight.device.type != "meta":
            self._initialise(adapter_name, config, layer_name)
        self.set_adapter(self.active_adapters, inference_mode=config.inference_mode)

    def _initialise(self, adapter_name: str, config: NoraConfig, layer_name: str) -> None:
        if not config.init_weights:
            self._initialise_at_random(adapter_name)
            return
        # The weights of an adapter added for inference are about to be loaded.
        if config.outer_init == "svd" and not config.inference_mode:
            weight = self.finite_weight_matrix(layer_name)
            factors = reproducible_awsvd(weight, None, self.r[adapter_name], self.outer_slice[adapter_name])
            self.set_outer_factors(adapter_name, *scaled_outer_factors(*factors, config.outer_scaling))
        self.reset_inner_factors(adapter_name, config)

    def _initialise_at_random(self, adapter_name: str) -> None:
        A, B = self.nora_A[adapter_name], self.nora_B[adapter_name]
        self.set_outer_factors(adapter_name, torch.randn_like(B), torch.randn_like(A) / math.sqrt(self.in_features))
        for name in self.inner_form[adapter_name].shapes():
            nn.init.normal_(getattr(self, name)[adapter_name], std=self.r[adapter_name] ** -0.5)

    @torch.no_grad()
    def reset_inner_factors(self, adapter_name: str, config: NoraConfig, generator: torch.Generator | None = None) -> None:
        """Initialise the inner factors according to `config` and, with preserve_output, store their start."""
        coefficients = None
        if config.inner_init == "singular_values":
            weight = self._as_matrix(self.base_weight())
            coefficients = outer_coefficients(weight, self.nora_B[adapter_name], self.nora_A[adapter_name]).cpu()
        start = self.inner_form[adapter_name].start(config.inner_init, coefficients, generator)
        tensors = self.inner_tensors(adapter_name)
        for name, value in start.items():
            tensors[name].copy_(value)
            if FROZEN_STARTS.get(name) in tensors:
                tensors[FROZEN_STARTS[name]].copy_(value)

    @torch.no_grad()
    def set_outer_factors(self, adapter_name: str, B: torch.Tensor, A: torch.Tensor) -> None:
        """Set the frozen factors `B` (out, r) and `A` (r, in), as `awsvd` returns them.

        Raises: ValueError if an entry is not finite in the base layer's dtype: float16 ends at 65,504.
        """
        for factors, values in ((self.nora_B[adapter_name], B), (self.nora_A[adapter_name], A)):
            factors.copy_(values)
            if not is_finite(factors):
                raise ValueError(
                    f"The outer factors of NoRA adapter {adapter_name!r} must be at most {torch.finfo(factors.dtype).max:.3g} "
                    f"for {factors.dtype} weights, got {values.abs().max().item():.3g}. Use bfloat16 or float32 weights."
                )
        self._without_outer_factors.discard(adapter_name)

    def base_weight(self) -> torch.Tensor:
        """The base layer's weight in its shape before quantisation: `unquantized` if it is set, else dequantised."""
        return dequantized_weight(self.get_base_layer()) if self.unquantized is None else self.unquantized

    def finite_weight_matrix(self, layer_name: str) -> torch.Tensor:
        """`base_weight` as a matrix (out, in), at least float32.

        Raises: ValueError naming the layer if it is not finite.
        """
        weight = self._as_matrix(self.base_weight())
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
        buffers_only = ("nora_A", "nora_B", *FROZEN_STARTS.values(), "nora_activation_scale")
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

    def inner_tensors(self, adapter_name: str) -> dict[str, torch.Tensor]:
        """The trained tensors of the adapter and their frozen starts, by the names in `nora_vision.inner`."""
        tensors = {name: getattr(self, name) for name in (*TRAINED, *FROZEN_STARTS.values())}
        return {name: by_adapter[adapter_name] for name, by_adapter in tensors.items() if adapter_name in by_adapter}

    def _inner_factors(self, adapter_name: str, scaling: float) -> tuple[torch.Tensor, torch.Tensor]:
        """`up` (r, k) and `down` (k, r) with up @ down = s M, less the frozen start; serially k is inner_r, or 2 inner_r."""
        if adapter_name in self._without_outer_factors:
            raise ValueError(
                f"The outer factors of NoRA adapter {adapter_name!r} are not set. "
                "Call initialize_nora_weights(model, calibrate(model, run_model)) or load saved weights first."
            )
        up, down = self.inner_form[adapter_name].factors(self.inner_tensors(adapter_name))
        return scaling * up, down

    def low_rank_factors(self, adapter_name: str) -> tuple[torch.Tensor, torch.Tensor]:
        """`up` (out, k) and `down` (k, in), float32, whose product is the change of the weight matrix, including the scaling."""
        return self._low_rank_factors(adapter_name, self.scaling[adapter_name])

    @torch.no_grad()
    def _low_rank_factors(self, adapter_name: str, scaling: float) -> tuple[torch.Tensor, torch.Tensor]:
        self._check_is_weight_change(adapter_name)
        up, down = self._inner_factors(adapter_name, scaling)
        return self.nora_B[adapter_name].float() @ up.float(), down.float() @ self.nora_A[adapter_name].float()

    def get_delta_weight(self, adapter_name: str) -> torch.Tensor:
        """The weight change s B M A, or s B (M - M_0) A with `preserve_output`, which merging adds.

        Returns: in the shape of the base layer's weight, float32.
        Raises: ValueError for a mixture of subspaces, whose change depends on the input.
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
        return [name for name in self.active_adapters if name in self.r]

    # Merging

    def merge(self, safe_merge: bool = False, adapter_names: list[str] | None = None) -> None:
        """Add the weight change of each adapter (default: the active ones) to the base layer's weight.

        Raises: ValueError for a mixture of subspaces, and with `safe_merge` if the sum is not finite; the weight is not changed
            then.
        """
        to_merge = [name for name in check_adapters_to_merge(self, adapter_names) if name in self.r]
        for adapter_name in to_merge:
            self._check_is_weight_change(adapter_name)
        for adapter_name in to_merge:
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
        if is_quantized(self.get_base_layer()):
            raise ValueError(
                f"Merging needs floating point weights, got {weight.dtype}, which rounds most of the change away. Merge into "
                "the dequantised model, which keeps the outputs, or into the base model loaded without quantisation."
            )
        up, down = self._low_rank_factors(adapter_name, scaling)
        # Summed in float32 or better: half precision would round the change away.
        return (self._as_weight(up @ down) + weight).to(weight.dtype)

    def supports_lora_conversion(self, adapter_name: str = "default") -> bool:
        """Whether the weight change is a product of two low-rank factors: not for a mixture of subspaces."""
        return adapter_name not in self.nora_gate

    def _check_is_weight_change(self, adapter_name: str) -> None:
        if not self.supports_lora_conversion(adapter_name):
            raise ValueError(gated(f"NoRA adapter {adapter_name!r} is"))

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
            x = self._cast_input_dtype(x, A.dtype)
        if adapter_name in self.nora_gate or isinstance(self.nora_dropout[adapter_name], nn.Dropout):
            hidden = self.nora_dropout[adapter_name](self._gated(self._project_input(x, A), adapter_name))
            hidden = self._multiply(hidden.to(down.dtype), down)
        else:
            hidden = self._nested_product(x, A, down)
        # B up (out, k) costs a product of weights, but saves one of all tokens with B. For few tokens, B is cheaper.
        if is_cheaper_first(B, up, tokens=hidden.numel() // len(down)):
            return self._multiply(hidden.to(dtype), frozen_product(B, up).to(dtype))
        return self._multiply(self._multiply(hidden.to(up.dtype), up).to(B.dtype), B).to(dtype)

    def _gated(self, hidden: torch.Tensor, adapter_name: str) -> torch.Tensor:
        """`hidden`, A x, times the gates of its slices; M is block-diagonal, so that this is a factor of M A x too."""
        if adapter_name not in self.nora_gate:
            return hidden
        gate = self.nora_gate[adapter_name]
        axis = self.feature_axis
        weights = len(gate) * self._multiply(hidden.to(gate.dtype), gate).softmax(dim=axis)
        return hidden * weights.repeat_interleave(gate.shape[1] // len(gate), dim=axis)

    def _forward_mixed_batch(self, x: torch.Tensor, adapter_names: list[str], *args: Any, **kwargs: Any) -> torch.Tensor:
        if len(x) != len(adapter_names):
            raise ValueError(f"adapter_names must name one adapter for each of the {len(x)} inputs, got {len(adapter_names)}.")
        if self.merged:
            raise ValueError("Cannot pass `adapter_names` when there are merged adapters, please call `unmerge_adapter` first.")
        result = self.base_layer(x, *args, **kwargs)
        for adapter_name in sorted(set(adapter_names) & self.r.keys()):
            rows = torch.tensor([i for i, name in enumerate(adapter_names) if name == adapter_name], device=x.device)
            result = result.index_add(0, rows, self._change_of_output(x[rows], adapter_name, result.dtype).to(result.dtype))
        return result


def nora_layers(model: nn.Module) -> dict[str, NoraLayer]:
    """All NoRA layers of `model` by name."""
    return {name: module for name, module in model.named_modules() if isinstance(module, NoraLayer)}
