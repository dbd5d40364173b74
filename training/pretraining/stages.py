"""Batches, schedule and precision for all stages of pretraining."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import nullcontext
from pathlib import Path

import numpy as np
import torch
from accelerate import Accelerator, DistributedDataParallelKwargs
from torch.nn.attention import SDPBackend, sdpa_kernel

from pipelines.corpus import Corpus, join, photo_corpus, rendered_corpus, to_pixels
from pipelines.mini_sdxl import RESOLUTION
from training.engine.loop import LoopOptions, Periodic, Trainable, train
from training.options.pretraining import PretrainOptions
from training.runs.record import list_checkpoints
from training.runs.run import RunDirectory
from training.runs.run_files import CHECKPOINTS, step_of


class PretrainingSampler:
    """Samples batches of rendered scenes and photographs; batch k depends only on the seed and k."""

    def __init__(self, corpus: Corpus, scenes: int, scene_share: float, seed: int) -> None:
        self.corpus, self.scenes, self.seed = corpus, scenes, seed
        self.scene_share = scene_share if scenes < len(corpus) else 1.0

    def draw(self, index: int, count: int) -> tuple[torch.Tensor, np.ndarray, np.random.Generator]:
        """Pixels (count, 3, height, width) in [-1, 1], half of them mirrored; their indices (count,); and the generator."""
        rng = np.random.default_rng((self.seed, index))
        from_scenes = rng.random(count) < self.scene_share
        photo = rng.integers(0, max(1, len(self.corpus) - self.scenes), count)
        chosen = np.where(from_scenes, rng.integers(0, self.scenes, count), self.scenes + photo)
        images = self.corpus.images[chosen]
        mirrored = (rng.random(count) < 0.5) & self.corpus.mirrorable[chosen]
        images[mirrored] = images[mirrored][:, :, ::-1]
        return to_pixels(images), chosen, rng


def load_corpus(options: PretrainOptions) -> Corpus:
    """The rendered scenes, then the photographs; the scenes are cached in the output directory."""
    cache = Path(options.output_dir) / f"scenes-{options.scenes}-seed{options.seed}.npz"
    if cache.exists():
        with np.load(cache) as arrays:
            scenes = Corpus(arrays["pictures"], arrays["captions"].tolist(), arrays["mirrorable"])
    else:
        scenes = rendered_corpus(options.scenes, RESOLUTION, options.seed)
        cache.parent.mkdir(parents=True, exist_ok=True)
        np.savez(cache, pictures=scenes.images, captions=np.asarray(scenes.captions), mirrorable=scenes.mirrorable)
    return join(scenes, photo_corpus(Path(options.images_dir), RESOLUTION)) if options.images_dir else scenes


def train_here(
    options: PretrainOptions, run: RunDirectory, trainable: Trainable, loop: LoopOptions, periodic: Sequence[Periodic] = ()
) -> None:
    """Train with the precision in `options`; on the CPU, with the fastest attention kernel."""
    # SDXL uses the second-to-last layer of its first text encoder, so the last layer gets no gradient.
    unread = DistributedDataParallelKwargs(find_unused_parameters=True)
    accelerator = Accelerator(mixed_precision=options.mixed_precision, kwargs_handlers=[unread])
    # With so few tokens, PyTorch's fused attention on the CPU takes a quarter of a bf16 step, and plain products a tenth of that.
    kernel = sdpa_kernel(SDPBackend.MATH) if accelerator.device.type == "cpu" else nullcontext()
    with kernel:
        train(accelerator, run, trainable, loop, periodic)


def warmup_stable_decay(
    optimizer: torch.optim.Optimizer, steps: int, warmup: int = 200, decay: float = 0.3
) -> torch.optim.lr_scheduler.LambdaLR:
    """Linear warm-up, a plateau, and a linear fall to zero over the last `decay` of `steps`; more steps extend the plateau."""
    return torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda step: min((step + 1) / warmup, 1.0, max(0.0, (steps - step) / (decay * steps)))
    )


def newest_step(run: Path) -> int:
    """The step of the newest checkpoint of the run directory `run`."""
    return step_of(list_checkpoints(run / CHECKPOINTS)[-1])
