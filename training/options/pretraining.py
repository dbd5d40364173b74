"""Options of the pretraining of the built-in models."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import dataclass, field

from transformers import HfArgumentParser

from pipelines.deprecated_flags import current_arguments
from pipelines.help_format import HelpFormatter

STAGE_NAMES = ("basis", "vae", "unet", "export", "clip", "export_clip")


@dataclass
class PretrainOptions:
    """The pretraining of the built-in models from scratch."""

    output_dir: str = field(metadata={"help": "Folder for the runs of the stages, the cached corpus and the finished model."})
    images_dir: str | None = field(
        default=None,
        metadata={"help": "Folder of zipped photographs with classes.json. Without it, only rendered scenes are used."},
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
    vae_batch_size: int = field(default=8, metadata={"help": "Images per step of the autoencoder."})
    vae_learning_rate: float = field(default=1.5e-3, metadata={"help": "Peak learning rate of the autoencoder."})
    unet_steps: int = field(default=10_000, metadata={"help": "Optimisation steps of the UNet and text encoders."})
    unet_batch_size: int = field(default=32, metadata={"help": "Images per step of the UNet."})
    unet_learning_rate: float = field(default=7e-4, metadata={"help": "Peak learning rate of the UNet and text encoders."})
    sample_steps: int = field(default=500, metadata={"help": "Steps between two contact sheets of the UNet in training."})
    clip_steps: int = field(default=10_000, metadata={"help": "Optimisation steps of the built-in CLIP."})
    clip_batch_size: int = field(default=48, metadata={"help": "Images per step of the built-in CLIP."})
    clip_learning_rate: float = field(default=1.5e-3, metadata={"help": "Peak learning rate of the built-in CLIP."})
    clip_decay_share: float = field(
        default=0.3, metadata={"help": "Share of the steps, at the end, over which the learning rate of the built-in CLIP falls."}
    )
    clip_scene_share: float = field(default=0.15, metadata={"help": "Share of rendered scenes in a batch of the built-in CLIP."})
    clip_cutmix: float = field(default=0.5, metadata={"help": "Share of the batches whose photographs are mixed by CutMix."})
    clip_weights: str | None = field(
        default=None,
        metadata={"help": "Folder of a built-in CLIP whose weights the training starts from. Default: random weights."},
    )
    score_steps: int = field(default=500, metadata={"help": "Steps between two scores of the built-in CLIP on held-out images."})
    mixed_precision: str = field(
        default="no", metadata={"help": "'no' or 'bf16', which is 1.6 times as fast on CPUs that support it."}
    )
    card_note: str = field(default="", metadata={"help": "A sentence for the model card, for example about earlier training."})
    seed: int = field(default=0, metadata={"help": "Seed of the scenes and of the training."})

    def __post_init__(self) -> None:
        unknown = set(self.stages) - set(STAGE_NAMES)
        if unknown:
            raise ValueError(f"stages must be among {', '.join(STAGE_NAMES)}, got {', '.join(sorted(unknown))}.")
        for name in ("scene_share", "clip_scene_share", "clip_decay_share"):
            if not 0 < getattr(self, name) <= 1:
                raise ValueError(f"{name} must be in (0, 1], got {getattr(self, name)}.")
        if not 0 <= self.clip_cutmix <= 1:
            raise ValueError(f"clip_cutmix must be in [0, 1], got {self.clip_cutmix}.")


def parse_pretrain_options(arguments: Sequence[str] | None = None) -> PretrainOptions:
    """Parse the command line; an invalid flag ends the program with a message and exit code 2."""
    parser = HfArgumentParser(PretrainOptions, formatter_class=HelpFormatter)
    given = current_arguments(sys.argv[1:] if arguments is None else arguments, parser)
    return parser.parse_args_into_dataclasses(given)[0]
