"""Time of NoRA's initialisation: randomised AwSVD compared with the full SVD, on one matrix and on all of SDXL.

    python benchmarks/awsvd_speed.py

The second part uses random weights for every attention projection of the true-size SDXL UNet (560 nn.Linear layers, one at a
time, so that they fit into the memory of a laptop). AwSVD is timed in float64, as in the initialisation, where it makes compact
files reproducible, and in float32. The full SVD, in float32, is measured on one layer of each shape and multiplied.
"""

# ruff: noqa: T201 - a benchmark prints its results
import argparse
import time
from collections import Counter
from collections.abc import Callable

import torch
from diffusers import UNet2DConditionModel
from torch import nn

from nora_vision import awsvd
from nora_vision.decomposition import reproducible_awsvd

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


def decaying_weight(size: int, device: str) -> torch.Tensor:
    """A random (size, size) matrix with singular values i^-0.5."""
    generator = torch.Generator().manual_seed(0)
    U, V = (torch.linalg.qr(torch.randn(size, size, generator=generator)).Q for _ in range(2))
    return ((U * torch.arange(1, size + 1).rsqrt()) @ V).to(device)


def compare_on_one_matrix(size: int, rank: int, device: str) -> None:
    """Print the error, relative to the optimal one, and the time of the randomised method on a slowly decaying spectrum."""
    weight = decaying_weight(size, device)
    scale = 0.5 + torch.rand(size, generator=torch.Generator().manual_seed(1)).to(device)
    awsvd(weight, scale, rank, method="randomized")
    full = min(seconds(lambda: torch.linalg.svd(weight * scale, full_matrices=False), device) for _ in range(3))
    randomized = min(seconds(lambda: awsvd(weight, scale, rank, method="randomized"), device) for _ in range(5))
    B, A = awsvd(weight, scale, rank, method="randomized")
    optimal = torch.linalg.svdvals(weight * scale)[rank:].norm()
    excess = (((weight - B @ A) * scale).norm() / optimal - 1).item()
    print(f"{size} x {size}, singular values i^-0.5, rank {rank}, {device}:")
    print(f"  torch.linalg.svd {full * 1e3:.0f} ms, awsvd {randomized * 1e3:.0f} ms: {full / randomized:.1f} times faster")
    print(f"  weighted error {100 * excess:.2f}% above the optimal one")


def compare_on_sdxl(rank: int, device: str) -> None:
    """Print the time of AwSVD, and of the full SVD, for every attention projection of SDXL's UNet."""
    shapes = sdxl_attention_shapes()
    start_total = float32_total = full_total = 0.0
    for (out_features, in_features), count in sorted(shapes.items()):
        scale = 0.5 + torch.rand(in_features).to(device)
        for index in range(count):
            weight = torch.randn(out_features, in_features).to(device) / in_features**0.5
            # ruff: disable[B023] - called immediately
            start_total += seconds(lambda: reproducible_awsvd(weight, scale, rank), device)
            float32_total += seconds(lambda: awsvd(weight, scale, rank), device)
            if index == 0:
                full_total += count * seconds(lambda: torch.linalg.svd(weight * scale, full_matrices=False), device)
            # ruff: enable[B023]
    listed = ", ".join(f"{count} of {m} x {n}" for (m, n), count in sorted(shapes.items()))
    print(f"All {shapes.total()} attention projections of SDXL's UNet ({listed}), rank {rank}, {device}:")
    print(f"  start {start_total:.0f} s (float64), awsvd {float32_total:.0f} s (float32), ", end="")
    print(f"full SVD {full_total:.0f} s (float32, one layer of each shape, multiplied)")
    print(f"  {full_total / start_total:.1f} and {full_total / float32_total:.1f} times faster than the full SVD")


def main() -> None:
    """Print both comparisons."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--rank", type=int, default=64)
    options = parser.parse_args()
    torch.manual_seed(0)
    compare_on_one_matrix(1280, options.rank, options.device)
    compare_on_sdxl(options.rank, options.device)


if __name__ == "__main__":
    main()
