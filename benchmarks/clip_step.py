"""Check all exports of an adapted true-size CLIP with random weights, and compare a training step of NoRA with one of LoRA.

    python benchmarks/clip_step.py

After one training step the model is merged, repacked, exported and loaded again; the benchmark fails if an export computes other
features than the adapted model. LoRA has rank 2 on q, k and v of both encoders, as in CLIP-LoRA; NoRA, on v, has a tenth of its
parameters. Both have the optimisers that the recipe gives them, and take turns in one process.
"""

# ruff: noqa: T201 - a benchmark prints its results
import argparse
import copy
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

import torch
from adapter_step import medians_in_turns, saved_bytes, timed
from torch import nn

from pipelines import adapter_files
from pipelines.adapter_method import trained_parameters
from pipelines.adapter_options import AdapterOptions
from pipelines.clip import Clip, load_clip
from pipelines.fewshot import adapters, export
from pipelines.fewshot.target_layers import TargetLayers
from pipelines.methods import method_named
from pipelines.optimizers import OptimizerSettings

# Largest difference of features of length 1, in single precision.
TOLERANCE = 1e-5
CLASSES = (
    "cat",
    "dog",
    "teapot",
    "sailing boat",
    "traffic light",
    "maple leaf",
    "street lamp",
    "violin",
    "zebra",
    "red brick wall",
)


class Task:
    """A training task: one adapter on a copy of the model, with its data and optimizer."""

    def __init__(
        self, clip: Clip, options: AdapterOptions, pixels: torch.Tensor, labels: torch.Tensor, cache: Path, is_bf16: bool = False
    ) -> None:
        self.clip = Clip(copy.deepcopy(clip.model), clip.preprocess, clip.tokenizer, clip.name)
        self.pixels, self.labels, self.is_bf16 = pixels, labels, is_bf16
        self.tokens = clip.tokenizer([f"a photo of a {name}." for name in CLASSES])
        self.components = adapters.attach(self.clip, options, TargetLayers())
        began = time.perf_counter()
        adapters.start(self.clip, options, self.components, [pixels], self.tokens, cache, seed=0)
        self.initialisation_seconds = time.perf_counter() - began
        settings = OptimizerSettings(method_named(options.method).defaults("few-shot", built_in=False).optimizer)
        self.optimizer = settings.optimizer([{"params": trained_parameters(self.components), "lr": 1e-3}])

    @property
    def num_trainable_parameters(self) -> int:
        """The number of trainable parameters of the adapter."""
        return sum(parameter.numel() for parameter in trained_parameters(self.components))

    def loss(self) -> torch.Tensor:
        """The cross-entropy of the images over the class prompts: ()."""
        with torch.autocast(self.pixels.device.type, torch.bfloat16, enabled=self.is_bf16):
            logits = self.clip.logit_scale * self.clip.encode_images(self.pixels) @ self.clip.encode_texts(self.tokens).T
            return nn.functional.cross_entropy(logits, self.labels)

    def step(self) -> float:
        """One training step; returns its seconds."""
        return timed(self._step)

    def _step(self) -> None:
        self.loss().backward()
        self.optimizer.step()
        self.optimizer.zero_grad()

    @torch.no_grad()
    def features(self, clip: Clip) -> torch.Tensor:
        """The features of the images and prompts by `clip`: (images + classes, d)."""
        return torch.cat([clip.encode_images(self.pixels), clip.encode_texts(self.tokens)]).cpu()


def round_trip(task: Task, base: Clip, options: argparse.Namespace, folder: Path) -> dict[str, float]:
    """The largest difference of a feature from that of the adapted model, by export.

    Raises: ValueError naming the export that differs, or whose state dict has other keys.
    """
    expected, name = task.features(task.clip), "merged.safetensors"
    merged = export.merged(task.clip)
    export.save_merged(task.clip, folder / name)
    adapter_files.save(task.components, folder / "adapter")
    native = Clip(copy.deepcopy(base.model), None, base.tokenizer, base.name)
    adapters.load(native, folder / "adapter" / "full")
    forms = {
        "merged and repacked": merged,
        "checkpoint": load_clip(options.model, str(folder / name), options.device),
        "native files": native,
    }
    differences = {form: (task.features(clip) - expected).abs().max().item() for form, clip in forms.items()}
    if list(merged.model.state_dict()) != list(base.model.state_dict()):
        raise ValueError("The merged state dict must have the keys of the base model, but has others.")
    differences["weights of the checkpoint"] = _largest_difference(forms["checkpoint"].model, merged.model)
    for format in options.formats:
        files = export.save_exported(task.clip, folder, task.tokens[:2], format)
        inputs = ((files["image"], task.pixels.cpu()), (files["text"], task.tokens))
        exported = torch.cat([export.run_exported(file, values) for file, values in inputs])
        differences[f"exported to {format}"] = (exported - expected).abs().max().item()
    wrong = [form for form, difference in differences.items() if not difference <= TOLERANCE]
    if wrong:
        raise ValueError(
            f"Features must differ by at most {TOLERANCE} from the adapted model; {', '.join(wrong)} differ more: {differences}."
        )
    return differences


def _largest_difference(first: nn.Module, second: nn.Module) -> float:
    pairs = zip(first.state_dict().values(), second.state_dict().values(), strict=True)
    return max((one.cpu() - other.cpu()).abs().max().item() for one, other in pairs)


def tasks_on(base: Clip, options: argparse.Namespace, folder: Path) -> dict[str, Task]:
    """The tasks of both adapters on random images; statistics are cached in `folder`."""
    pixels = torch.randn(options.batch_size, 3, *base.model.visual.image_size, device=options.device)
    labels = torch.arange(options.batch_size, device=options.device) % len(CLASSES)
    adapted = {
        "NoRA": AdapterOptions(method="nora", rank=options.rank, inner_r=options.inner_r),
        "LoRA": AdapterOptions(method="lora", rank=options.lora_rank),
    }
    is_bf16 = options.mixed_precision == "bf16"
    return {name: Task(base, method, pixels, labels, folder / name, is_bf16) for name, method in adapted.items()}


def parsed(arguments: Sequence[str] | None) -> argparse.Namespace:
    """The command-line options."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--model", default="ViT-B-16", help="a name that open_clip knows; its weights are random")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--mixed_precision", choices=["no", "bf16"], default="no", help="precision of the training steps")
    parser.add_argument("--batch_size", type=int, default=4, help="images a step")
    parser.add_argument("--steps", type=int, default=5)
    parser.add_argument("--rank", type=int, default=48, help="outer rank of NoRA")
    parser.add_argument("--inner_r", type=int, default=8)
    parser.add_argument("--lora_rank", type=int, default=2)
    parser.add_argument("--formats", nargs="*", choices=["torch", "onnx"], default=["torch", "onnx"])
    return parser.parse_args(arguments)


def main(arguments: Sequence[str] | None = None) -> None:
    """Print the differences of the exports and the comparison of the steps."""
    options = parsed(arguments)
    torch.manual_seed(0)
    base = load_clip(options.model, "random", options.device)
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        tasks = tasks_on(base, options, folder)
        tasks["NoRA"].step()
        weights = sum(parameter.numel() for parameter in base.model.parameters())
        print(f"{options.model}, {weights / 1e6:.0f} M random weights, after one step; largest difference of a feature:")
        for form, difference in round_trip(tasks["NoRA"], base, options, folder).items():
            print(f"  {form}: {difference:.1e}")
        saved = {name: saved_bytes(task.clip.model, task.loss) for name, task in tasks.items()}
        seconds = medians_in_turns({name: task.step for name, task in tasks.items()}, options.steps)
    setting = f"{options.batch_size} images, {len(CLASSES)} prompts, {options.device}, medians of {options.steps}"
    print(f"A training step ({setting}):")
    for name, task in tasks.items():
        print(
            f"  {name}: {task.num_trainable_parameters} trainable parameters, {seconds[name] * 1e3:.0f} ms, "
            f"{saved[name] / 2**20:.1f} MiB saved for backward, initialised in {task.initialisation_seconds:.1f} s"
        )
    ratio = tasks["LoRA"].num_trainable_parameters / tasks["NoRA"].num_trainable_parameters
    time_ratio, memory_ratio = (each["NoRA"] / each["LoRA"] for each in (seconds, saved))
    costs = f"time {time_ratio:.3f} and memory {memory_ratio:.3f} of LoRA's"
    print(f"  NoRA trains {ratio:.1f} times fewer parameters; {costs}")


if __name__ == "__main__":
    main()
