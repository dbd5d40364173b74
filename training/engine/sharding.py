"""FSDP: parameters that lie in parts on all processes, and having them whole where one process works alone.

accelerate splits a module in place, once, and for good; nothing here does anything to a module that is not split.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from accelerate.utils import DistributedType, broadcast
from torch import nn
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy
from torch.distributed.tensor import DTensor, distribute_tensor

from pipelines.adapter_method import AdapterMethod
from pipelines.errors import InputError
from pipelines.optimizers import trainable_parameters


def check_can_shard(accelerator: Accelerator, optimizer: str, eight_bit: bool, methods: Sequence[AdapterMethod] = ()) -> None:
    """Check that training can be split as `accelerator` was configured; nothing is asked of one that splits nothing.

    Args:
        optimizer: its name, as `Adam.kind`.
        eight_bit: whether it keeps its moments in 8 bits.
        methods: of the adapters.
    Raises: InputError for version 1 of FSDP, a PyTorch that is too old, and optimisers that need whole parameters.
    """
    if accelerator.distributed_type != DistributedType.FSDP:
        return
    if not accelerator.is_fsdp2:
        raise InputError("fsdp_version must be 2, as in training/configs/fsdp.yaml: version 1 trains no parts of a layer.")
    if not hasattr(FSDPModule, "reset_iter_state"):
        raise InputError(f"FSDP needs the PyTorch of requirements.txt or a newer one, got {torch.__version__}. Install that.")
    if optimizer.lower() != "adamw" or eight_bit:
        raise InputError(
            "With FSDP each process holds parts of parameters, which only --optimizer AdamW without --use_8bit_adam can train. "
            "Leave these out, or use training/configs/multi_gpu.yaml."
        )
    for method in methods:
        if not method.can_be_sharded:
            raise InputError(
                f"With FSDP each process holds parts of parameters, and {method.title} needs them whole. Use "
                "training/configs/multi_gpu.yaml, or another method."
            )


def prepare(
    accelerator: Accelerator, module: nn.Module, optimizer: torch.optim.Optimizer
) -> tuple[nn.Module, torch.optim.Optimizer]:
    """`accelerator.prepare` for a module that may be split already; the optimiser has no state yet where it splits it."""
    if isinstance(module, FSDPModule):
        # accelerate tells parameters apart by their addresses, and the empty parts of small ones have none.
        return module, accelerator.prepare_optimizer(optimizer)
    if accelerator.distributed_type == DistributedType.FSDP:
        _send_from_first(module)
        # Numbers as without FSDP: the loop's autocast chooses the precision of each operation, the loss stays in float32.
        accelerator.state.fsdp_plugin.mixed_precision_policy = MixedPrecisionPolicy()
    return accelerator.prepare(module, optimizer)


@torch.no_grad()
def _send_from_first(module: nn.Module) -> None:
    """Give all processes the first one's tensors, as DDP does: each keeps a part of its own."""
    for tensor in (*module.parameters(), *module.buffers()):
        tensor.copy_(broadcast(tensor.contiguous()))


@contextmanager
def summon_full_params(module: nn.Module) -> Iterator[None]:
    """Have each process hold all parameters of `module` as plain tensors meanwhile; all processes enter this together.

    One of them may then run, save and change the module alone; changes of its parameters are gone afterwards.
    """
    parts = [part for part in module.modules() if isinstance(part, FSDPModule)]
    if not parts:
        yield
        return
    # Whichever part is called first takes itself for the root, which here may be the UNet.
    module._get_fsdp_state()._lazy_init()
    for part in parts:
        part.unshard()
    module.set_reshard_after_forward(False)
    try:
        with _state_dicts_of_whole_parameters(parts):
            yield
    finally:
        module.set_reshard_after_forward(AcceleratorState().fsdp_plugin.reshard_after_forward)
        for part in parts:
            part.reshard()
        # What one process alone has run must not tell it to fetch parameters that the others do not send.
        module.reset_iter_state()


@contextmanager
def _state_dicts_of_whole_parameters(parts: Sequence[FSDPModule]) -> Iterator[None]:
    """Leave out FSDP's hooks, which split parameters again before and after a state dict is read or loaded."""
    groups = [group for part in parts for group in part._get_fsdp_state()._fsdp_param_groups]
    for group in groups:
        for handles in (group._module_to_pre_save_state_dict_hook_handle, group._module_to_pre_load_state_dict_hook_handle):
            for handle in handles.values():
                handle.remove()
            handles.clear()
        for parameter in group.fsdp_params:
            parameter._post_load_hook_handle.remove()
    try:
        yield
    finally:
        for group in groups:
            group._register_state_dict_hooks()
            for parameter in group.fsdp_params:
                reset = partial(_reset_after_load, parameter)
                parameter._post_load_hook_handle = parameter._module_info.module.register_load_state_dict_post_hook(reset)


def _reset_after_load(parameter: Any, module: nn.Module, incompatible_keys: object) -> None:
    """What FSDP does after a state dict was loaded."""
    parameter.reset_sharded_param()


def gathered(value: Any) -> Any:
    """`value`, with all split tensors in nested dictionaries and lists made whole; all processes call this together."""
    if isinstance(value, DTensor):
        return value.full_tensor()
    if isinstance(value, dict):
        return {name: gathered(part) for name, part in value.items()}
    return [gathered(part) for part in value] if isinstance(value, list) else value


def split_like(value: torch.Tensor, like: torch.Tensor) -> torch.Tensor:
    """This process's part of `value`, which all processes hold, where `like`, of the same shape, is split; else `value`."""
    if not isinstance(like, DTensor) or isinstance(value, DTensor):
        return value
    return distribute_tensor(value.to(like.device), like.device_mesh, like.placements, src_data_rank=None)


@torch.no_grad()
def assign(parameter: torch.Tensor, value: torch.Tensor) -> None:
    """Copy `value`, whole or split, into `parameter`, of the same shape, whole or split."""
    parameter.copy_(split_like(value, parameter))


def split_state(state: dict[str, Any], optimizer: torch.optim.Optimizer) -> dict[str, Any]:
    """What `optimizer.state_dict()` returned, whole, split as the optimiser's parameters are now."""
    parameters = trainable_parameters(optimizer)

    def part(value: Any, parameter: torch.Tensor) -> Any:
        moment = isinstance(value, torch.Tensor) and value.shape == parameter.shape
        return split_like(value, parameter) if moment else value

    sharded = {
        key: {name: part(value, parameters[key]) for name, value in values.items()} for key, values in state["state"].items()
    }
    return {**state, "state": sharded}
