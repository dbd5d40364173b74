"""FSDP: parameters that are sharded over all processes, and access to full parameters on one process.

accelerate shards a module once and in place. All functions also accept modules that are not sharded.
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
from pipelines.optimizers import ADAMW, trainable_parameters


def check_can_shard(accelerator: Accelerator, optimizer: str, eight_bit: bool, methods: Sequence[AdapterMethod] = ()) -> None:
    """Check that the training supports FSDP, if `accelerator` uses it.

    Args:
        optimizer: its name, one of `OPTIMIZERS`.
        eight_bit: whether its moments have 8 bits.
        methods: of the adapters.
    Raises: InputError for version 1 of FSDP, a PyTorch that is too old, and optimisers or methods that need full parameters.
    """
    if accelerator.distributed_type != DistributedType.FSDP:
        return
    if not accelerator.is_fsdp2:
        raise InputError("fsdp_version must be 2, as in training/configs/fsdp.yaml: version 1 cannot train adapters alone.")
    if not hasattr(FSDPModule, "reset_iter_state"):
        raise InputError(f"FSDP needs the PyTorch of requirements.txt or a newer one, got {torch.__version__}. Update PyTorch.")
    if optimizer != ADAMW or eight_bit:
        raise InputError(
            "FSDP shards parameters, which only --optimizer AdamW without --use_8bit_adam can train. Use AdamW without "
            "--use_8bit_adam, or training/configs/multi_gpu.yaml."
        )
    for method in methods:
        if not method.can_be_sharded:
            raise InputError(
                f"FSDP shards parameters, but {method.title} needs full ones. Use training/configs/multi_gpu.yaml, or another "
                "method."
            )


def prepare(
    accelerator: Accelerator, module: nn.Module, optimizer: torch.optim.Optimizer
) -> tuple[nn.Module, torch.optim.Optimizer]:
    """`accelerator.prepare` for a module that may be sharded already. If it is not, `optimizer` must not have a state yet."""
    if isinstance(module, FSDPModule):
        # accelerate identifies parameters by their addresses, and empty shards of small parameters have none.
        return module, accelerator.prepare_optimizer(optimizer)
    if accelerator.distributed_type == DistributedType.FSDP:
        _send_from_first(module)
        # As without FSDP, the loop's autocast chooses the precision of each operation, and the loss is in float32.
        accelerator.state.fsdp_plugin.mixed_precision_policy = MixedPrecisionPolicy()
    return accelerator.prepare(module, optimizer)


@torch.no_grad()
def _send_from_first(module: nn.Module) -> None:
    """Broadcast the tensors of the first process to all others, as DDP does."""
    for tensor in (*module.parameters(), *module.buffers()):
        tensor.copy_(broadcast(tensor.contiguous()))


@contextmanager
def summon_full_params(module: nn.Module) -> Iterator[None]:
    """A context in which each process has all parameters of `module` as plain tensors; all processes must enter it together.

    Within it, one process can run, save and change the module alone. Changes of its parameters are lost afterwards.
    """
    parts = [part for part in module.modules() if isinstance(part, FSDPModule)]
    if not parts:
        yield
        return
    # Without this, the part that is called first becomes FSDP's root module, which may be the UNet.
    module._get_fsdp_state()._lazy_init()
    for part in parts:
        part.unshard()
    module.set_reshard_after_forward(False)
    try:
        with _without_state_dict_hooks(parts):
            yield
    finally:
        module.set_reshard_after_forward(AcceleratorState().fsdp_plugin.reshard_after_forward)
        for part in parts:
            part.reshard()
        # Otherwise a process that ran the module alone would wait for parameters that the others do not send.
        module.reset_iter_state()


@contextmanager
def _without_state_dict_hooks(parts: Sequence[FSDPModule]) -> Iterator[None]:
    """A context without FSDP's hooks, which shard parameters again when a state dict is read or loaded."""
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
    """FSDP's hook after a state dict was loaded."""
    parameter.reset_sharded_param()


def gathered(value: Any) -> Any:
    """`value` with the full tensors of all sharded ones in nested dictionaries and lists; all processes must call it together."""
    if isinstance(value, DTensor):
        return value.full_tensor()
    if isinstance(value, dict):
        return {name: gathered(part) for name, part in value.items()}
    return [gathered(part) for part in value] if isinstance(value, list) else value


def split_like(value: torch.Tensor, like: torch.Tensor) -> torch.Tensor:
    """This process's shard of the full tensor `value` if `like`, of the same shape, is sharded; else `value`."""
    if not isinstance(like, DTensor) or isinstance(value, DTensor):
        return value
    return distribute_tensor(value.to(like.device), like.device_mesh, like.placements, src_data_rank=None)


@torch.no_grad()
def assign(parameter: torch.Tensor, value: torch.Tensor) -> None:
    """Copy `value` into `parameter`, of the same shape; either may be sharded."""
    parameter.copy_(split_like(value, parameter))


def split_state(state: dict[str, Any], optimizer: torch.optim.Optimizer) -> dict[str, Any]:
    """A full `optimizer.state_dict()`, sharded like the optimiser's parameters."""
    parameters = trainable_parameters(optimizer)

    def part(value: Any, parameter: torch.Tensor) -> Any:
        moment = isinstance(value, torch.Tensor) and value.shape == parameter.shape
        return split_like(value, parameter) if moment else value

    sharded = {
        key: {name: part(value, parameters[key]) for name, value in values.items()} for key, values in state["state"].items()
    }
    return {**state, "state": sharded}
