"""Time of NoRA's initialisation: randomised AwSVD compared with the full SVD, on single matrices and on all of SDXL.

    python benchmarks/awsvd_speed.py

1. A weight of SDXL's size with a flat, a slowly and a steeply decaying spectrum: time and error, where both programs take turns,
   and the effect of the order of summation, which decides the precision in which factors are reproducible.
2. The attention projections of the built-in model, with its trained weights: error.
3. Random weights for every attention projection of the true-size SDXL UNet (560 nn.Linear layers, one at a time, so that they fit
   into the memory of a laptop). AwSVD is timed in float64, as in the initialisation, where it makes compact files reproducible,
   and in float32; beside it the matrix products alone of the float64 one. The full SVD, in float32, is measured on one layer of
   each shape and multiplied.
"""

# ruff: noqa: T201 - a benchmark prints its results
import argparse
import time
from collections import Counter
from collections.abc import Callable
from functools import partial
from statistics import median

import torch
from diffusers import UNet2DConditionModel
from torch import nn

from nora_vision import awsvd
from nora_vision.decomposition import _krylov_size, reproducible_awsvd
from pipelines.built_in import BUILT_IN_MODEL

PROJECTIONS = ("to_q", "to_k", "to_v", "to_out.0")


def sdxl_attention_shapes() -> Counter[tuple[int, int]]:
    """The number of attention projections of SDXL's UNet by weight shape (out, in); no weight is allocated."""
    with torch.device("meta"):
        unet = UNet2DConditionModel(
            sample_size=128,
            block_out_channels=(320, 640, 1280),
            down_block_types=("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
            up_block_types=("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
            transformer_layers_per_block=(1, 2, 10),
            attention_head_dim=(5, 10, 20),
            cross_attention_dim=2048,
            use_linear_projection=True,
            addition_embed_type="text_time",
            addition_time_embed_dim=256,
            projection_class_embeddings_input_dim=2816,
        )
    projections = [m for n, m in unet.named_modules() if isinstance(m, nn.Linear) and n.endswith(PROJECTIONS)]
    return Counter((m.out_features, m.in_features) for m in projections)


def seconds(call: Callable[[], object], device: str) -> float:
    """Wall-clock seconds of one call."""
    synchronize = torch.cuda.synchronize if device == "cuda" else lambda: None
    synchronize()
    start = time.perf_counter()
    call()
    synchronize()
    return time.perf_counter() - start


def weights(size: int) -> dict[str, torch.Tensor]:
    """Random (size, size) matrices by what is known of their singular values."""
    generator = torch.Generator().manual_seed(0)
    U, V = (torch.linalg.qr(torch.randn(size, size, generator=generator)).Q for _ in range(2))
    index = torch.arange(1, size + 1)
    decaying = {f"singular values i^-{power}": (U * index**-power) @ V for power in (0.5, 2.0)}
    return {"normal entries": torch.randn(size, size, generator=generator), **decaying}


def excess(weight: torch.Tensor, scale: torch.Tensor, rank: int) -> float:
    """The weighted error of `awsvd` relative to the optimal one, less 1."""
    B, A = (factor.double() for factor in awsvd(weight, scale, rank))
    weighted = weight.double() * scale.double()
    return ((weighted - B @ A * scale.double()).norm() / torch.linalg.svdvals(weighted)[rank:].norm() - 1).item()


def compare_on_one_matrix(size: int, rank: int, repeats: int, device: str) -> None:
    """Print the error, relative to the optimal one, and the time of AwSVD in float32 on three spectra."""
    print(f"{size} x {size}, rank {rank}, {device}, {torch.get_num_threads()} threads, medians of {repeats}:")
    scale = 0.5 + torch.rand(size, generator=torch.Generator().manual_seed(1)).to(device)
    for name, weight in weights(size).items():
        weight = weight.to(device)
        programs = {
            "full": partial(torch.linalg.svd, weight * scale, full_matrices=False),
            "awsvd": partial(awsvd, weight, scale, rank),
        }
        times: dict[str, list[float]] = {program: [] for program in programs}
        # The first round warms up.
        for repeat in range(repeats + 1):
            for program, call in programs.items():
                elapsed = seconds(call, device)
                if repeat:
                    times[program].append(elapsed)
        full, randomized = (median(times[program]) for program in programs)
        print(
            f"  {name}: torch.linalg.svd {full * 1e3:.0f} ms, awsvd {randomized * 1e3:.1f} ms: {full / randomized:.1f} ", end=""
        )
        print(f"times faster; weighted error {100 * excess(weight, scale, rank):.2f}% above the optimal one")


def summation_error(weight: torch.Tensor, rank: int) -> float:
    """How much B C A changes, relative to its norm, with the order of the sums over the inputs; C is random, of rank 8."""
    order = torch.randperm(weight.shape[1], generator=torch.Generator().manual_seed(2)).to(weight.device)
    scale = torch.ones_like(weight[0])
    (B, A), (other_B, other_A) = (awsvd(matrix, scale, rank) for matrix in (weight, weight[:, order]))
    inner = torch.Generator().manual_seed(3)
    up, down = (torch.randn(*shape, generator=inner).to(weight) for shape in ((rank, 8), (8, rank)))
    change = B @ up @ down @ A
    return ((other_B @ up @ down @ other_A - change[:, order]).norm() / change.norm()).item()


def compare_precisions(size: int, rank: int, device: str) -> None:
    """Print how much the order of summation, which differs between machines, changes a weight change in both precisions."""
    print("The same weights with another order of summation:")
    for name, weight in weights(size).items():
        single, double = (summation_error(weight.to(device, dtype), rank) for dtype in (torch.float32, torch.float64))
        print(f"  {name}: B C A changes by {single:.0e} of its norm in float32, {double:.0e} in float64")


def compare_on_trained_weights(rank: int, device: str) -> None:
    """Print the largest and the median error, relative to the optimal one, on the attention projections of the built-in model."""
    unet = UNet2DConditionModel.from_pretrained(BUILT_IN_MODEL / "unet", torch_dtype=torch.float32)
    errors = []
    for name, module in unet.named_modules():
        if isinstance(module, nn.Linear) and name.endswith(PROJECTIONS):
            scale = 0.5 + torch.rand(module.in_features, generator=torch.Generator().manual_seed(1))
            errors.append(excess(module.weight.detach().to(device), scale.to(device), rank))
    print(f"{len(errors)} attention projections of the built-in model, rank {rank}:")
    print(f"  weighted error {100 * max(errors):.2f}% above the optimal one at most, {100 * median(errors):.4f}% in the median")


def products(weight: torch.Tensor, rank: int) -> Callable[[], None]:
    """The matrix products of AwSVD with `weight`, in float64 and with random blocks."""
    matrix = weight.double()
    width, blocks = _krylov_size(matrix, rank)
    left, right = (torch.randn(width, size, dtype=torch.float64, device=weight.device) for size in matrix.shape)

    def run() -> None:
        """All of them."""
        for _ in range(blocks):
            _ = left @ matrix, right @ matrix.T

    return run


def compare_on_sdxl(rank: int, device: str) -> None:
    """Print the time of AwSVD, and of the full SVD, for every attention projection of SDXL's UNet."""
    shapes = sdxl_attention_shapes()
    start_total = float32_total = products_total = full_total = 0.0
    for (out_features, in_features), count in sorted(shapes.items()):
        scale = 0.5 + torch.rand(in_features).to(device)
        for index in range(count):
            weight = torch.randn(out_features, in_features).to(device) / in_features**0.5
            # ruff: disable[B023] - called immediately
            start_total += seconds(lambda: reproducible_awsvd(weight, scale, rank), device)
            float32_total += seconds(lambda: awsvd(weight, scale, rank), device)
            products_total += seconds(products(weight, rank), device)
            if index == 0:
                full_total += count * seconds(lambda: torch.linalg.svd(weight * scale, full_matrices=False), device)
            # ruff: enable[B023]
    listed = ", ".join(f"{count} of {m} x {n}" for (m, n), count in sorted(shapes.items()))
    print(f"All {shapes.total()} attention projections of SDXL's UNet ({listed}), rank {rank}, {device}:")
    print(f"  start {start_total:.1f} s (float64), of which its products take {products_total:.1f} s alone")
    print(f"  awsvd {float32_total:.1f} s (float32)")
    print(f"  full SVD {full_total:.0f} s (float32, one layer of each shape, multiplied)")
    print(f"  {full_total / start_total:.1f} and {full_total / float32_total:.1f} times faster than the full SVD")


def main() -> None:
    """Print all comparisons."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--rank", type=int, default=64)
    parser.add_argument("--repeats", type=int, default=9)
    options = parser.parse_args()
    torch.manual_seed(0)
    compare_on_one_matrix(1280, options.rank, options.repeats, options.device)
    compare_precisions(1280, options.rank, options.device)
    compare_on_trained_weights(min(options.rank, 8), options.device)
    compare_on_sdxl(options.rank, options.device)


if __name__ == "__main__":
    main()
