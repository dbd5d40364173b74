"""C3A: h = W x + C x / n,  C of circulant blocks, each given by one trained vector, by PEFT  [Chen et al. 2025]."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from pipelines.adapter_method import TaskDefaults
from pipelines.block_size import BlockSizeOptions, block_misfit
from pipelines.peft_method import PeftMethod
from pipelines.run_options import Task


@dataclass
class C3aOptions(BlockSizeOptions):
    """Options of C3A."""


class C3a(PeftMethod):
    """C3A, computed by fast Fourier transforms."""

    name = "c3a"
    title = "C3A"
    reference = "Chen et al. 2025, Parameter-Efficient Fine-Tuning via Circular Convolution"
    parameters = "m * n // block_size"
    Options = C3aOptions
    config_class = "C3AConfig"
    adapts_quantized_layers = True
    samples_start = False
    # PEFT's default starts with random blocks.
    settings: ClassVar = {"init_weights": True}
    adapts_convolutions = False

    @classmethod
    def defaults(cls, task: Task, built_in: bool) -> TaskDefaults:
        """The largest common divisor of the widths: of SDXL and its text encoders 64, of CLIP 128."""
        if built_in:
            return TaskDefaults(1e-1, {"block_size": 16})
        return TaskDefaults(1e-1, {"block_size": 64 if task == "subject" else 128})

    def misfit_of_size(self, m: int, n: int) -> str | None:
        """Blocks tile the whole weight."""
        return block_misfit(self.options.block_size, in_features=n, out_features=m)


METHOD = C3a
