"""Compare NoRA with PEFT's LoRA at equal inner rank: bytes saved for backward, and time of a training step.

    python benchmarks/adapter_step.py

Bytes are those of one adapted nn.Linear after a LayerNorm. A step is forward and backward of one adapted transformer block of
SDXL; both adapters, and the block without an adapter, take turns in one process, so that other load affects all alike. No adapter
can be faster than the block without one.
"""

# ruff: noqa: T201 - a benchmark prints its results
import argparse
import statistics
import time
from collections.abc import Callable, Mapping
from typing import Any

import torch
from diffusers.models.attention import BasicTransformerBlock
from peft import LoraConfig, PeftConfig, inject_adapter_in_model
from torch import nn

from nora_vision import NoraConfig

WIDTH = 1280
WARM_UP = 2
PROJECTIONS = ["to_q", "to_k", "to_v", "to_out.0"]


def adapter_configs(r: int, inner_r: int, target_modules: list[str]) -> dict[str, PeftConfig]:
    """LoRA of rank `inner_r` and NoRA of ranks `r`, `inner_r`."""
    return {
        "LoRA": LoraConfig(r=inner_r, lora_alpha=inner_r, target_modules=target_modules),
        # Random factors: their values change neither bytes nor time.
        "NoRA": NoraConfig(r=r, inner_r=inner_r, alpha=inner_r, target_modules=target_modules, init_weights=False),
    }


def saved_bytes(model: nn.Module, run: Callable[[], Any]) -> int:
    """Bytes that `run()` saves for backward, without the parameters and buffers of `model`."""
    parameter_storage = {tensor.untyped_storage().data_ptr() for tensor in (*model.parameters(), *model.buffers())}
    saved: dict[int, torch.UntypedStorage] = {}

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        """Record the storage of a tensor that autograd saves."""
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in parameter_storage:
            saved[storage.data_ptr()] = storage
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        run()
    return sum(storage.nbytes() for storage in saved.values())


def timed(run: Callable[[], Any]) -> float:
    """Seconds of `run()`, with all work that it gives to a GPU."""
    synchronize = torch.cuda.synchronize if torch.cuda.is_initialized() else lambda: None
    synchronize()
    began = time.perf_counter()
    run()
    synchronize()
    return time.perf_counter() - began


def medians_in_turns(steps: Mapping[str, Callable[[], float]], repeats: int) -> dict[str, float]:
    """The median seconds of each step, which returns its own, over `repeats` calls after `WARM_UP` more.

    The steps take turns, so that other load affects all alike, in alternating order, so that none always benefits from another's
    warm caches.
    """
    seconds: dict[str, list[float]] = {name: [] for name in steps}
    for repeat in range(repeats + WARM_UP):
        for name in sorted(steps, reverse=bool(repeat % 2)):
            elapsed = steps[name]()
            if repeat >= WARM_UP:
                seconds[name].append(elapsed)
    return {name: statistics.median(each) for name, each in seconds.items()}


def compare_saved_bytes(tokens: int, r: int, inner_r: int, device: str) -> dict[str, int]:
    """Saved bytes of one adapted nn.Linear after a LayerNorm, by adapter."""
    norm = nn.LayerNorm(WIDTH, device=device)
    results = {}
    for name, config in adapter_configs(r, inner_r, ["0"]).items():
        model = nn.Sequential(nn.Linear(WIDTH, WIDTH)).to(device)
        hidden = norm(torch.randn(tokens, WIDTH, device=device, requires_grad=True))
        layer = inject_adapter_in_model(config, model)[0]
        results[name] = saved_bytes(layer, lambda layer=layer, hidden=hidden: layer(hidden))
    return results


def training_step(config: PeftConfig | None, tokens: int, device: str, dtype: torch.dtype) -> Callable[[], float]:
    """A function that runs one forward and backward of an SDXL transformer block and returns its seconds.

    Args:
        config: of its adapter; None for none.
    """
    torch.manual_seed(0)
    block = BasicTransformerBlock(WIDTH, 20, 64, cross_attention_dim=2048).to(device, dtype).requires_grad_(False)
    if config is not None:
        inject_adapter_in_model(config, block)
    # The block's input needs gradients, as inside a UNet with adapters in earlier blocks.
    x = torch.randn(1, tokens, WIDTH, device=device, dtype=dtype, requires_grad=True)
    context = torch.randn(1, 77, 2048, device=device, dtype=dtype)

    def step() -> float:
        """Seconds of one step."""
        seconds = timed(lambda: block(x, encoder_hidden_states=context).square().mean().backward())
        x.grad = None
        block.zero_grad()
        return seconds

    return step


def main() -> None:
    """Print both comparisons."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--dtype", choices=["float32", "bfloat16", "float16"], default="float32")
    parser.add_argument("--tokens", type=int, default=1024, help="tokens of the block's step; 1024 are 32 x 32 latents")
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--r", type=int, default=64)
    parser.add_argument("--inner_r", type=int, default=16)
    options = parser.parse_args()

    lora, nora = compare_saved_bytes(4096, options.r, options.inner_r, options.device).values()
    print(f"Saved for backward by one adapted Linear ({WIDTH} wide, 4096 tokens, r {options.r}, inner_r {options.inner_r}):")
    print(f"  LoRA {lora / 2**20:.2f} MiB, NoRA {nora / 2**20:.2f} MiB: {lora / nora:.1f} times less")

    configs = {**adapter_configs(options.r, options.inner_r, PROJECTIONS), "none": None}
    steps = {n: training_step(c, options.tokens, options.device, getattr(torch, options.dtype)) for n, c in configs.items()}
    seconds = medians_in_turns(steps, options.steps)
    lora, nora, without = (seconds[name] for name in ("LoRA", "NoRA", "none"))
    setting = f"{options.tokens} tokens, {options.device}, {options.dtype}, medians of {options.steps}"
    print(f"Training step of one SDXL transformer block ({setting}):")
    print(f"  LoRA {lora * 1e3:.1f} ms, NoRA {nora * 1e3:.1f} ms: ratio {nora / lora:.3f}")
    print(f"  without adapter {without * 1e3:.1f} ms: ratio {without / lora:.3f}, the least possible")


if __name__ == "__main__":
    main()
