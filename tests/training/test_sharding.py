"""What FSDP asks of a run, and what is done to nothing that is not split; training itself is in test_launching.py."""

from types import SimpleNamespace

import pytest
import torch
from accelerate.utils import DistributedType
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor, Shard, distribute_tensor

from pipelines.errors import InputError
from training.sharding import assign, check_can_shard, gathered, split_like, split_state, whole


def accelerator(kind=DistributedType.FSDP, version=2):
    return SimpleNamespace(distributed_type=kind, is_fsdp2=version == 2)


def test_fsdp_trains_with_adamw_in_its_second_version():
    check_can_shard(accelerator(), "AdamW", eight_bit=False)
    with pytest.raises(InputError, match="fsdp_version must be 2"):
        check_can_shard(accelerator(version=1), "AdamW", eight_bit=False)
    for name, eight_bit in (("Prodigy", False), ("AdamW", True)):
        with pytest.raises(InputError, match="only --optimizer AdamW without --use_8bit_adam"):
            check_can_shard(accelerator(), name, eight_bit)


def test_without_fsdp_every_optimiser_may_train():
    check_can_shard(accelerator(DistributedType.MULTI_GPU), "Prodigy", eight_bit=False)


@pytest.fixture
def mesh(tmp_path):
    """A group of this process alone."""
    torch.distributed.init_process_group("gloo", init_method=f"file://{tmp_path}/group", rank=0, world_size=1)
    yield init_device_mesh("cpu", (1,))
    torch.distributed.destroy_process_group()


def test_a_state_is_split_as_its_parameters_are_and_gathered_again(mesh):
    values = [torch.randn(4, 2), torch.randn(3)]
    parameters = [torch.nn.Parameter(distribute_tensor(value, mesh, [Shard(0)])) for value in values]
    plain = torch.optim.AdamW([torch.nn.Parameter(value.clone()) for value in values])
    for parameter in plain.param_groups[0]["params"]:
        parameter.grad = torch.randn_like(parameter)
    plain.step()
    optimizer = torch.optim.AdamW(parameters)
    optimizer.load_state_dict(split_state(plain.state_dict(), optimizer))
    assert all(isinstance(optimizer.state[p]["exp_avg"], DTensor) for p in parameters)
    torch.testing.assert_close(gathered(optimizer.state_dict()), plain.state_dict(), rtol=0, atol=0)


def test_a_parameter_takes_what_is_whole(mesh):
    parameter = torch.nn.Parameter(distribute_tensor(torch.zeros(4, 2), mesh, [Shard(0)]))
    value = torch.randn(4, 2)
    assign(parameter, value)
    assert torch.equal(gathered({"nested": [parameter]})["nested"][0], value)


def test_what_is_not_split_stays_as_it_is():
    module, value = torch.nn.Linear(2, 2), torch.randn(2, 2)
    assert split_like(value, module.weight) is value
    assert gathered(value) is value
    with whole(module):
        assert module.weight.shape == (2, 2)
