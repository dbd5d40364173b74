"""OFT: h = W R x,  R = diag(R_1 ... R_k),  R_i = (I - Q_i) (I + Q_i)^-1,  Q_i = -Q_i^T, by PEFT  [Qiu et al. 2023]."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from pipelines.adapter_method import TaskDefaults, option
from pipelines.block_size import BlockSizeOptions, block_misfit
from pipelines.peft_method import PeftMethod
from pipelines.run_options import Task


@dataclass
class OftOptions(BlockSizeOptions):
    """Options of OFT."""

    use_cayley_neumann: bool = option(
        False, "approximate the inverse by five terms of its Neumann series, which is faster", "Cayley-Neumann"
    )
    block_share: bool = option(False, "one block for the whole layer, repeated", "Block share")


class Oft(PeftMethod):
    """OFT, which rotates the inputs of a layer in blocks.

    Not on convolutions: PEFT's layer sums overlapping patches there, so that it does not start at the base model.
    """

    name = "oft"
    title = "OFT"
    reference = "Qiu et al. 2023, Controlling Text-to-Image Diffusion by Orthogonal Finetuning"
    parameters = "(1 if block_share else n // block_size) * block_size * (block_size - 1) // 2"
    Options = OftOptions
    config_class = "OFTConfig"
    adapts_quantized_layers = True
    samples_start = False
    fields: ClassVar = {"block_size": "oft_block_size"}
    adapts_convolutions = False

    @classmethod
    def defaults(cls, task: Task, built_in: bool) -> TaskDefaults:
        """PEFT's block size, which divides all widths of SDXL and CLIP; the built-in models are narrower."""
        return TaskDefaults(1e-4 if task == "subject" else 1e-3, {"block_size": 16 if built_in else 32})

    def misfit_of_size(self, m: int, n: int) -> str | None:
        """PEFT would choose another block size silently."""
        return block_misfit(self.options.block_size, in_features=n)


METHOD = Oft
