"""Adapters of an SDXL pipeline: attaching, initialising, saving, exporting and loading them.

The methods come from `pipelines.methods`.
"""

from __future__ import annotations

import logging
import shutil
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from pathlib import Path
from types import MappingProxyType

from diffusers import StableDiffusionXLPipeline
from torch import nn

from nora_vision import sdxl_calibration
from nora_vision.approximation import LeftOut
from nora_vision.calibration import BaseCalibration
from nora_vision.export import NO_METADATA, export_both
from pipelines import adapter_files
from pipelines.adapter_files import native_folder
from pipelines.adapter_method import ADAPTER_NAME, Losses, Probe, no_losses
from pipelines.adapter_options import AdapterOptions
from pipelines.errors import InputError
from pipelines.gradients import base_losses
from pipelines.methods import method_of
from pipelines.native_files import COMPACT, FULL
from pipelines.randomness import RandomStream, keyed_generator
from pipelines.subject.base_model import text_encoders_of
from pipelines.subject.lora_files import load_lora_file, resolve, verify
from pipelines.subject.target_layers import ATTENTION, TEXT_TARGETS

logger = logging.getLogger(__name__)
COMPONENTS = ("unet", "text_encoder", "text_encoder_2")
NO_ADAPTER = (
    "There is no adapter at {path!r}. Give a run directory, a native adapter folder, a folder saved by PEFT or diffusers, or a "
    ".safetensors file with LoRA weights."
)


def attach(pipeline: StableDiffusionXLPipeline, options: AdapterOptions, seed: int = 0) -> dict[str, nn.Module]:
    """Add the adapter that `options` describe; returns the adapted components by name.

    Args:
        seed: of the values that the method samples when it is added; `start` samples the others.
    Raises: InputError naming the layer or target if it does not fit the model.
    """
    method = options.create()
    targets = {"unet": (options.target_modules or ATTENTION, None)}
    if options.train_text_encoder:
        for name, encoder in zip(COMPONENTS[1:], text_encoders_of(pipeline), strict=True):
            targets[name] = (TEXT_TARGETS, _unused_layers(encoder))
    components = {name: getattr(pipeline, name) for name in targets}
    for index, (name, (included, excluded)) in enumerate(targets.items()):
        generator = keyed_generator(seed, RandomStream.ADAPTER, index)
        try:
            method.add(components[name], included, generator, exclude_modules=excluded)
        except ValueError as error:
            raise InputError(f"The adapter does not fit {name}: {error}") from error
    return components


def _unused_layers(encoder: nn.Module) -> str | None:
    """A pattern of the layers that SDXL does not use: the last one of the first text encoder; None for the second.

    SDXL conditions on the penultimate hidden states of both, and on the pooled output of the second.
    """
    if hasattr(encoder, "text_projection"):
        return None
    return rf".*layers\.{encoder.config.num_hidden_layers - 1}\..*"


def prepare_dry_run(options: AdapterOptions, components: dict[str, nn.Module]) -> bool:
    """Prepare the adapter that was just attached for a dry run before `start`; returns whether its method allows that."""
    method = options.create()
    return all(method.prepare_dry_run(model, ADAPTER_NAME) for model in components.values())


def start(
    options: AdapterOptions,
    components: dict[str, nn.Module],
    run_model: dict[str, Callable[[], None]],
    cache: Path,
    seed: int,
    losses: Losses = no_losses,
    base_calibration: Mapping[str, BaseCalibration] = MappingProxyType({}),
    unquantized: Path | None = None,
) -> None:
    """Initialise the adapter that was just attached to each component.

    Args:
        run_model: for each component, a function that runs the base model on the subject.
        cache: the folder for activation statistics.
        seed: of the initialisation.
        losses: `losses(count)` yields the training losses of `count` batches, for methods that are initialised from gradients.
        base_calibration: for each component, the statistics of the base model on fixed inputs.
        unquantized: the folder of `load_base_model`, for a quantised pipeline.
    """
    method, losses = options.create(), base_losses(losses, components.values())
    probes = {}
    for index, name in enumerate(components):
        generator = keyed_generator(seed, RandomStream.ADAPTER_START, index)
        weights = None if unquantized is None else unquantized / name
        files = cache / f"{name}.safetensors", base_calibration.get(name), weights
        probes[name] = Probe(run_model[name], losses, generator, *files)
    method.prepare_start(components, probes, ADAPTER_NAME)
    for name, model in components.items():
        method.start(model, probes[name], ADAPTER_NAME)


@contextmanager
def without_adapters(pipeline: StableDiffusionXLPipeline) -> Iterator[None]:
    """Disable the adapters of the pipeline and switch to evaluation mode within the context."""
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
    metadata: Mapping[str, str] = NO_METADATA,
) -> None:
    """Write the adapter to `folder` in its native layouts (`adapter/`), in diffusers' format and in kohya's.

    A kohya file of another title is removed: it is an earlier export of a run directory that has been renamed since. An adapter
    that is no change of weights has only the native layouts.

    Args:
        title: the name of the kohya file without its suffix.
        metadata: further entries of the headers of both LoRA files, such as "modelspec.title".
    """
    adapter_files.save(components, folder / "adapter", adapter_name)
    if not adapter_files.can_be_exported(components, adapter_name):
        return
    written = export_both(pipeline, folder / "diffusers", folder / "kohya" / f"{title}.safetensors", adapter_name, metadata)
    for path in written.values():
        if (left_out := LeftOut.read(path)) is not None:
            logger.warning(f"{path} is not exact: {left_out}. The files in {folder / 'adapter'} are exact.")
    kohya = written["kohya"]
    for earlier in set(kohya.parent.glob("*.safetensors")) - {kohya}:
        logger.info(f"Removing {earlier}, which {kohya.name} replaces.")
        earlier.unlink()


def save_small(components: dict[str, nn.Module], folder: Path) -> None:
    """Write only the smallest native layout of the adapter to `folder`: compact if the method has it, else full."""
    adapter_files.save(components, folder)
    if (folder / COMPACT).is_dir():
        shutil.rmtree(folder / FULL)


def load_adapter(pipeline: StableDiffusionXLPipeline, path: str | Path, adapter_name: str) -> list[str]:
    """Load an adapter: a run directory, a native folder, a folder saved by PEFT or diffusers, or a LoRA file of any program.

    Returns: sentences about the parts of a file that were ignored, and about adapters that this one should not be used with.
    Raises: InputError naming the path if there is no adapter or it does not fit the model; AdapterFileError if it is damaged or
        not safe to load. The pipeline is then without it.
    """
    path = Path(path)
    native = native_folder(path, COMPONENTS)
    if native is None:
        resolved = resolve(path)
        if resolved is None:
            raise InputError(NO_ADAPTER.format(path=str(path)))
        return load_lora_file(pipeline, resolved[0], adapter_name, resolved[1])
    components = {name: getattr(pipeline, name) for name in COMPONENTS if (native / name).is_dir()}
    if any(adapter_name in (getattr(model, "peft_config", None) or {}) for model in components.values()):
        raise InputError(f"The pipeline already has an adapter {adapter_name!r}. Delete it first or choose another name.")
    with ExitStack() as on_failure:
        on_failure.callback(pipeline.delete_adapters, [adapter_name])
        adapter_files.load(components, native, adapter_name, sdxl_calibration(pipeline))
        on_failure.pop_all()
    verify(pipeline, adapter_name, path)
    method = method_of(next(iter(components.values())).peft_config[adapter_name])
    return list(dict.fromkeys(sentence for model in components.values() for sentence in method.conflicts(model, adapter_name)))


def scale_warning(pipeline: StableDiffusionXLPipeline, adapter_name: str, scale: float) -> str | None:
    """What `scale` does to an adapter whose change cannot have any scale, as a sentence about "it"; None for the others."""
    if scale == 1 or allows_any_scale(pipeline, adapter_name):
        return None
    return (
        f"It has trained norms of rows, which have no scale: at {scale:g} only its low-rank part has it, and at 0 the images are "
        "not those of the base model. Leave it out for these."
    )


def allows_any_scale(pipeline: StableDiffusionXLPipeline, adapter_name: str) -> bool:
    """Whether the change of an adapter on the pipeline can have any scale, not only 1."""
    configs = [(getattr(getattr(pipeline, name), "peft_config", None) or {}).get(adapter_name) for name in COMPONENTS]
    return all(method_of(config).allows_any_scale(config) for config in configs if config is not None)
