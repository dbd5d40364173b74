"""Adapters on an SDXL pipeline: putting one on, starting it, saving, exporting and loading it.

Methods come from `pipelines.methods`.
"""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from diffusers import StableDiffusionXLPipeline
from torch import nn

from nora_vision import export_lora
from pipelines import adapter_files
from pipelines.adapter_files import native_folder
from pipelines.adapter_method import ADAPTER_NAME, COMPACT, FULL, Losses, Probe, base_losses, no_losses
from pipelines.adapter_options import AdapterOptions
from pipelines.errors import InputError
from pipelines.randomness import RandomStream, keyed_generator
from pipelines.subject.base_model import text_encoders_of
from pipelines.subject.lora_files import load_lora_file, resolve, verify
from pipelines.subject.target_layers import ATTENTION, TEXT_TARGETS

COMPONENTS = ("unet", "text_encoder", "text_encoder_2")
NO_ADAPTER = (
    "There is no adapter at {path!r}. Give a run's directory, a native adapter folder, a folder of PEFT or diffusers, or a "
    ".safetensors file of LoRA weights."
)


def attach(pipeline: StableDiffusionXLPipeline, options: AdapterOptions) -> dict[str, nn.Module]:
    """Add the adapter that `options` describe; returns the adapted components by name.

    Raises: InputError naming the layer or target if it does not fit the model.
    """
    method = options.create()
    configs = {"unet": method.config(options.target_modules or ATTENTION)}
    if options.train_text_encoder:
        for name, encoder in zip(COMPONENTS[1:], text_encoders_of(pipeline), strict=True):
            configs[name] = method.config(TEXT_TARGETS, _unread_layers(encoder))
    components = {name: getattr(pipeline, name) for name in configs}
    for name, config in configs.items():
        try:
            method.attach(components[name], config, ADAPTER_NAME)
        except ValueError as error:
            raise InputError(f"The adapter does not fit {name}: {error}") from error
    return components


def _unread_layers(encoder: nn.Module) -> str | None:
    """What to leave out of a text encoder: SDXL reads its last but one hidden states; only the second's last layer counts."""
    if hasattr(encoder, "text_projection"):
        return None
    return rf".*layers\.{encoder.config.num_hidden_layers - 1}\..*"


def start(
    options: AdapterOptions,
    components: dict[str, nn.Module],
    run_model: dict[str, Callable[[], None]],
    cache: Path,
    seed: int,
    losses: Losses = no_losses,
) -> None:
    """Start the adapter just attached to each component.

    Args:
        run_model: for each component, runs the base model on the subject.
        cache: the folder for activation statistics.
        seed: of all that is random in the start.
        losses: `losses(count)` yields the training losses of `count` batches, for methods that start from gradients.
    """
    method, losses = options.create(), base_losses(losses, components.values())
    for index, (name, model) in enumerate(components.items()):
        generator = keyed_generator(seed, RandomStream.ADAPTER_START, index)
        method.start(model, Probe(run_model[name], losses, generator, cache / f"{name}.safetensors"), ADAPTER_NAME)


@contextmanager
def without_adapters(pipeline: StableDiffusionXLPipeline) -> Iterator[None]:
    """Have the pipeline be its base model meanwhile, in evaluation mode."""
    parts = [part for part in (pipeline.unet, *text_encoders_of(pipeline)) if getattr(part, "peft_config", None)]
    modes = {part: part.training for part in (pipeline.unet, *text_encoders_of(pipeline))}
    trained = [parameter for part in parts for parameter in part.parameters() if parameter.requires_grad]
    for part in modes:
        part.eval()
    for part in parts:
        part.disable_adapters()
    try:
        yield
    finally:
        for part in parts:
            part.enable_adapters()
        for part, training in modes.items():
            part.train(training)
        for parameter in trained:
            parameter.requires_grad_(True)


def save_everywhere(
    pipeline: StableDiffusionXLPipeline,
    components: dict[str, nn.Module],
    folder: Path,
    title: str,
    adapter_name: str = ADAPTER_NAME,
) -> None:
    """Write the adapter under `folder` in its native layouts (`adapter/`), for diffusers and in kohya's format."""
    adapter_files.save(components, folder / "adapter", adapter_name)
    export_lora(pipeline, folder / "diffusers", adapter_name, format="diffusers")
    export_lora(pipeline, folder / "kohya" / f"{title}.safetensors", adapter_name, format="kohya")


def save_small(components: dict[str, nn.Module], folder: Path) -> None:
    """Write the adapter's smallest native layout under `folder`, alone: compact where the method has that, else full."""
    adapter_files.save(components, folder)
    if (folder / COMPACT).is_dir():
        shutil.rmtree(folder / FULL)


def load_adapter(pipeline: StableDiffusionXLPipeline, path: str | Path, adapter_name: str) -> list[str]:
    """Load an adapter: a run's directory, a native folder, a folder of PEFT or diffusers, or a LoRA file of any program.

    Returns: what of a file was left out, in sentences.
    Raises: InputError naming the path if there is no adapter, or none of this model; AdapterFileError if it must not be used.
    """
    path = Path(path)
    native = native_folder(path, COMPONENTS)
    if native is None:
        resolved = resolve(path)
        if resolved is None:
            raise InputError(NO_ADAPTER.format(path=str(path)))
        return load_lora_file(pipeline, resolved[0], adapter_name, resolved[1])
    components = {name: getattr(pipeline, name) for name in COMPONENTS if (native / name).is_dir()}
    adapter_files.load(components, native, adapter_name)
    verify(pipeline, adapter_name, path)
    return []
