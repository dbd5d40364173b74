"""Measure the error of the outputs of each layer that the weightings of NoRA's outer factors leave.

    python benchmarks/output_errors.py --layers 'v_proj$|mid_block.*attn[12].to_[qv]$'

The error is ||(W - B A) X||_F / ||W X||_F in percent, X being the inputs of the layer: those of the calibration and, after a
slash, those of other images. The built-in CLIP is calibrated on 160 of scikit-learn's digits and tested on 160 others; the UNet
of the built-in SDXL is calibrated on four images of the bundled subject, at eight noise levels each, and tested on the fifth. The
last rows of each model are means over all of its attention layers.
"""

from __future__ import annotations

import re
import sys
import tempfile
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from statistics import fmean

import torch
from torch import nn
from transformers import HfArgumentParser

from nora_vision import ActivationStatistics, calibrate
from nora_vision.decomposition import reproducible_awsvd
from nora_vision.weighting import MOMENTS, WEIGHTINGS
from pipelines.built_in import ASSETS, BUILT_IN_CLIP_NAME, BUILT_IN_MODEL
from pipelines.cache import TensorCache
from pipelines.clip import load_clip
from pipelines.clip_attention import attention_layers, separate
from pipelines.fewshot.data import read
from pipelines.fewshot.samples import sample_set
from pipelines.subject.base_model import load_base_model, model_resolution
from pipelines.subject.calibration import runs_on_subject
from pipelines.subject.data import TrainingImage
from pipelines.subject.encoding import CropConfig, LatentEncoder
from pipelines.subject.loss import DenoisingLoss
from pipelines.subject.target_layers import ATTENTION

IMAGES, PROMPT = 160, "a photo of sks toy"


@dataclass
class BenchmarkOptions:
    """The options of the benchmark."""

    ranks: list[int] = field(default_factory=lambda: [8, 22], metadata={"help": "Ranks of B and A."})
    layers: str = field(default=".", metadata={"help": "Layers with rows of their own, as a regular expression."})


@dataclass(frozen=True)
class Model:
    """A model, the endings of the names of its layers, and functions that run it on calibration inputs and on others."""

    name: str
    module: nn.Module
    targets: list[str]
    calibration: Callable[[], object]
    others: Callable[[], object]


def clip_encoder() -> Model:
    """The image encoder of the built-in CLIP on handwritten digits."""
    clip = load_clip(BUILT_IN_CLIP_NAME)
    separate(clip.model)
    pixels = torch.stack([clip.preprocess(read(image)) for image in sample_set().images[: 2 * IMAGES]])
    targets = [name for layer in attention_layers(clip.model.visual) for name in layer.values()]
    # One of two, so that both halves have all classes and writers.
    runs = [lambda part=part: clip.encode_images(part) for part in (pixels[::2], pixels[1::2])]
    return Model("CLIP", clip.model.visual, targets, *runs)


def unet(cache: TensorCache) -> Model:
    """The UNet of the built-in SDXL on the bundled subject."""
    pipe = load_base_model(str(BUILT_IN_MODEL))
    loss, side = DenoisingLoss(pipe), model_resolution(pipe)
    paths = sorted((ASSETS / "sample-subject").glob("*.jpg"))
    encoder, crop = LatentEncoder(pipe, cache), CropConfig(((side, side),))
    parts = [encoder.encode([TrainingImage(path, PROMPT) for path in part], crop) for part in (paths[:-1], paths[-1:])]
    return Model("UNet", pipe.unet, ATTENTION, *(runs_on_subject(loss, part, seed=0)["unet"] for part in parts))


def errors(model: Model, ranks: list[int]) -> dict[tuple[str, int], dict[str, tuple[float, float]]]:
    """The errors on the calibration inputs and on the others, by layer and rank and then by weighting."""
    kinds = {MOMENTS.get(weighting, ""): weighting for weighting in WEIGHTINGS}
    statistics = {
        kind: calibrate(model.module, model.calibration, model.targets, weighting=weighting) for kind, weighting in kinds.items()
    }
    others = calibrate(model.module, model.others, model.targets, weighting="covariance")
    results = {}
    for name in others:
        layer = model.module.get_submodule(name)
        for rank in (rank for rank in ranks if rank <= min(layer.weight.shape)):
            results[name, rank] = {
                weighting: tuple(
                    output_error(layer.weight, factors(layer.weight, name, statistics, weighting, rank), moments[name])
                    for moments in (statistics["covariance"].moments, others.moments)
                )
                for weighting in WEIGHTINGS
            }
    return results


def factors(
    weight: torch.Tensor, name: str, statistics: dict[str, ActivationStatistics], weighting: str, rank: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """B (out, rank) and A (rank, in) of the layer `name`, float64."""
    root = statistics[MOMENTS.get(weighting, "")].root(name, weighting)
    B, A = reproducible_awsvd(root.weigh(weight.detach().double()), None, rank)
    return B, root.unweigh(A)


def output_error(weight: torch.Tensor, pair: tuple[torch.Tensor, torch.Tensor], moments: torch.Tensor) -> float:
    """||(W - B A) X||_F / ||W X||_F, from X X^T = `moments` (in, in)."""
    weight = weight.detach().double()
    residual = weight - pair[0] @ pair[1]
    squares = [((matrix @ moments) * matrix).sum().clamp_min(0) for matrix in (residual, weight)]
    return (squares[0] / squares[1]).sqrt().item()


def rows(model: Model, options: BenchmarkOptions) -> list[str]:
    """The rows of the table for one model."""
    results = errors(model, options.ranks)
    lines = [
        row(f"{model.name} `{name}`", rank, by_weighting)
        for (name, rank), by_weighting in results.items()
        if re.search(options.layers, name)
    ]
    for rank in options.ranks:
        layers = [by_weighting for (_, each), by_weighting in results.items() if each == rank]
        means = {w: tuple(fmean(layer[w][part] for layer in layers) for part in (0, 1)) for w in WEIGHTINGS}
        lines.append(row(f"{model.name}, mean of {len(layers)}", rank, means))
    return lines


def row(name: str, rank: int, by_weighting: dict[str, tuple[float, float]]) -> str:
    """A row of the table, in percent."""
    cells = [f"{100 * seen:.1f} / {100 * unseen:.1f}" for seen, unseen in by_weighting.values()]
    return f"| {name} | {rank} | {' | '.join(cells)} |"


def main() -> None:
    """Print the table as Markdown."""
    (options,) = HfArgumentParser(BenchmarkOptions, description=__doc__).parse_args_into_dataclasses()
    sys.stdout.write(f"| layer | rank | {' | '.join(WEIGHTINGS)} |\n|{'---|' * (2 + len(WEIGHTINGS))}\n")
    with tempfile.TemporaryDirectory() as folder:
        for model in (clip_encoder(), unet(TensorCache(Path(folder)))):
            sys.stdout.write("\n".join(rows(model, options)) + "\n")


if __name__ == "__main__":
    main()
