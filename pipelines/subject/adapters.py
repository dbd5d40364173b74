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
from nora_vision.files import read_json
from pipelines.errors import InputError
from pipelines.methods import AdapterOptions, method_named
from pipelines.randomness import Draw, keyed_generator
from pipelines.subject.base_model import text_encoders_of
from pipelines.subject.lora_files import load_lora_file, resolve, verify

ADAPTER_NAME = "default"
COMPONENTS = ("unet", "text_encoder", "text_encoder_2")
ATTENTION = ["to_q", "to_k", "to_v", "to_out.0"]
EVERYWHERE = [*ATTENTION, "ff.net.0.proj", "ff.net.2", "proj_in", "proj_out", "conv1", "conv2"]
TEXT_TARGETS = ["q_proj", "k_proj", "v_proj", "out_proj"]
NO_ADAPTER = (
    "There is no adapter at {path!r}. Give a run's directory, a native adapter folder, a folder of PEFT or diffusers, or a "
    ".safetensors file of LoRA weights."
)


def attach(pipeline: StableDiffusionXLPipeline, options: AdapterOptions) -> dict[str, nn.Module]:
    """Add the adapter that `options` describe; returns the adapted components by name.

    Raises: InputError naming the layer or target if it does not fit the model.
    """
    method = method_named(options.method)
    configs = {"unet": method.config(options, options.target_modules or ATTENTION, None)}
    if options.train_text_encoder:
        for name, encoder in zip(COMPONENTS[1:], text_encoders_of(pipeline), strict=True):
            configs[name] = method.config(options, TEXT_TARGETS, _unread_layers(encoder))
    components = {name: getattr(pipeline, name) for name in configs}
    for name, config in configs.items():
        try:
            components[name].add_adapter(config, ADAPTER_NAME)
        except ValueError as error:
            raise InputError(f"The adapter does not fit {name}: {error}") from error
    return components


def _unread_layers(encoder: nn.Module) -> str | None:
    """What to leave out of a text encoder: SDXL reads its last but one hidden states; only the second's last layer counts."""
    if hasattr(encoder, "text_projection"):
        return None
    return rf".*layers\.{encoder.config.num_hidden_layers - 1}\..*"


def start(
    options: AdapterOptions, components: dict[str, nn.Module], run_model: dict[str, Callable[[], None]], cache: Path, seed: int
) -> None:
    """Start the adapter just attached to each component.

    Args:
        run_model: for each component, runs the base model on the subject.
        cache: the folder for activation statistics.
        seed: of all that is random in the start.
    """
    for place, (name, model) in enumerate(components.items()):
        method_named(options.method).start(
            model, run_model[name], ADAPTER_NAME, cache / f"{name}.safetensors", keyed_generator(seed, Draw.ADAPTER_START, place)
        )


def trained_parameters(components: dict[str, nn.Module]) -> list[nn.Parameter]:
    """The parameters that are trained."""
    return [parameter for model in components.values() for parameter in model.parameters() if parameter.requires_grad]


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
    options: AdapterOptions,
    components: dict[str, nn.Module],
    folder: Path,
    title: str,
    adapter_name: str = ADAPTER_NAME,
) -> None:
    """Write the adapter under `folder` in its native layouts (`adapter/`), for diffusers and in kohya's format."""
    method_named(options.method).save(components, folder / "adapter", adapter_name)
    export_lora(pipeline, folder / "diffusers", adapter_name, format="diffusers")
    export_lora(pipeline, folder / "kohya" / f"{title}.safetensors", adapter_name, format="kohya")


def save_small(options: AdapterOptions, components: dict[str, nn.Module], folder: Path) -> None:
    """Write the adapter's smallest native layout under `folder`, alone: compact where the method has that, else full."""
    method_named(options.method).save(components, folder, ADAPTER_NAME)
    if (folder / "compact").is_dir():
        shutil.rmtree(folder / "full")


def load_adapter(pipeline: StableDiffusionXLPipeline, path: str | Path, adapter_name: str) -> list[str]:
    """Load an adapter: a run's directory, a native folder, a folder of PEFT or diffusers, or a LoRA file of any program.

    Returns: what of a file was left out, in sentences.
    Raises: InputError naming the path if there is no adapter, or none of this model; AdapterFileError if it must not be used.
    """
    path = Path(path)
    native = _native_folder(path)
    if native is None:
        resolved = resolve(path)
        if resolved is None:
            raise InputError(NO_ADAPTER.format(path=str(path)))
        return load_lora_file(pipeline, resolved[0], adapter_name, resolved[1])
    components = {name: getattr(pipeline, name) for name in COMPONENTS if (native / name).is_dir()}
    for name, model in components.items():
        method = str(read_json(native / name / "adapter_config.json").get("peft_type")).lower()
        method_named(method).load({name: model}, native, adapter_name)
    verify(pipeline, adapter_name, path)
    return []


def native_folder(path: Path) -> Path:
    """The native adapter at `path`: itself, or the full one of a run's directory, or the compact one where it is alone.

    Raises: InputError if there is none.
    """
    folder = _native_folder(path)
    if folder is None:
        raise InputError(NO_ADAPTER.format(path=str(path)))
    return folder


def _native_folder(path: Path) -> Path | None:
    for folder in (path, path / "full", path / "adapter" / "full", path / "compact"):
        if any((folder / name / "adapter_config.json").is_file() for name in COMPONENTS):
            return folder
    return None
