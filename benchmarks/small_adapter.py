"""Size and load time of the smallest NoRA file for SDXL: every attention layer of the UNet, with random weights of true shapes.

    python benchmarks/small_adapter.py

The adapter is started from random statistics in place of the base calibration's, since running the whole UNet is not what is
measured. It is rounded, saved and loaded onto the same weights again, where each tensor must be equal to the bit. Beside the
decomposition of each weight, in turn with it, its matrix products are timed alone. For comparison, a LoRA of the inner rank is
written in float16 and loaded by PEFT.
"""

# ruff: noqa: T201 - a benchmark prints its results
from __future__ import annotations

import argparse
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from unittest import mock

import torch
from diffusers import UNet2DConditionModel
from peft import LoraConfig, get_peft_model_state_dict, inject_adapter_in_model, set_peft_model_state_dict
from safetensors.torch import load_file, save_file
from torch import nn
from true_size import UNET

from nora_vision import ActivationStatistics, NoraConfig, compact, initialize_nora_weights, load_adapter, save_adapter
from nora_vision.calibration import fingerprint
from nora_vision.decomposition import _krylov_size
from nora_vision.layer import NoraLayer, nora_layers
from nora_vision.rounding import round_inner_factors
from nora_vision.saving import adapter_tensors
from pipelines.subject.target_layers import ATTENTION

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


def attention_shapes() -> dict[str, tuple[int, int]]:
    """The shape (out, in) of every attention projection of SDXL's UNet by name; no weight is allocated."""
    with torch.device("meta"):
        unet = UNet2DConditionModel(**UNET)
    layers = {name: module for name, module in unet.named_modules() if isinstance(module, nn.Linear)}
    return {name: tuple(layer.weight.shape) for name, layer in layers.items() if name.endswith(tuple(ATTENTION))}


def attention_layers(shapes: dict[str, tuple[int, int]], dtype: torch.dtype) -> nn.Module:
    """A module with only these layers, under their names, and with random weights."""
    root, generator = nn.Module(), torch.Generator().manual_seed(0)
    for name, (out_features, in_features) in shapes.items():
        *path, last = name.split(".")
        parent = root
        for part in path:
            if part not in dict(parent.named_children()):
                parent.add_module(part, nn.Module())
            parent = parent.get_submodule(part)
        layer = nn.Linear(in_features, out_features, bias=False, dtype=dtype, device="meta").to_empty(device="cpu")
        layer.weight.requires_grad_(False).copy_(torch.randn(out_features, in_features, generator=generator) / in_features**0.5)
        parent.add_module(last, layer)
    return root


def statistics(model: nn.Module) -> ActivationStatistics:
    """Random statistics, the same for layers with the same input."""
    scales, fingerprints, by_source, generator = {}, {}, {}, torch.Generator().manual_seed(2)
    for name, layer in nora_layers(model).items():
        source = (
            "text" if ".attn2.to_k" in name or ".attn2.to_v" in name else name.replace("to_k", "to_q").replace("to_v", "to_q")
        )
        if source not in by_source:
            by_source[source] = torch.randn(layer.in_features, generator=generator).exp2()
        scales[name] = by_source[source]
        fingerprints[name] = fingerprint(layer.get_base_layer().weight)
    return ActivationStatistics(scales, fingerprints)


def trained(model: nn.Module, r: int, inner_r: int) -> ActivationStatistics:
    """Add an adapter with random inner factors, as after training; returns the statistics that it was started from."""
    inject_adapter_in_model(NoraConfig(r=r, inner_r=inner_r, outer_init="awsvd", target_modules=ATTENTION), model)
    model.peft_config = {"default": NoraConfig(r=r, inner_r=inner_r, outer_init="awsvd", target_modules=ATTENTION)}
    collected, generator = statistics(model), torch.Generator().manual_seed(1)
    initialize_nora_weights(model, collected, generator=generator, calibration="base")
    for layer in nora_layers(model).values():
        layer.nora_inner_B["default"].data.normal_(std=0.05, generator=generator)
    return collected


def without_adapter(model: nn.Module) -> nn.Module:
    """`model` with its base layers in place of the adapted ones."""
    for name, layer in nora_layers(model).items():
        parent, _, child = name.rpartition(".")
        setattr(model.get_submodule(parent), child, layer.base_layer)
    del model.peft_config
    return model


class Timed:
    """Seconds of the decompositions while an adapter is loaded, and of the matrix products that they need."""

    def __init__(self) -> None:
        self.decompositions = self.products = 0.0

    @contextmanager
    def watching(self) -> Iterator[None]:
        """Time each decomposition in the context, and after it its products."""
        once = compact.outer_factors

        def factors(layer: NoraLayer, adapter_name: str, *given: object, **more: object) -> tuple[torch.Tensor, torch.Tensor]:
            """The outer factors of `layer`."""
            seconds, result = timed(lambda: once(layer, adapter_name, *given, **more))
            self.decompositions += seconds
            self.products += timed(products(layer.get_base_layer().weight, layer.r[adapter_name]))[0]
            return result

        with mock.patch.object(compact, "outer_factors", factors):
            yield


def products(weight: torch.Tensor, rank: int) -> Callable[[], None]:
    """The matrix products of the decomposition of `weight` (m, n), in float64 and with random blocks."""
    matrix = weight.double()
    width, blocks = _krylov_size(matrix, rank)
    left, right = (torch.randn(width, size, dtype=torch.float64) for size in matrix.shape)

    def run() -> None:
        """All of them."""
        for _ in range(blocks):
            _ = left @ matrix, right @ matrix.T

    return run


def timed(call: Callable[[], object]) -> tuple[float, object]:
    """The seconds of a call, and its result."""
    start = time.perf_counter()
    result = call()
    return time.perf_counter() - start, result


def folder_bytes(folder: Path) -> int:
    """The size of all files in `folder`."""
    return sum(file.stat().st_size for file in folder.rglob("*") if file.is_file())


def compare_with_lora(base: nn.Module, rank: int, folder: Path) -> str:
    """A LoRA of `rank` on the same layers: its size in float16, and the seconds that PEFT takes to load it."""
    config = LoraConfig(r=rank, lora_alpha=rank, target_modules=ATTENTION)
    state = get_peft_model_state_dict(inject_adapter_in_model(config, base))
    folder.mkdir()
    save_file({name: tensor.half().contiguous() for name, tensor in state.items()}, folder / "lora.safetensors")

    def load() -> None:
        """Onto a second adapter of the same layers."""
        inject_adapter_in_model(config, base, "loaded")
        set_peft_model_state_dict(base, load_file(folder / "lora.safetensors"), "loaded")

    return f"LoRA of rank {rank} in float16: {folder_bytes(folder):,} bytes, loaded in {timed(load)[0]:.1f} s"


def measure_load(base: nn.Module, folder: Path, collected: ActivationStatistics, expected: dict[str, torch.Tensor]) -> None:
    """Load the adapter in `folder` onto `base`, compare it with the `expected` tensors, and print the times."""
    watch = Timed()
    with watch.watching():
        seconds, _ = timed(partial(load_adapter, base, folder, base_calibration=lambda layers: collected))
    loaded = adapter_tensors(base, "default")
    same = all(torch.equal(loaded[name], tensor) for name, tensor in expected.items())
    print(f"  loaded in {seconds - watch.products:.1f} s, equal to the bit: {same}")
    print(f"  of which decompositions {watch.decompositions:.1f} s, their products alone {watch.products:.1f} s: ", end="")
    print(f"{watch.decompositions / watch.products:.2f} times")


def main() -> None:
    """Print sizes and times."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--r", type=int, default=16, help="outer rank")
    parser.add_argument("--inner_r", type=int, default=4)
    parser.add_argument("--dtype", choices=DTYPES, default="float32", help="of the base weights")
    parser.add_argument("--layers", type=int, help="only so many layers")
    options = parser.parse_args()
    shapes = dict(list(attention_shapes().items())[: options.layers])
    with tempfile.TemporaryDirectory() as temporary, torch.no_grad():
        folder, model = Path(temporary), attention_layers(shapes, DTYPES[options.dtype])
        collected = trained(model, options.r, options.inner_r)
        print(f"{len(shapes)} layers, NoRA {options.r}/{options.inner_r}, {options.dtype}, {torch.get_num_threads()} threads")
        save_adapter(model, folder / "full")
        print(f"  full: {folder_bytes(folder / 'full'):,} bytes")
        for inner_dtype in ("float32", "float16", "int8"):
            round_inner_factors(model, inner_dtype)
            save_adapter(model, folder / inner_dtype, compact=True)
            print(f"  compact, base calibration, {inner_dtype}: {folder_bytes(folder / inner_dtype):,} bytes")
        expected = {name: tensor.clone() for name, tensor in adapter_tensors(model, "default").items()}
        measure_load(without_adapter(model), folder / "int8", collected, expected)
        print(f"  {compare_with_lora(without_adapter(model), options.inner_r, folder / 'lora')}")


if __name__ == "__main__":
    main()
