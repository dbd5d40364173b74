"""The smallest thing to train: a linear model with dropout, whose steps take a millisecond."""

import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from diffusers.training_utils import EMAModel
from torch import nn

from training.engine.loop import LoopOptions, Trainable, train
from training.runs.record import list_checkpoints
from training.runs.run import RunDirectory
from training.runs.run_requests import ask

STEPS = 6


class Regression(nn.Module):
    """A linear model with dropout, and its mean squared error."""

    def __init__(self, dropout=0.3):
        super().__init__()
        self.linear = nn.Linear(3, 2)
        self.dropout = nn.Dropout(dropout)

    def forward(self, inputs, targets):
        return (self.linear(self.dropout(inputs)) - targets).square().mean()


def batch_at(index, size=4):
    generator = torch.Generator().manual_seed(index)
    return {"inputs": torch.randn(size, 3, generator=generator), "targets": torch.randn(size, 2, generator=generator)}


def trainable(batches=batch_at, dropout=0.3, with_ema=True):
    torch.manual_seed(0)
    module = Regression(dropout)
    optimizer = torch.optim.AdamW(module.parameters(), lr=0.05)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1 - step / 20)
    return Trainable(module, batches, optimizer, schedule, EMAModel(module.parameters(), decay=0.5) if with_ema else None)


def trained(folder, what, steps=STEPS, periodic=(), **changes):
    """Train `what` in the run at `folder`; returns its weights."""
    run = RunDirectory.create(folder, {})
    options = LoopOptions(**{"max_train_steps": steps, "checkpointing_steps": 2, **changes})
    # The precision of a run before, in the same process, would be that of this one.
    AcceleratorState._reset_state(reset_partial_state=True)
    train(Accelerator(cpu=True), run, what, options, periodic)
    return torch.cat([parameter.detach().flatten().clone() for parameter in what.module.parameters()])


def asking(record, what, at):
    """Batches during whose making it is asked for `what`, at each of the steps `at`."""

    def batches(index):
        if index + 1 in at:
            ask(record, what)
        return batch_at(index)

    return batches


def checkpoints(folder):
    """The steps of the checkpoints of the run at `folder`."""
    return [int(path.name.removeprefix("step-")) for path in list_checkpoints(folder / "checkpoints")]
