"""The base calibration on the built-in model: what it costs in accuracy, and how much it depends on the machine.

    python benchmarks/base_calibration.py

1. The error of the outer factors, ||(W - B A) S||_F / ||W S||_F with the statistics S of the sample subject, over the attention
   layers of the UNet: for factors without statistics, from the base calibration, and from the subject's own, exact and rounded.
2. How much the base calibration differs between numbers of threads and between dtypes, in steps of the rounded scale. A file is
   read correctly as long as all differences are below half a step.
"""

# ruff: noqa: T201 - a benchmark prints its results
from __future__ import annotations

import argparse
import tempfile
from collections.abc import Callable, Mapping
from pathlib import Path
from statistics import fmean
from unittest import mock

import torch
from diffusers import StableDiffusionXLPipeline
from torch import nn

from nora_vision import awsvd, base_calibration, calibrate, sdxl_calibration
from nora_vision.scales import OCTAVES, STEPS_PER_OCTAVE, coarse_scale
from pipelines.built_in import BUILT_IN_MODEL
from pipelines.cache import TensorCache
from pipelines.subject.base_model import load_base_model, model_resolution
from pipelines.subject.calibration import runs_on_subject
from pipelines.subject.data import TrainingImage
from pipelines.subject.encoding import CropConfig, LatentEncoder
from pipelines.subject.loss import DenoisingLoss
from pipelines.subject.target_layers import ATTENTION

SUBJECT = BUILT_IN_MODEL.parent / "sample-subject"
FLOOR = 1e-3
Scales = Mapping[str, torch.Tensor]


def subject_statistics(pipe: StableDiffusionXLPipeline, cache: Path) -> Scales:
    """The statistics on the sample subject's images."""
    images = [TrainingImage(path, "a photo of sks toy") for path in sorted(SUBJECT.glob("*.jpg"))]
    side = model_resolution(pipe)
    encoded = LatentEncoder(pipe, TensorCache(cache)).encode(images, CropConfig(((side, side),)))
    return calibrate(pipe.unet, runs_on_subject(DenoisingLoss(pipe), encoded, seed=0)["unet"], ATTENTION)


def base_statistics(pipe: StableDiffusionXLPipeline) -> Scales:
    """The statistics of the base calibration, computed afresh."""
    linear = [name for name, module in pipe.unet.named_modules() if isinstance(module, nn.Linear)]
    layers = [name for name in linear if name.endswith(tuple(ATTENTION))]
    with (
        tempfile.TemporaryDirectory() as empty,
        mock.patch.object(base_calibration, "cached_assets_path", return_value=Path(empty)),
    ):
        return sdxl_calibration(pipe)["unet"](layers)


def mean_error(unet: nn.Module, subject: Scales, scales: Scales | None, rank: int, rounded: Callable | None = None) -> float:
    """The mean relative error of outer factors from `scales`, weighted with the statistics `subject`."""
    errors = []
    for name, statistics in subject.items():
        weight = unet.get_submodule(name).weight.detach()
        scale = torch.ones_like(statistics) if scales is None else scales[name]
        scale = scale if rounded is None else rounded(scale)
        B, A = awsvd(weight, (scale / scale.mean()).clamp_min(FLOOR), min(rank, *weight.shape), method="exact")
        errors.append((((weight - B @ A) * statistics).norm() / (weight * statistics).norm()).item())
    return fmean(errors)


def largest_difference(first: Scales, second: Scales) -> tuple[float, float]:
    """The 99th percentile and the largest difference of two statistics, relative to their largest entries, in steps."""

    def steps(statistics: torch.Tensor) -> torch.Tensor:
        """Before they are rounded."""
        return STEPS_PER_OCTAVE * (statistics.double() / statistics.max()).log2().clamp_min(-OCTAVES)

    differences = torch.cat([(steps(first[name]) - steps(second[name])).abs() for name in first])
    return differences.quantile(0.99).item(), differences.max().item()


def main() -> None:
    """Print both tables."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--rank", type=int, default=16)
    parser.add_argument("--threads", type=int, nargs="*", default=[1, 2, 4])
    parser.add_argument("--dtypes", nargs="*", default=["bfloat16", "float16"])
    options = parser.parse_args()
    pipe = load_base_model(str(BUILT_IN_MODEL))
    with tempfile.TemporaryDirectory() as cache:
        subject, base = subject_statistics(pipe, Path(cache)), base_statistics(pipe)
    print(f"Weighted error of the outer factors, rank {options.rank}, mean over {len(subject)} attention layers:")
    print(f"  no statistics {mean_error(pipe.unet, subject, None, options.rank):.4f}")
    for name, scales in {"base calibration": base, "the subject's own": subject}.items():
        exact, rounded = (mean_error(pipe.unet, subject, scales, options.rank, rounding) for rounding in (None, coarse_scale))
        print(f"  {name}: {exact:.4f}, rounded to half octaves {rounded:.4f}")
    print("Differences of the base calibration in steps (99th percentile, largest), allowed 0.5:")
    threads = torch.get_num_threads()
    for count in options.threads:
        torch.set_num_threads(count)
        print(f"  {count} threads instead of {threads}: %.4f, %.4f" % largest_difference(base, base_statistics(pipe)))
    torch.set_num_threads(threads)
    for dtype in options.dtypes:
        other = base_statistics(load_base_model(str(BUILT_IN_MODEL), getattr(torch, dtype)))
        print(f"  {dtype} instead of float32: %.4f, %.4f" % largest_difference(base, other))


if __name__ == "__main__":
    main()
