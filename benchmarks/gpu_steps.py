"""The measurements of gpu.py: a function for each step, which yields rows of the table.

    python benchmarks/gpu_steps.py --steps bf16

Everything has random weights and the true sizes of SDXL and of CLIP ViT-B/16. Training steps are those of the recipes' loop, with
batches of one image for SDXL. NoRA and LoRA, with the recipe's ranks, take turns on one set of frozen weights.
"""

from __future__ import annotations

import argparse
import copy
import gc
import itertools
import tempfile
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import clip_step
import torch
import trainer_speed
from accelerate import Accelerator, PartialState
from adapter_step import medians_in_turns, timed
from diffusers import StableDiffusionXLPipeline
from diffusers.optimization import get_scheduler
from gpu import parsed, row
from torch import nn
from true_size import TINY, TRUE_SIZE, random_pipeline

from nora_vision import calibrate, initialize_nora_weights
from pipelines.adapter_options import AdapterOptions
from pipelines.clip import load_clip
from pipelines.corpus import join, rendered_corpus
from pipelines.errors import InputError
from pipelines.mini_sdxl import RESOLUTION
from pipelines.optimizers import OptimizerSettings, Rates, parameter_groups
from pipelines.quantization import compute_dtype
from pipelines.subject import adapters
from pipelines.subject.base_model import PromptEmbeddings, quantize_components
from pipelines.subject.batches import SubjectBatches
from pipelines.subject.calibration import runs_on_subject
from pipelines.subject.encoding import CachedLatents
from pipelines.subject.generate import Sampling, generate
from pipelines.subject.loss import DenoisingLoss
from training.engine.loop import LoopOptions, Trainable, prepared
from training.options.pretraining import PretrainOptions
from training.pretraining.clip import ClipBatches, clip_data, decayed_groups, new_loss
from training.pretraining.stages import load_corpus
from training.runs.run import RunDirectory

METHODS = {"NoRA": "nora", "LoRA": "lora"}
RESOLUTIONS, TINY_RESOLUTIONS = (512, 768, 1024), (32,)
SUBJECT_IMAGES = 4
# More steps than are ever taken.
UNLIMITED = 10**6
PRETRAINING_BATCHES, TINY_BATCHES = (48, 512), (4,)
DIFFUSERS_STEPS = 25


def resolutions(options: argparse.Namespace) -> tuple[int, ...]:
    """The sides of SDXL's images in pixels."""
    return TINY_RESOLUTIONS if options.tiny else RESOLUTIONS


def device() -> torch.device:
    """The device that accelerate chooses."""
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def base_model(options: argparse.Namespace, dtype: torch.dtype = torch.bfloat16) -> StableDiffusionXLPipeline:
    """SDXL with random weights on the device."""
    return random_pipeline(dtype, TINY if options.tiny else TRUE_SIZE, device())


def adapter_options(options: argparse.Namespace, method: str = METHODS["NoRA"]) -> AdapterOptions:
    """The recipe's options of a method; for a tiny model, small ranks on a quarter of the layers."""
    return AdapterOptions(method=method, **({"rank": 4, "inner_r": 2, "target_modules": ["to_q"]} if options.tiny else {}))


def cost(run: Callable[[], Any]) -> tuple[float, int | None]:
    """Seconds of `run()` and, on a GPU, the peak of allocated memory in bytes."""
    if device().type != "cuda":
        return timed(run), None
    torch.cuda.reset_peak_memory_stats()
    return timed(run), torch.cuda.max_memory_allocated()


def allocated() -> int:
    """Bytes that tensors take on the GPU; 0 without one."""
    return torch.cuda.memory_allocated() if device().type == "cuda" else 0


def attempted(step: str, what: str, measure: Callable[[], list[str]]) -> list[str]:
    """The rows of `measure()`, or one with the reason why it failed, such as too little memory."""
    try:
        return measure()
    except (RuntimeError, ValueError) as error:
        reason = f"{type(error).__name__}: {error}"
    gc.collect()
    torch.cuda.empty_cache()
    return [row(step, what, note=reason)]


def random_subject(pipeline: StableDiffusionXLPipeline, resolution: int) -> CachedLatents:
    """The latents of images of `resolution` pixels, and one prompt, all random."""
    side = resolution // pipeline.vae_scale_factor
    moments = torch.randn(2, pipeline.unet.config.in_channels, side, side)
    time_ids = torch.tensor([resolution, resolution, 0, 0, resolution, resolution], dtype=torch.float32)
    width, pooled = pipeline.unet.config.cross_attention_dim, pipeline.text_encoder_2.config.projection_dim
    length = pipeline.tokenizer.model_max_length
    prompts = PromptEmbeddings(torch.randn(1, length, width), torch.randn(1, pooled))
    sizes, tokens = ((resolution, resolution),) * SUBJECT_IMAGES, torch.zeros(1, 2, length, dtype=torch.int64)
    return CachedLatents(sizes, 1, lambda *_: (moments, time_ids), torch.zeros(len(sizes), dtype=torch.int64), tokens, prompts)


@contextmanager
def stepping(
    module: nn.Module, batch_at: Callable[[int], dict[str, Any]], optimizer: torch.optim.Optimizer, precision: str
) -> Iterator[Callable[[], float]]:
    """A context with a function that takes the next step of the training loop and returns its seconds."""
    trainable = Trainable(module, batch_at, optimizer, get_scheduler("constant", optimizer))
    accelerator, indices = Accelerator(mixed_precision=precision), itertools.count()
    with prepared(accelerator, RunDirectory(Path()), trainable, LoopOptions(UNLIMITED)) as stepper:
        batches = stepper.batches(range(UNLIMITED))
        yield lambda: timed(lambda: stepper.step(next(indices), batches))


class AdapterTraining:
    """The training of one method on a UNet that shares its frozen weights with others.

    Args:
        context: the training ends with it.
        base: with the frozen weights.
        subject: to train on; it may be replaced.
        quantized: whether AdamW is paged, as the recipe's is for a quantised model.
        backend: compile the transformer blocks of the UNet with it, without graph breaks; None does not compile.
    Attributes:
        step: takes a training step on `subject` and returns its seconds.
        first_step: seconds of the first step, which compiles.
        nbytes: bytes on the GPU of all that is not shared.
    """

    def __init__(
        self,
        context: ExitStack,
        base: StableDiffusionXLPipeline,
        adapter: AdapterOptions,
        subject: CachedLatents,
        precision: str,
        quantized: bool,
        backend: str | None,
    ) -> None:
        before = allocated()
        shared = {id(tensor): tensor for tensor in (*base.unet.parameters(), *base.unet.buffers())}
        pipeline = StableDiffusionXLPipeline(**base.components | {"unet": copy.deepcopy(base.unet, shared)})
        adapters.prepare_dry_run(adapter, adapters.attach(pipeline, adapter))
        if backend is not None:
            pipeline.unet.compile_repeated_blocks(backend=backend, fullgraph=True)
        self.loss, self.subject = DenoisingLoss(pipeline), subject
        optimizer = OptimizerSettings(paged=quantized).optimizer(parameter_groups(self.loss, Rates(1e-4)))
        self.step = context.enter_context(stepping(self.loss, self._batch_at, optimizer, precision))
        self.first_step = self.step()
        self.nbytes = allocated() - before

    def _batch_at(self, index: int) -> dict[str, Any]:
        return SubjectBatches(self.subject, False, 1, self.loss.num_timesteps, 0)(index)


def training_steps(
    options: argparse.Namespace, step: str, precision: str, quantize: str | None = None, compiled: bool = False
) -> Iterator[str]:
    """A training step of SDXL with NoRA and with LoRA, at every resolution; compiled, at the largest alone."""
    pipeline = base_model(options, torch.float16 if precision == "fp16" else torch.bfloat16)
    if quantize is not None:
        quantize_components(pipeline, quantize, compute_dtype(torch.bfloat16, device()))
    sides = resolutions(options)[-1:] if compiled else resolutions(options)
    subjects = [random_subject(pipeline, side) for side in sides]
    backend = ("eager" if options.tiny else "inductor") if compiled else None
    with ExitStack() as context:
        trainings = {
            name: AdapterTraining(
                context, pipeline, adapter_options(options, method), subjects[0], precision, quantize is not None, backend
            )
            for name, method in METHODS.items()
        }
        for subject in subjects:
            what = f"{subject.sizes[0][0]} px"
            yield from attempted(step, what, partial(compared, step, trainings, subject, options.repeats))


def compared(step: str, trainings: dict[str, AdapterTraining], subject: CachedLatents, repeats: int) -> list[str]:
    """The rows of a training step on `subject`: medians of all methods in turns, each with the peak of its memory alone."""
    peaks = {}
    for name, training in trainings.items():
        training.subject = subject
        training.step()
        peak = cost(training.step)[1]
        others = sum(other.nbytes for other in trainings.values() if other is not training)
        peaks[name] = None if peak is None else peak - others
    seconds = medians_in_turns({name: training.step for name, training in trainings.items()}, repeats)
    ratio = f"{seconds['NoRA'] / seconds['LoRA']:.3f} of LoRA's time; "
    return [
        row(
            step,
            f"training step with {name}, {subject.sizes[0][0]} px",
            seconds[name],
            peaks[name],
            f"{ratio if name == 'NoRA' else ''}the very first step took {training.first_step:.1f} s",
        )
        for name, training in trainings.items()
    ]


def start(options: argparse.Namespace) -> Iterator[str]:
    """Calibration and start of NoRA on all attention layers, at the largest resolution, in batches of one."""
    pipeline = base_model(options)
    adapters.attach(pipeline, adapter_options(options))
    subject = random_subject(pipeline, resolutions(options)[-1])
    run_unet = runs_on_subject(DenoisingLoss(pipeline).eval(), subject, seed=0, batch_size=1)["unet"]
    statistics = []
    seconds, memory = cost(lambda: statistics.append(calibrate(pipeline.unet, run_unet)))
    yield row("start", f"calibration, {len(subject)} images of {subject.sizes[0][0]} px", seconds, memory)
    seconds, memory = cost(lambda: initialize_nora_weights(pipeline.unet, statistics[0]))
    yield row("start", f"AwSVD of {len(statistics[0])} layers", seconds, memory)


def sampling(options: argparse.Namespace) -> Iterator[str]:
    """One image of the base model at every resolution, then one with NoRA at the largest; each after one to warm up."""
    pipeline = base_model(options)

    def measured(name: str, resolution: int) -> list[str]:
        """The row of an image, called `name`."""
        settings = Sampling(1 if options.tiny else 25, resolution=resolution)
        image = partial(generate, pipeline, ["a photo of a toy"], [0], settings)
        list(image())
        return [
            row("sampling", f"{name}, {resolution} px", *cost(lambda: list(image())), f"{settings.num_inference_steps} steps")
        ]

    for resolution in resolutions(options):
        yield from attempted("sampling", f"{resolution} px", partial(measured, "base model", resolution))
    adapter = adapter_options(options)
    adapters.prepare_dry_run(adapter, adapters.attach(pipeline, adapter))
    yield from attempted("sampling", "NoRA", partial(measured, "NoRA, not fused", resolutions(options)[-1]))


def clip(options: argparse.Namespace) -> Iterator[str]:
    """A few-shot training step of CLIP ViT-B/16 with NoRA and with LoRA."""
    torch.manual_seed(0)
    base = load_clip("mini") if options.tiny else load_clip("ViT-B-16", "random", device())
    for precision in ("no", "bf16"):
        size = "2" if options.tiny else "32"
        flags = clip_step.parsed(["--batch_size", size, "--mixed_precision", precision, "--device", str(device())])
        with tempfile.TemporaryDirectory() as folder:
            tasks = clip_step.tasks_on(base, flags, Path(folder))
        seconds = medians_in_turns({name: task.step for name, task in tasks.items()}, options.repeats)
        for name in tasks:
            note = f"{seconds['NoRA'] / seconds['LoRA']:.3f} of LoRA's time" if name == "NoRA" else ""
            what = f"training step with {name}, {size} images, {len(clip_step.CLASSES)} prompts, mixed precision {precision}"
            yield row("clip", what, seconds[name], note=note)


def pretraining(options: argparse.Namespace) -> Iterator[str]:
    """A training step of mini-CLIP in bf16, with the batches that its pretraining prepares and with one prepared before."""
    scenes, batch_sizes = (16, TINY_BATCHES) if options.tiny else (2000, PRETRAINING_BATCHES)
    with tempfile.TemporaryDirectory() as folder:
        recipe = PretrainOptions(folder, options.images_dir, scenes=scenes)
        corpus = load_corpus(recipe)
        if options.images_dir is None:
            # Other scenes stand in for photographs.
            corpus = join(corpus, rendered_corpus(scenes, RESOLUTION, recipe.seed + 1))
        data = clip_data(recipe, corpus)
        loss = new_loss(recipe, data)
        optimizer = torch.optim.AdamW(decayed_groups(loss, 0.05), lr=recipe.clip_learning_rate)
        for size in batch_sizes:
            recipe.clip_batch_size = size
            batches = ClipBatches(recipe, data)
            first = batches(0)
            for kind, batch_at in {"prepared in turn": batches, "of one prepared batch": lambda _, batch=first: batch}.items():
                with stepping(loss, batch_at, optimizer, "bf16") as step:
                    seconds = medians_in_turns({kind: step}, options.repeats)[kind]
                yield row("pretraining", f"{size} images {kind}", seconds, note=f"{size / seconds:.0f} images a second")


def diffusers(options: argparse.Namespace) -> Iterator[str]:
    """A training step of this trainer and one of diffusers' script, with LoRA, in turns.

    Raises: InputError without the script.
    """
    if options.diffusers_script is None:
        raise InputError("--diffusers_script must name diffusers' train_dreambooth_lora_sdxl.py, and was not given.")
    resolution = resolutions(options)[-1]
    with tempfile.TemporaryDirectory() as folder:
        base_model(options).save_pretrained(f"{folder}/model")
        gc.collect()
        torch.cuda.empty_cache()
        speed = trainer_speed.BenchmarkOptions(
            options.diffusers_script,
            f"{folder}/model",
            resolution=resolution,
            train_batch_size=1,
            max_train_steps=trainer_speed.WARM_UP + 2 if options.tiny else DIFFUSERS_STEPS,
            script_flags="--mixed_precision bf16",
            own_flags="--mixed_precision bf16 --image_scorer mini --num_candidate_images 0",
        )
        results = trainer_speed.measured(trainer_speed.sides(speed, Path(folder)), Path(folder))
    for name, result in results.items():
        yield row("diffusers", f"training step with LoRA, {name}, {resolution} px", 1 / result["steps_per_second"])


STEPS: dict[str, Callable[[argparse.Namespace], Iterator[str]]] = {
    "bf16": partial(training_steps, step="bf16", precision="bf16"),
    "fp16": partial(training_steps, step="fp16", precision="fp16"),
    "nf4": partial(training_steps, step="nf4", precision="bf16", quantize="nf4"),
    "compiled": partial(training_steps, step="compiled", precision="bf16", compiled=True),
    "diffusers": diffusers,
    "start": start,
    "sampling": sampling,
    "clip": clip,
    "pretraining": pretraining,
}


if __name__ == "__main__":
    # Loggers of accelerate need it.
    PartialState()
    given_options = parsed()
    for given_step in given_options.steps:
        for line in STEPS[given_step](given_options):
            print(line, flush=True)  # noqa: T201 - gpu.py reads the rows
