"""DyLoRA: h = W x + alpha / b B_b A_b x,  A_b and B_b the first b rows and columns, b random in a step  [Valipour et al. 2022].

Every prefix of rows and columns is trained to be an adapter, so that any smaller rank can be cut from one training:

    python -m pipelines.methods.dylora runs/RUN --rank 2 --output_dir smaller
"""

from __future__ import annotations

import argparse
import copy
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pipelines.adapter_method import ADAPTER_NAME, LowRankOptions, MethodTraining, TaskDefaults, tuner_layers
from pipelines.errors import InputError
from pipelines.lazy_modules import nn, torch
from pipelines.methods.lora import Lora, lora_config
from pipelines.native_files import CONFIG, FULL, METHOD_KEY, read_native, write_native
from pipelines.run_options import Task

if TYPE_CHECKING:
    from peft import PeftConfig


@dataclass
class DyLoraOptions(LowRankOptions):
    """Options of DyLoRA."""


class DyLora(Lora):
    """LoRA whose rank is sampled uniformly from 1 to r in each step.

    All rows and columns up to b are updated. The paper's variant that updates only the b-th is not implemented.
    """

    name = "dylora"
    title = "DyLoRA"
    reference = "Valipour et al. 2022, DyLoRA: Parameter-Efficient Tuning using Dynamic Search-Free Low-Rank Adaptation"
    Options = DyLoraOptions
    # FSDP would split rows and columns.
    can_be_sharded = False

    @classmethod
    def defaults(cls, task: Task, built_in: bool) -> TaskDefaults:
        """LoRA's learning rates, and twice its rank, from which smaller ranks can be cut."""
        return TaskDefaults(1e-4, {"rank": 8}) if task == "subject" else TaskDefaults(2e-4, {"rank": 4})

    def config(self, target_modules: list[str], exclude_modules: str | None = None) -> PeftConfig:
        """PEFT's configuration of plain LoRA; the scaling at full rank is 1 unless alpha is given."""
        return lora_config(self.options, target_modules, exclude_modules)

    def learning_rate_factor(self, parameter_name: str) -> float:
        """1 for both."""
        return 1.0

    def training(self, models: Sequence[nn.Module], total_steps: int) -> DyLoraTraining:
        """The sampling of ranks."""
        return DyLoraTraining(models, total_steps)


class DyLoraTraining(MethodTraining):
    """Trains a random prefix of the rows of A and the columns of B in each step, the same one in all layers."""

    def __init__(self, models: Sequence[nn.Module], total_steps: int) -> None:
        super().__init__(models, total_steps)
        layers = [layer for model in models for layer in tuner_layers(model).values()]
        self.projections = [(layer.lora_A[ADAPTER_NAME], layer.r[ADAPTER_NAME]) for layer in layers]
        self.handles: list[Any] = []

    def before_step(self, step: int, generator: torch.Generator) -> None:
        """Sample b, and set the other entries of A x to zero until the backward passes are over."""
        self.after_backward(step)
        largest = max(rank for _, rank in self.projections)
        prefix = int(torch.randint(1, largest + 1, (), generator=generator))
        for projection, rank in self.projections:
            hook = partial(prefix_of_output, min(prefix, rank), rank)
            self.handles.append(projection.register_forward_hook(hook))

    def after_backward(self, step: int) -> None:
        """Return to full rank."""
        while self.handles:
            self.handles.pop().remove()


def prefix_of_output(prefix: int, rank: int, module: nn.Module, args: tuple[Any, ...], hidden: torch.Tensor) -> torch.Tensor:
    """r / b times the first b = `prefix` of the r entries of A x, (..., r) or (batch, r, height, width); 0 for the others.

    The factor turns the layer's scaling alpha / r into alpha / b.
    """
    mask = torch.zeros(rank, device=hidden.device, dtype=hidden.dtype)
    mask[:prefix] = rank / prefix
    return hidden * (mask[:, None, None] if isinstance(module, nn.Conv2d) else mask)


def cut(config: PeftConfig, tensors: Mapping[str, torch.Tensor], rank: int) -> tuple[PeftConfig, dict[str, torch.Tensor]]:
    """The adapter of the first `rank` rows of A (r, ...) and columns of B (m, r, ...), with the same alpha.

    Raises: InputError if `rank` is not in [1, r].
    """
    if not 1 <= rank <= config.r:
        raise InputError(f"rank must be in [1, r={config.r}], the rank of the adapter, got {rank}.")
    smaller = copy.deepcopy(config)
    smaller.r = rank
    values = {
        name: value[:rank].clone() if ".lora_A." in name else value[:, :rank].clone().contiguous()
        for name, value in tensors.items()
    }
    return smaller, values


def cut_files(folder: Path, rank: int, output: Path) -> list[Path]:
    """Cut every component of the native adapter in `folder`, a layout's folder; returns the new folders.

    Raises: InputError if it is not an adapter of this method, or `output` already has an adapter; AdapterFileError if a file is
        damaged.
    """
    parts = sorted(path.parent for path in folder.glob(f"*/{CONFIG}"))
    if not parts:
        raise InputError(f"There is no native adapter in {str(folder)!r}. Give a run directory or the folder of a layout.")
    if (output / "adapter").exists():
        raise InputError(f"--output_dir {str(output)!r} already has an adapter, which would be overwritten. Name another folder.")
    written = []
    for part in parts:
        config, tensors, metadata = read_native(part)
        if metadata.get(METHOD_KEY) != DyLora.name:
            raise InputError(f"{str(part)!r} is no adapter of DyLoRA: other methods do not train all smaller ranks.")
        target = output / "adapter" / FULL / part.name
        write_native(target, *cut(config, tensors, rank), {METHOD_KEY: DyLora.name})
        written.append(target)
    return written


def main(arguments: Sequence[str] | None = None) -> None:
    """Cut a smaller rank from a trained adapter."""
    parser = argparse.ArgumentParser(prog="python -m pipelines.methods.dylora", description=main.__doc__)
    parser.add_argument("path", type=Path, help="a run directory, or the folder of a native adapter's full layout")
    parser.add_argument("--rank", type=int, required=True, help="rank of the smaller adapter")
    parser.add_argument("--output_dir", type=Path, required=True, help="folder for the smaller adapter")
    options = parser.parse_args(arguments)
    full = options.path / "adapter" / FULL
    cut_files(full if full.is_dir() else options.path, options.rank, options.output_dir)


METHOD = DyLora

if __name__ == "__main__":
    main()
