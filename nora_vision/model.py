"""The NoRA tuner, which replaces the layers to adapt by NoRA layers."""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from functools import partial
from typing import Any

import torch
from peft.tuners.tuners_utils import BaseTuner, BaseTunerLayer, _maybe_include_all_linear_layers
from peft.utils import TRANSFORMERS_MODELS_TO_LORA_TARGET_MODULES_MAPPING, _get_submodules
from peft.utils.constants import DUMMY_TARGET_MODULES
from peft.utils.other import AuxiliaryTrainingWrapper
from torch import nn

from .combination import EXACT_TYPES, check_weights, combined_config, set_factors, weighted_sum
from .config import NoraConfig
from .layer import NoraLayer, nora_layers
from .layer_types import check_layer, layer_class_for
from .quantization import keep_differentiable

# Arguments of PEFT's add_weighted_adapter that do not change an exact sum; the last is for types that NoRA refuses.
SVD_ROUTINES = frozenset({"svd_full_matrices", "svd_driver", "majority_sign_method"})


class NoraModel(BaseTuner):
    """Adapts `model` in place with NoRA layers; use `get_peft_model`, `inject_adapter_in_model` or `add_adapter`.

    A failed injection leaves the model unchanged.
    """

    prefix: str = "nora_"
    tuner_layer_cls = NoraLayer
    target_module_mapping = TRANSFORMERS_MODELS_TO_LORA_TARGET_MODULES_MAPPING

    def __init__(self, model: nn.Module, peft_config: Any, adapter_name: str, *args: Any, **kwargs: Any) -> None:
        if any(adapter_name in layer.r for layer in nora_layers(model).values()):
            raise ValueError(f"Adapter with name {adapter_name!r} already exists. Delete it first or use a different name.")
        super().__init__(model, peft_config, adapter_name, *args, **kwargs)

    def inject_adapter(self, model: nn.Module, adapter_name: str, *args: Any, **kwargs: Any) -> None:
        """Inject the adapter's layers into `model`; an error leaves it unchanged."""
        self._from_state_dict = kwargs.get("state_dict") is not None
        requires_grad = {parameter: parameter.requires_grad for parameter in model.parameters()}
        with ExitStack() as on_failure:
            on_failure.callback(self._remove_traces, model, adapter_name, requires_grad)
            super().inject_adapter(model, adapter_name, *args, **kwargs)
            on_failure.pop_all()
        config = self.peft_config[adapter_name]
        if config.init_weights and config.outer_init == "svd" and not config.inference_mode:
            warnings.warn(
                f"NoRA adapter {adapter_name!r} starts from the plain SVD of the weights, without activation statistics. "
                "For AwSVD set outer_init='awsvd' and call initialize_nora_weights(model, calibrate(model, run_model)).",
                stacklevel=2,
            )

    def _remove_traces(self, model: nn.Module, adapter_name: str, requires_grad: dict[nn.Parameter, bool]) -> None:
        """Undo a failed injection: layers, configuration, and the flag that diffusers and transformers set before it."""
        for name, layer in nora_layers(model).items():
            if adapter_name in layer.r:
                layer.delete_adapter(adapter_name)
                if not layer.r:
                    parent, _, child = _get_submodules(model, name)
                    setattr(parent, child, layer.base_layer)
        for parameter, required in requires_grad.items():
            parameter.requires_grad_(required)
        self.peft_config.pop(adapter_name, None)
        if not self.peft_config and getattr(model, "_hf_peft_config_loaded", False):
            model._hf_peft_config_loaded = False

    def _prepare_model(self, peft_config: NoraConfig, model: nn.Module) -> None:
        """Check every target before the first layer is replaced."""
        if not peft_config.inference_mode:
            keep_differentiable(model)
        if peft_config.target_modules == DUMMY_TARGET_MODULES:
            return
        _maybe_include_all_linear_layers(peft_config, model)
        names = _adaptable_names(model)
        peft_config.check_modules(names, type(model).__name__)
        targets = [name for name in names if self._check_target_module_exists(peft_config, name)]
        for name in targets:
            module = model.get_submodule(name)
            check_layer(module.get_base_layer() if isinstance(module, BaseTunerLayer) else module, peft_config, name)
        # A state dict that determines the adapted layers also determines the ranks. PEFT refuses adapters without layers.
        if targets and not self._from_state_dict:
            peft_config.check_patterns(targets, type(model).__name__)

    def _create_and_replace(
        self,
        peft_config: NoraConfig,
        adapter_name: str,
        target: nn.Module,
        target_name: str,
        parent: nn.Module,
        current_key: str,
        **optional_kwargs: Any,
    ) -> None:
        if isinstance(target, NoraLayer):
            target.update_layer(adapter_name, peft_config, current_key)
            return
        base_layer = target.get_base_layer() if isinstance(target, BaseTunerLayer) else target
        layer = layer_class_for(base_layer, current_key)(target, adapter_name, peft_config, current_key)
        if adapter_name not in self.active_adapters:
            layer.requires_grad_(False)
        self._replace_module(parent, target_name, layer, target)

    def _replace_module(self, parent: nn.Module, child_name: str, new_module: nn.Module, child: nn.Module) -> None:
        # A NoRA layer is already on the device of its base layer, and PEFT's method does not support buffers on the meta
        # device.
        setattr(parent, child_name, new_module)

    def _cast_adapter_dtype(self, adapter_name: str, autocast_adapter_dtype: bool = True) -> None:
        """Keep the frozen outer factors in the base layer's dtype; the trained factors are float32 already.

        With `autocast_adapter_dtype=False` the trained factors are cast to the base layer's dtype too, as PEFT documents.
        """
        if autocast_adapter_dtype:
            return
        for layer in nora_layers(self.model).values():
            if adapter_name in layer.r:
                for name, tensor in layer.inner_tensors(adapter_name).items():
                    getattr(layer, name)[adapter_name] = tensor.to(layer.nora_A[adapter_name].dtype)

    def add_weighted_adapter(
        self,
        adapters: Sequence[str],
        weights: Sequence[float],
        adapter_name: str,
        combination_type: str = "svd",
        svd_rank: int | None = None,
        **options: Any,
    ) -> None:
        """Add the adapter `adapter_name` whose weight changes are the weighted sums of those of `adapters`.

        The sum is exact for the types "linear", "svd" and "cat": outer and inner factors are concatenated, so the ranks add up.
        The adapters may have different ranks, layers and values of preserve_output.

        Args:
            adapters, weights: names of the adapters, each at its current scaling, and their weights, which may be negative.
            combination_type: types that drop entries of the changes, such as "ties" and "dare_linear", are not supported.
            svd_rank: with "svd", the inner rank of the best approximation that replaces the sum.
            options: PEFT's options of the SVD (svd_full_matrices, svd_driver), which have no effect.
        Raises: ValueError for an unknown adapter, a name in use, or unsupported options; the model stays unchanged.
        """
        _check_combination(combination_type, svd_rank, options)
        if adapter_name in self.peft_config or not adapter_name or "." in adapter_name:
            raise ValueError(f"adapter_name must be a new name without a dot, got {adapter_name!r}.")
        check_weights(adapters, weights, self.peft_config)
        sums = {}
        for name, layer in nora_layers(self.model).items():
            present = [pair for pair in zip(adapters, weights, strict=True) if pair[0] in layer.r]
            if present:
                sums[name] = weighted_sum(layer, present, svd_rank)
        config = self.peft_config[adapter_name] = combined_config(self.peft_config[adapters[0]], sums)
        # The inner factors that injection samples are overwritten, so sampling must not change the user's random state.
        with torch.random.fork_rng(devices=[]):
            self.inject_adapter(self.model, adapter_name)
        for name, factors in sums.items():
            set_factors(self.model.get_submodule(name), adapter_name, factors)
        config.outer_init = self.peft_config[adapters[0]].outer_init

    @contextmanager
    def _enable_peft_forward_hooks(self, *args: Any, **kwargs: Any) -> Iterator[None]:
        """Pass `adapter_names`, one for each sample of the batch, to every layer in a forward pass."""
        adapter_names = kwargs.get("adapter_names")
        if adapter_names is None:
            yield
            return
        if self.training:
            raise ValueError("Cannot pass `adapter_names` when the model is in training mode.")
        unknown = sorted(set(adapter_names) - {"__base__"} - self.peft_config.keys())
        if unknown:
            raise ValueError(f"Trying to infer with non-existing adapter(s): {', '.join(unknown)}")
        with ExitStack() as hooks:
            for module in self.modules():
                if isinstance(module, (NoraLayer, AuxiliaryTrainingWrapper)):
                    hook = partial(_add_adapter_names, adapter_names)
                    hooks.callback(module.register_forward_pre_hook(hook, with_kwargs=True).remove)
            yield


def _add_adapter_names(
    adapter_names: list[str], module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> tuple[tuple[Any, ...], dict[str, Any]]:
    return args, kwargs | {"adapter_names": adapter_names}


def _check_combination(combination_type: str, svd_rank: int | None, options: dict[str, Any]) -> None:
    """Check the arguments of `add_weighted_adapter`.

    Raises: ValueError naming an argument that is not supported.
    """
    if combination_type not in EXACT_TYPES:
        raise ValueError(
            f"combination_type must be one of {EXACT_TYPES} for NoRA, which all give the exact weighted sum, got "
            f"{combination_type!r}. For PEFT's other types export the adapters as LoRA (export_lora)."
        )
    if svd_rank is not None and (combination_type != "svd" or svd_rank < 1):
        raise ValueError(f"svd_rank must be at least 1 and needs combination_type='svd', got {svd_rank}.")
    unsupported = {name: value for name, value in options.items() if name not in SVD_ROUTINES and value is not None}
    if unsupported:
        raise ValueError(f"add_weighted_adapter of NoRA does not support {unsupported}. Leave them out.")


def _adaptable_names(model: nn.Module) -> list[str]:
    """Names of all modules except the root and those inside adapter layers."""
    names: list[str] = []
    inside: tuple[str, ...] = ()
    for name, module in model.named_modules():
        if name and not name.startswith(inside or "\0"):
            names.append(name)
            if isinstance(module, BaseTunerLayer):
                inside += (f"{name}.",)
    return names
