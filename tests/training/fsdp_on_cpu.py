"""The trainer under FSDP on the CPU, for `accelerate launch` with training/configs/fsdp.yaml.

accelerate's and PyTorch's FSDP run on CPUs as they are, but accelerate's state knows it only where there are accelerators: it
would take every configuration of several CPU processes for DDP. Two of its values are set here; all else is what runs on GPUs.
"""

import runpy
from pathlib import Path

from accelerate import Accelerator, PartialState
from accelerate.utils import DistributedType, FullyShardedDataParallelPlugin
from torch.distributed.fsdp import FSDPModule

TRAINER = Path(__file__).parents[2] / "training" / "dreambooth_nora.py"

if __name__ == "__main__":
    state = Accelerator().state
    assert state.distributed_type == DistributedType.MULTI_CPU
    # All states of a process share their values. What the configuration says comes through the environment.
    state.fsdp_plugin = FullyShardedDataParallelPlugin()
    state.distributed_type = PartialState().distributed_type = DistributedType.FSDP
    runpy.run_path(str(TRAINER), run_name="__main__")
    split = {kind.__name__ for kind in FSDPModule.__subclasses__()}
    assert split == {f"FSDP{name}" for name in ("DenoisingLoss", *state.fsdp_plugin.transformer_cls_names_to_wrap)}, split
