"""What FSDP asks of a run, and what is done to nothing that is not split; training itself is in test_launching.py."""

import os
from types import SimpleNamespace

import pytest
import torch
from accelerate.utils import DistributedType
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import Shard, distribute_tensor

from pipelines.errors import InputError
from training.engine.sharding import assign, check_can_shard, gathered, split_like, split_state, summon_full_params


def accelerator(kind=DistributedType.FSDP, version=2):
    return SimpleNamespace(distributed_type=kind, is_fsdp2=version == 2)


def test_fsdp_needs_version_2_and_adamw():
    check_can_shard(accelerator(), "AdamW", eight_bit=False)
    with pytest.raises(InputError, match="fsdp_version must be 2"):
        check_can_shard(accelerator(version=1), "AdamW", eight_bit=False)
    for name, eight_bit in (("Prodigy", False), ("AdamW", True)):
        with pytest.raises(InputError, match="only --optimizer AdamW without --use_8bit_adam"):
            check_can_shard(accelerator(), name, eight_bit)


def test_fsdp_needs_a_pytorch_that_can_end_an_iteration_early(monkeypatch):
    monkeypatch.delattr("torch.distributed.fsdp.FSDPModule.reset_iter_state")
    with pytest.raises(InputError, match="FSDP needs the PyTorch"):
        check_can_shard(accelerator(), "AdamW", eight_bit=False)


def test_without_fsdp_every_optimiser_may_train():
    check_can_shard(accelerator(DistributedType.MULTI_GPU), "Prodigy", eight_bit=False)


def in_two_processes(rank, group):
    torch.set_num_threads(1)
    torch.distributed.init_process_group("gloo", init_method=f"file://{group}", rank=rank, world_size=2)
    mesh = init_device_mesh("cpu", (2,))
    torch.manual_seed(0)
    values = [torch.randn(4, 2), torch.randn(3), torch.randn(1, 2)]
    plain = torch.optim.AdamW([torch.nn.Parameter(value.clone()) for value in values])
    for parameter in plain.param_groups[0]["params"]:
        parameter.grad = torch.randn_like(parameter)
    plain.step()
    parameters = [torch.nn.Parameter(distribute_tensor(torch.zeros_like(value), mesh, [Shard(0)])) for value in values]
    optimizer = torch.optim.AdamW(parameters)
    optimizer.load_state_dict(split_state(plain.state_dict(), optimizer))
    for parameter, value in zip(parameters, values, strict=True):
        assign(parameter, value)
        moment = optimizer.state[parameter]["exp_avg"]
        assert moment.to_local().shape == parameter.to_local().shape
    assert parameters[1].to_local().shape == (2 - rank,)
    torch.testing.assert_close(gathered({"nested": parameters})["nested"], values, rtol=0, atol=0)
    torch.testing.assert_close(gathered(optimizer.state_dict()), plain.state_dict(), rtol=0, atol=0)
    torch.distributed.barrier()
    # The usual end of an interpreter is now and then aborted by threads of gloo that nobody has waited for.
    os._exit(0)


def test_parameters_and_optimiser_state_are_sharded_and_gathered(tmp_path):
    # Forked, they need not import anything again.
    torch.multiprocessing.start_processes(in_two_processes, (str(tmp_path / "group"),), nprocs=2, start_method="fork")


def test_values_that_are_not_sharded_are_unchanged():
    module, value = torch.nn.Linear(2, 2), torch.randn(2, 2)
    assert split_like(value, module.weight) is value
    assert gathered(value) is value
    with summon_full_params(module):
        assert module.weight.shape == (2, 2)
