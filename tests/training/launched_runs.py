"""Several runs of the trainers, one after the other, in each of several processes on the CPU.

accelerate's and PyTorch's FSDP run on CPUs as they are, but accelerate's state allows it only with an accelerator: it takes every
configuration of several CPU processes for DDP. Two of its values are set here; all else is what runs on GPUs.
"""

import os
from functools import partial

from accelerate import Accelerator, PartialState
from accelerate.utils import DistributedType, FullyShardedDataParallelPlugin
from torch.distributed.fsdp import FSDPModule

from pipelines.subject.generate import Sampling
from training import dreambooth_nora, fewshot_nora
from training.options import parse_options
from training.options.fewshot import parse_fewshot_options

RECIPES = {"subject": (dreambooth_nora.main, parse_options), "fewshot": (fewshot_nora.main, parse_fewshot_options)}


def main(runs: list[list[str]]) -> None:
    """Run each of `runs`: a task and its flags."""
    state = Accelerator().state
    assert state.distributed_type == DistributedType.MULTI_CPU
    splits = os.environ.get("ACCELERATE_USE_FSDP") == "true"
    if splits:
        # All states of a process share their values. What the configuration says comes through the environment.
        state.fsdp_plugin = FullyShardedDataParallelPlugin()
        state.distributed_type = PartialState().distributed_type = DistributedType.FSDP
    # Random models draw no better in 25 steps.
    dreambooth_nora.Sampling = partial(Sampling, num_inference_steps=2)
    for task, *flags in runs:
        recipe, parse = RECIPES[task]
        recipe(parse(flags))
    split = {kind.__name__ for kind in FSDPModule.__subclasses__()}
    expected = ("DenoisingLoss", *state.fsdp_plugin.transformer_cls_names_to_wrap) if splits else ()
    assert split == {f"FSDP{name}" for name in expected}, split
