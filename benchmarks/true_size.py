"""Cost of the subject recipe at SDXL's true size: seconds, decompositions and peak memory by phase.

    python benchmarks/true_size.py

The model has SDXL's shapes (a UNet of 2.57 billion parameters, both text encoders, the autoencoder) and random weights. The
recipe runs on the CPU with tiny images, few steps, and few noise samples for the held-out loss, so that the time of a phase
depends on the size of the model. The certificate is left out, since it loads the base model from disk again.
"""

# ruff: noqa: T201 - a benchmark prints its results
from __future__ import annotations

import argparse
import os
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import partial, wraps
from typing import Any
from unittest import mock

import psutil
import torch
from diffusers import AutoencoderKL, EulerDiscreteScheduler, StableDiffusionXLPipeline, UNet2DConditionModel
from torch import nn
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection, CLIPTokenizer

import nora_vision
from nora_vision import decomposition, moment_groups
from pipelines.built_in import BUILT_IN_MODEL
from pipelines.subject import adapters
from pipelines.subject.generate import Sampling
from pipelines.subject.target_layers import ATTENTION
from training import dreambooth_nora
from training.options import parse_options
from training.subject import finishing, validation
from training.subject.samples import ValidationSampler

GB = 1e9
BETWEEN = "everything else"
SAMPLING_INTERVAL_S = 0.02
DRAWS = 4
VOCABULARY = 49408


@dataclass(frozen=True)
class Shapes:
    """The configurations of an SDXL model: its UNet, both text encoders, and the autoencoder."""

    unet: dict[str, Any]
    text_encoders: tuple[dict[str, int], dict[str, int]]
    autoencoder: dict[str, Any]


UNET = {
    "sample_size": 128,
    "block_out_channels": (320, 640, 1280),
    "layers_per_block": 2,
    "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
    "up_block_types": ("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
    "transformer_layers_per_block": (1, 2, 10),
    "attention_head_dim": (5, 10, 20),
    "cross_attention_dim": 2048,
    "use_linear_projection": True,
    "addition_embed_type": "text_time",
    "addition_time_embed_dim": 256,
    "projection_class_embeddings_input_dim": 2816,
}
TEXT_ENCODERS = (
    {"hidden_size": 768, "intermediate_size": 3072, "num_hidden_layers": 12, "num_attention_heads": 12, "projection_dim": 768},
    {"hidden_size": 1280, "intermediate_size": 5120, "num_hidden_layers": 32, "num_attention_heads": 20, "projection_dim": 1280},
)
AUTOENCODER = {
    "block_out_channels": (128, 256, 512, 512),
    "layers_per_block": 2,
    "latent_channels": 4,
    "sample_size": 1024,
    "scaling_factor": 0.13025,
    "down_block_types": ("DownEncoderBlock2D",) * 4,
    "up_block_types": ("UpDecoderBlock2D",) * 4,
}
TRUE_SIZE = Shapes(UNET, TEXT_ENCODERS, AUTOENCODER)
# The same kinds of blocks with fewer levels and layers, a hundredth as wide.
TINY_UNET = {
    "block_out_channels": (8, 16),
    "layers_per_block": 1,
    "norm_num_groups": 4,
    "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D"),
    "up_block_types": ("CrossAttnUpBlock2D", "UpBlock2D"),
    "transformer_layers_per_block": (1, 1),
    "attention_head_dim": (1, 2),
    "cross_attention_dim": 40,
    "addition_time_embed_dim": 8,
    "projection_class_embeddings_input_dim": 24 + 6 * 8,
}
TINY_TEXT_ENCODER = {"intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
TINY = Shapes(
    UNET | TINY_UNET,
    (
        TINY_TEXT_ENCODER | {"hidden_size": 16, "projection_dim": 16},
        TINY_TEXT_ENCODER | {"hidden_size": 24, "projection_dim": 24},
    ),
    AUTOENCODER | {"block_out_channels": (8, 8, 8, 8), "norm_num_groups": 4},
)


@dataclass
class Phase:
    """The total cost of one phase of the run, without the phases inside it.

    Args:
        calls: number of calls.
        seconds: total time.
        decompositions: number of singular value decompositions.
        peak_memory: peak memory of the process, in bytes.
    """

    calls: int = 0
    seconds: float = 0.0
    decompositions: int = 0
    peak_memory: int = 0


class Phases:
    """Attributes time, decompositions and memory to the innermost phase that is running."""

    def __init__(self) -> None:
        self.totals: dict[str, Phase] = {}
        self._running = [BETWEEN]
        self._since = time.perf_counter()
        self._process = psutil.Process()

    @property
    def current(self) -> Phase:
        """The innermost phase that is running."""
        return self.totals.setdefault(self._running[-1], Phase())

    @contextmanager
    def phase(self, name: str) -> Iterator[None]:
        """Attribute the block to the phase `name`."""
        self._switch()
        self._running.append(name)
        self.current.calls += 1
        try:
            yield
        finally:
            self._switch()
            self._running.pop()

    def timed(self, name: str, function: Callable[..., Any]) -> Callable[..., Any]:
        """`function`, with its calls attributed to the phase `name`."""

        @wraps(function)
        def run(*args: Any, **kwargs: Any) -> Any:
            """The result of `function`."""
            with self.phase(name):
                return function(*args, **kwargs)

        return run

    def counted(self, function: Callable[..., Any]) -> Callable[..., Any]:
        """`function`, with each call counted as one decomposition."""

        @wraps(function)
        def run(*args: Any, **kwargs: Any) -> Any:
            """The result of `function`."""
            self.current.decompositions += 1
            return function(*args, **kwargs)

        return run

    @contextmanager
    def watching_memory(self) -> Iterator[None]:
        """Sample the memory of this process during the block."""
        ended = threading.Event()

        def sample() -> None:
            """Record the memory at intervals."""
            while not ended.wait(SAMPLING_INTERVAL_S):
                self._note_memory()

        sampler = threading.Thread(target=sample, daemon=True)
        sampler.start()
        try:
            yield
        finally:
            ended.set()
            sampler.join()
            self._switch()

    def _switch(self) -> None:
        now = time.perf_counter()
        self.current.seconds += now - self._since
        self._since = now
        self._note_memory()

    def _note_memory(self) -> None:
        phase = self.current
        phase.peak_memory = max(phase.peak_memory, self._process.memory_info().rss)

    def table(self) -> str:
        """The phases as a Markdown table, in order of their first call."""
        rows = ["| phase | calls | seconds | decompositions | peak memory, GB |", "|---|---|---|---|---|"]
        named = {name: phase for name, phase in self.totals.items() if name != BETWEEN}
        total = Phase(
            calls=1,
            seconds=sum(phase.seconds for phase in self.totals.values()),
            decompositions=sum(phase.decompositions for phase in self.totals.values()),
            peak_memory=max(phase.peak_memory for phase in self.totals.values()),
        )
        between = self.totals.get(BETWEEN, Phase())
        for name, phase in {**named, BETWEEN: between, "all": total}.items():
            rows.append(
                f"| {name} | {phase.calls or ''} | {phase.seconds:.1f} | {phase.decompositions} | {phase.peak_memory / GB:.2f} |"
            )
        return "\n".join(rows)


@torch.no_grad()
def random_model(make: Callable[[], nn.Module], dtype: torch.dtype, device: torch.device | str) -> nn.Module:
    """The model that `make` returns, in `dtype` on `device`, with random weights that preserve the scale of activations."""
    with torch.device("meta"):
        model = make()
    model = model.to(dtype).to_empty(device=device).eval().requires_grad_(False)
    for parameter in model.parameters():
        if parameter.ndim > 1:
            parameter.normal_(std=parameter[0].numel() ** -0.5)
        else:
            parameter.zero_()
    for module in model.modules():
        if isinstance(module, nn.GroupNorm | nn.LayerNorm):
            module.weight.fill_(1.0)
    for name, buffer in model.named_buffers():
        if not name.endswith("position_ids"):
            raise ValueError(f"The only supported buffers are position_ids, got {name!r}.")
        buffer.copy_(torch.arange(buffer.shape[-1]).expand(buffer.shape))
    return model


def random_pipeline(
    dtype: torch.dtype, shapes: Shapes = TRUE_SIZE, device: torch.device | str = "cpu"
) -> StableDiffusionXLPipeline:
    """A pipeline of SDXL with `shapes`, random weights and the tokenizers of the built-in model."""
    torch.manual_seed(0)
    tokenizers = [CLIPTokenizer.from_pretrained(BUILT_IN_MODEL / name) for name in ("tokenizer", "tokenizer_2")]
    classes = (CLIPTextModel, CLIPTextModelWithProjection)
    encoders = [
        random_model(partial(kind, text_config(shape, tokenizer)), dtype, device)
        for kind, shape, tokenizer in zip(classes, shapes.text_encoders, tokenizers, strict=True)
    ]
    pipeline = StableDiffusionXLPipeline(
        vae=random_model(partial(AutoencoderKL, **shapes.autoencoder), dtype, device),
        text_encoder=encoders[0],
        text_encoder_2=encoders[1],
        tokenizer=tokenizers[0],
        tokenizer_2=tokenizers[1],
        unet=random_model(partial(UNet2DConditionModel, **shapes.unet), dtype, device),
        scheduler=EulerDiscreteScheduler.from_pretrained(BUILT_IN_MODEL / "scheduler"),
        add_watermarker=False,
    )
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def text_config(shape: dict[str, int], tokenizer: CLIPTokenizer) -> CLIPTextConfig:
    """The configuration of a text encoder of `shape` for the tokens of `tokenizer`."""
    marks = {f"{name}_token_id": getattr(tokenizer, f"{name}_token_id") for name in ("bos", "eos", "pad")}
    return CLIPTextConfig(vocab_size=VOCABULARY, max_position_embeddings=tokenizer.model_max_length, **shape, **marks)


def measured(pipeline: StableDiffusionXLPipeline, flags: Sequence[str]) -> Phases:
    """Run the subject recipe on `pipeline` with `flags` and return the costs of its phases."""
    phases = Phases()
    timed = {
        (dreambooth_nora.Preparation, "encode"): "encode images and prompts",
        (ValidationSampler, "generate"): "samples (one denoising step)",
        (moment_groups, "calibrate"): "calibrate",
        (nora_vision, "initialize_nora_weights"): "start the layers (AwSVD)",
        (dreambooth_nora, "run_dry_run"): "dry run (three steps)",
        (dreambooth_nora, "train"): "training steps",
        (validation, "measured_losses"): f"held-out loss ({DRAWS} draws)",
        (validation, "keep_adapter"): "saved adapter",
        (adapters, "save_everywhere"): "export",
        (finishing, "sample_candidates"): "compare saved adapters",
    }
    with ExitStack() as stack:
        for (owner, attribute), name in timed.items():
            stack.enter_context(mock.patch.object(owner, attribute, phases.timed(name, getattr(owner, attribute))))
        stack.enter_context(mock.patch.object(decomposition, "awsvd", phases.counted(decomposition.awsvd)))
        stack.enter_context(mock.patch.object(dreambooth_nora, "load_base_model", return_value=pipeline))
        stack.enter_context(mock.patch.object(dreambooth_nora, "Sampling", partial(Sampling, num_inference_steps=1)))
        stack.enter_context(mock.patch.object(validation, "mean_denoising_loss", few_draws(validation.mean_denoising_loss)))
        stack.enter_context(phases.watching_memory())
        dreambooth_nora.main(parse_options(list(flags)))
    return phases


def few_draws(measure: Callable[..., float]) -> Callable[..., float]:
    """`measure`, a mean over samples of noise, with at most `DRAWS` samples."""

    def run(loss: nn.Module, images: Any, draws: int = DRAWS, **more: Any) -> float:
        """The mean."""
        return measure(loss, images, min(draws, DRAWS), **more)

    return run


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--dtype", choices=["bf16", "no"], default="bf16", help="precision, as --mixed_precision of the recipe")
    parser.add_argument("--rank", type=int, default=64)
    parser.add_argument("--inner_r", type=int, default=16)
    parser.add_argument("--resolution", type=int, default=32)
    parser.add_argument("--train_batch_size", type=int, default=1)
    parser.add_argument("--steps", type=int, default=2, help="training steps; the adapter is saved after the last")
    parser.add_argument("--tiny", action="store_true", help="a hundredth of the width, to test this program")
    options = parser.parse_args()
    os.environ["ACCELERATE_USE_CPU"] = "true"
    began = time.perf_counter()
    pipeline = random_pipeline(dreambooth_nora.WEIGHT_DTYPES[options.dtype], TINY if options.tiny else TRUE_SIZE)
    print(f"Created the model in {time.perf_counter() - began:.0f} s.", flush=True)
    with tempfile.TemporaryDirectory() as folder:
        flags = {
            "pretrained_model_name_or_path": "random/true-size-sdxl",
            "mixed_precision": options.dtype,
            "rank": options.rank,
            "inner_r": options.inner_r,
            "resolution": options.resolution,
            "train_batch_size": options.train_batch_size,
            "max_train_steps": options.steps,
            "instance_prompt": "a photo of sks toy",
            "validation_prompt": "a photo of sks toy",
            "heldout_image": "04.jpg",
            "heldout_steps": options.steps,
            "validation_steps": options.steps,
            "num_candidate_images": 2,
            "image_scorer": "mini",
            "report_to": "none",
            "output_dir": f"{folder}/run",
        }
        given = [part for name, value in flags.items() for part in (f"--{name}", str(value))]
        phases = measured(pipeline, [*given, "--no_certify", "--target_modules", *ATTENTION])
    print(f"\nSDXL's shapes, {options.dtype}, {options.resolution} pixels, batches of {options.train_batch_size}:\n")
    print(phases.table())


if __name__ == "__main__":
    main()
