"""Describe and measure every adapter method on one transformer block of SDXL, and write the tables of docs/methods.md.

    python benchmarks/methods.py --write docs/methods.md

Each method adapts the eight attention projections of a block of full width with its default options for SDXL. Its training step
is compared with that of LoRA, in turns in one process, so that other load affects both alike.
"""

# ruff: noqa: T201 - a benchmark prints its results
from __future__ import annotations

import argparse
import dataclasses
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import torch
from adapter_step import PROJECTIONS, WIDTH, medians_in_turns, saved_bytes, timed
from diffusers.models.attention import BasicTransformerBlock
from tqdm.auto import tqdm

from nora_vision.factors import low_rank_factors
from pipelines import adapter_files
from pipelines.adapter_method import ADAPTER_NAME, Probe, trained_parameters, tuner_layers
from pipelines.adapter_options import AdapterOptions
from pipelines.gradients import base_losses
from pipelines.methods import REFERENCE, equation_of, method_named, method_names
from pipelines.native_files import COMPACT, FULL
from pipelines.tables import markdown_table, replace_parts

CONTEXT_WIDTH, CONTEXT_TOKENS, HEAD_WIDTH = 2048, 77, 64
DESCRIBED = ("name", "method", "equation", "parameters per layer", "options", "limits", "reference")
MEASURED = ("name", "parameters", "native file", "kept for backward", "step, relative to LoRA", "plain LoRA file")
# What a method does not do, by the attribute that is false then.
LIMITS = {
    "starts_at_base": "does not start at the base model",
    "adapts_convolutions": "linear layers only",
    "adapts_quantized_layers": "not on a quantised base model",
    "can_be_sharded": "not under FSDP",
    "exports_exactly": "exports are an approximation",
}


class Setting(NamedTuple):
    """The width of the block, the number of its input tokens, and how often a step is timed."""

    width: int
    tokens: int
    steps: int


class Measured(NamedTuple):
    """Results for one method.

    `saved` are the bytes kept for the backward pass beyond those of the block without an adapter, `rank` is the largest rank of
    the exported LoRA, `error` the norm of what it leaves out relative to that of the weight change, and `step` relative to LoRA.
    """

    parameters: int
    file: int
    saved: int
    rank: int
    error: float
    step: float


def described() -> str:
    """The table of what the methods say about themselves."""
    return markdown_table(DESCRIBED, map(_description, method_names()))


def _description(name: str) -> list[str]:
    method = method_named(name)
    options = ", ".join(f"`--{field.name}`" for field in dataclasses.fields(method.Options))
    limits = [text for attribute, text in LIMITS.items() if not getattr(method, attribute)]
    limits += ["needs a quantised base model"] if AdapterOptions(method=name).create().needs_quantization else []
    parameters = {f"`{method.parameters}`": method.parameters, f"`{method.shared_parameters}` shared": method.shared_parameters}
    counted = ", ".join(text for text, formula in parameters.items() if formula != "0")
    return [f"`{name}`", method.title, equation_of(name), counted, options, "; ".join(limits), method.reference]


class AdaptedBlock:
    """A transformer block of SDXL with an adapter, and its inputs; without a method the frozen block."""

    def __init__(self, setting: Setting, name: str | None, cache: Path) -> None:
        torch.manual_seed(0)
        heads = max(setting.width // HEAD_WIDTH, 1)
        self.block = BasicTransformerBlock(setting.width, heads, setting.width // heads, cross_attention_dim=CONTEXT_WIDTH)
        self.block.requires_grad_(False)
        # The block's input needs gradients, as inside a UNet with adapters in earlier blocks.
        self.x = torch.randn(1, setting.tokens, setting.width, requires_grad=True)
        self.context = torch.randn(1, CONTEXT_TOKENS, CONTEXT_WIDTH)
        if name is not None:
            method = AdapterOptions(method=name).create()
            method.add(self.block, PROJECTIONS, torch.Generator().manual_seed(0))
            losses = base_losses(self._losses, [self.block])
            method.start(self.block, Probe(self._run, losses, torch.Generator().manual_seed(1), cache), ADAPTER_NAME)

    def output(self) -> torch.Tensor:
        """(1, tokens, width)"""
        return self.block(self.x, encoder_hidden_states=self.context)

    def _run(self) -> None:
        with torch.no_grad():
            self.output()

    def _losses(self, count: int) -> Iterator[torch.Tensor]:
        for _ in range(count):
            yield self.output().square().mean()

    def step(self) -> float:
        """Seconds of one forward and backward pass."""
        seconds = timed(lambda: self.output().square().mean().backward())
        self.x.grad = None
        self.block.zero_grad()
        return seconds

    def saved(self) -> int:
        """Bytes that autograd keeps for the backward pass."""
        return saved_bytes(self.block, self.output)

    def disturb(self) -> None:
        """Change every trained parameter, in place of training."""
        generator = torch.Generator().manual_seed(2)
        with torch.no_grad():
            for parameter in trained_parameters({"block": self.block}):
                parameter.add_(0.02 * torch.randn(parameter.shape, generator=generator))

    def file_bytes(self, folder: Path) -> int:
        """Bytes of the smallest native file."""
        adapter_files.save({"block": self.block}, folder)
        smallest = folder / COMPACT if (folder / COMPACT).is_dir() else folder / FULL
        return sum(file.stat().st_size for file in smallest.rglob("*.safetensors"))

    def lora_file(self) -> tuple[int, float]:
        """The largest rank of the exported LoRA, and the relative norm of what it leaves out."""
        rank, left_out, total = 0, 0.0, 0.0
        for layer in tuner_layers(self.block).values():
            factors = low_rank_factors(layer, ADAPTER_NAME)
            norm = float((factors.up.double() @ factors.down.double()).norm()) ** 2
            rank, total = max(rank, len(factors.down)), total + norm / (1 - factors.relative_error**2)
            left_out += norm * factors.relative_error**2 / (1 - factors.relative_error**2)
        return rank, (left_out / total) ** 0.5


def measure(name: str, setting: Setting, reference: AdaptedBlock, frozen: AdaptedBlock, folder: Path) -> Measured:
    """Measure one method; its steps and those of `reference` take turns."""
    adapted = AdaptedBlock(setting, name, folder / f"{name}.safetensors")
    seconds = medians_in_turns({"reference": reference.step, "adapted": adapted.step}, setting.steps)
    parameters = sum(parameter.numel() for parameter in trained_parameters({"block": adapted.block}))
    saved = adapted.saved() - frozen.saved()
    adapted.disturb()
    file = adapted.file_bytes(folder / name)
    return Measured(parameters, file, saved, *adapted.lora_file(), seconds["adapted"] / seconds["reference"])


def measured(setting: Setting, names: list[str]) -> str:
    """The table of what was measured."""
    rows = []
    with tempfile.TemporaryDirectory() as folder:
        reference, frozen = (AdaptedBlock(setting, name, Path(folder) / "reference.safetensors") for name in (REFERENCE, None))
        for name in tqdm(names, desc="measuring", leave=False):
            rows.append([f"`{name}`", *_result(measure(name, setting, reference, frozen, Path(folder)))])
    return markdown_table(MEASURED, rows)


def _result(result: Measured) -> list[str]:
    sizes = f"{result.parameters:,}", f"{result.file / 2**10:,.0f} KiB", f"{result.saved / 2**20:.1f} MiB"
    lora = f"exact, rank {result.rank}" if result.error == 0 else f"rank {result.rank}, error {result.error:.0%}"
    return [*sizes, f"{result.step:.2f}", lora]


def write(document: Path, tables: dict[str, str]) -> None:
    """Replace the tables in `document`, each between its two comments.

    Raises: ValueError naming the comments that are missing.
    """
    replace_parts(document, tables, "benchmarks/methods.py")


def main() -> None:
    """Print both tables, or write them to a document."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    # The block is not quantised.
    measurable = [name for name in method_names() if not AdapterOptions(method=name).create().needs_quantization]
    parser.add_argument("--methods", nargs="*", default=measurable, help="methods to measure")
    parser.add_argument("--width", type=int, default=WIDTH)
    parser.add_argument("--tokens", type=int, default=1024, help="tokens of the block's input; 1024 are 32 x 32 latents")
    parser.add_argument("--steps", type=int, default=10)
    parser.add_argument("--write", type=Path, help="the document whose tables are replaced")
    options = parser.parse_args()
    tables = {
        "described": described(),
        "measured": measured(Setting(options.width, options.tokens, options.steps), options.methods),
    }
    if options.write:
        write(options.write, tables)
    print("\n".join(tables.values()))


if __name__ == "__main__":
    main()
