"""What the stages of pretraining share: their options, batches of scenes and photographs, schedule and precision."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch
from accelerate import Accelerator, DistributedDataParallelKwargs
from torch.nn.attention import SDPBackend, sdpa_kernel

from pipelines.corpus import Corpus, join, photo_corpus, rendered_corpus, to_pixels
from pipelines.mini_sdxl import RESOLUTION
from training.engine.loop import LoopOptions, Periodic, Trainable, train
from training.runs.record import list_checkpoints
from training.runs.run import RunDirectory

STAGE_NAMES = ("basis", "vae", "unet", "export", "clip", "export_clip")


@dataclass
class PretrainOptions:
    """How the built-in model is trained from nothing."""

    output_dir: str = field(metadata={"help": "Where the runs of the stages, the cached corpus and the finished model go."})
    photos_dir: str | None = field(
        default=None, metadata={"help": "Folder of zipped photographs with classes.json; rendered scenes alone without it."}
    )
    stages: list[str] = field(
        default_factory=lambda: ["basis", "vae", "unet", "export"],
        metadata={
            "help": "Stages to run, of: basis, vae, unet, export for the built-in SDXL; clip, export_clip for the built-in CLIP."
        },
    )
    scenes: int = field(default=24_000, metadata={"help": "Rendered scenes in the corpus."})
    scene_share: float = field(default=0.8, metadata={"help": "Share of rendered scenes in a batch."})
    vae_steps: int = field(default=3000, metadata={"help": "Optimisation steps of the autoencoder."})
    vae_batch_size: int = field(default=8, metadata={"help": "Pictures a step of the autoencoder."})
    vae_learning_rate: float = field(default=1.5e-3, metadata={"help": "Peak learning rate of the autoencoder."})
    unet_steps: int = field(default=10_000, metadata={"help": "Optimisation steps of the UNet and text encoders."})
    unet_batch_size: int = field(default=32, metadata={"help": "Pictures a step of the UNet."})
    unet_learning_rate: float = field(default=7e-4, metadata={"help": "Peak learning rate of the UNet and text encoders."})
    sample_steps: int = field(default=500, metadata={"help": "Steps between two contact sheets of the UNet in training."})
    clip_steps: int = field(default=10_000, metadata={"help": "Optimisation steps of the built-in CLIP."})
    clip_batch_size: int = field(default=48, metadata={"help": "Pictures a step of the built-in CLIP."})
    clip_learning_rate: float = field(default=1.5e-3, metadata={"help": "Peak learning rate of the built-in CLIP."})
    clip_scene_share: float = field(default=0.15, metadata={"help": "Share of rendered scenes in a batch of the built-in CLIP."})
    score_steps: int = field(
        default=500, metadata={"help": "Steps between two scores of the built-in CLIP on held-out pictures."}
    )
    mixed_precision: str = field(
        default="no", metadata={"help": "'no' or 'bf16': bf16 is 1.6 times as fast on CPUs that have it."}
    )
    card_note: str = field(
        default="", metadata={"help": "A sentence for the model card, such as what earlier legs of the training saw."}
    )
    seed: int = field(default=0, metadata={"help": "Seed of the scenes and of all that training draws."})

    def __post_init__(self) -> None:
        unknown = set(self.stages) - set(STAGE_NAMES)
        if unknown:
            raise ValueError(f"stages must be among {', '.join(STAGE_NAMES)}, got {', '.join(sorted(unknown))}.")
        for name in ("scene_share", "clip_scene_share"):
            if not 0 < getattr(self, name) <= 1:
                raise ValueError(f"{name} must be in (0, 1], got {getattr(self, name)}.")


class Sampler:
    """Draws batches from rendered scenes and photographs; batch k is a function of the seed and k alone."""

    def __init__(self, corpus: Corpus, scenes: int, scene_share: float, seed: int) -> None:
        self.corpus, self.scenes, self.seed = corpus, scenes, seed
        self.scene_share = scene_share if scenes < len(corpus) else 1.0

    def draw(self, index: int, count: int) -> tuple[torch.Tensor, np.ndarray, np.random.Generator]:
        """Pixels (count, 3, height, width) in [-1, 1], half of them mirrored, their places (count,), and the generator."""
        rng = np.random.default_rng((self.seed, index))
        from_scenes = rng.random(count) < self.scene_share
        photo = rng.integers(0, max(1, len(self.corpus) - self.scenes), count)
        chosen = np.where(from_scenes, rng.integers(0, self.scenes, count), self.scenes + photo)
        pictures = self.corpus.pictures[chosen]
        mirrored = (rng.random(count) < 0.5) & self.corpus.mirrorable[chosen]
        pictures[mirrored] = pictures[mirrored][:, :, ::-1]
        return to_pixels(pictures), chosen, rng


def load_corpus(options: PretrainOptions) -> Corpus:
    """The rendered scenes, then the photographs; the scenes are cached in the output directory."""
    cache = Path(options.output_dir) / f"scenes-{options.scenes}-seed{options.seed}.npz"
    if cache.exists():
        with np.load(cache) as arrays:
            scenes = Corpus(arrays["pictures"], arrays["captions"].tolist(), arrays["mirrorable"])
    else:
        scenes = rendered_corpus(options.scenes, RESOLUTION, options.seed)
        cache.parent.mkdir(parents=True, exist_ok=True)
        np.savez(cache, pictures=scenes.pictures, captions=np.asarray(scenes.captions), mirrorable=scenes.mirrorable)
    return join(scenes, photo_corpus(Path(options.photos_dir), RESOLUTION)) if options.photos_dir else scenes


def train_here(
    options: PretrainOptions, run: RunDirectory, trainable: Trainable, loop: LoopOptions, periodic: Sequence[Periodic] = ()
) -> None:
    """Train with the precision asked for, and with the attention kernel that is fastest where there is no GPU."""
    # SDXL reads the last but one layer of its first text encoder, so that the last one never gets a gradient.
    unread = DistributedDataParallelKwargs(find_unused_parameters=True)
    accelerator = Accelerator(mixed_precision=options.mixed_precision, kwargs_handlers=[unread])
    # PyTorch's fused attention on the CPU takes a quarter of a bf16 step on this few tokens; plain products take a tenth of that.
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
    return int(list_checkpoints(run / "checkpoints")[-1].name.removeprefix("step-"))
