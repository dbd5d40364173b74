"""Adapters on a CLIP model: attaching, initialising, scaling and loading.

Methods come from `pipelines.methods`. An adapter can be on the image encoder, the text encoder, or both.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from functools import partial
from pathlib import Path

import torch
from peft import PeftConfig
from torch import nn

from pipelines import adapter_files
from pipelines.adapter_files import native_folder
from pipelines.adapter_method import ADAPTER_NAME, Losses, Probe, no_losses, tuner_layers
from pipelines.adapter_options import AdapterOptions
from pipelines.clip import Clip, evaluating
from pipelines.clip_attention import attention_layers, separate
from pipelines.errors import InputError
from pipelines.fewshot.calibration import clip_calibration
from pipelines.fewshot.target_layers import ENCODERS, IMAGE, TEXT, TargetLayers
from pipelines.gradients import base_losses
from pipelines.methods import method_of
from pipelines.randomness import RandomStream, keyed_generator

BATCH = 64


def attach(clip: Clip, options: AdapterOptions, targets: TargetLayers, seed: int = 0) -> dict[str, nn.Module]:
    """Split the attention of `clip` into single projections and add the adapter of `options` to the target layers.

    Args:
        seed: of the values that the method samples when it is added; `start` samples the others.
    Returns: the adapted encoders by name, "image" and "text".
    Raises: InputError naming the encoder and the layer or option that do not fit.
    """
    try:
        separate(clip.model)
    except ValueError as error:
        raise InputError(f"{clip.name} cannot be adapted: {error}") from error
    method = options.create()
    projections = targets.projections_of(options.method)
    names_of = {name: _layer_names(clip, name, targets, projections) for name in ENCODERS[targets.encoders]}
    components = {name: encoder(clip, name) for name in names_of}
    for index, (name, names) in enumerate(names_of.items()):
        try:
            method.add(components[name], names, keyed_generator(seed, RandomStream.ADAPTER, index))
        except ValueError as error:
            raise InputError(f"The adapter does not fit the {name} encoder of {clip.name}: {error}") from error
    return components


def encoder(clip: Clip, name: str) -> nn.Module:
    """The module with all attention layers of the encoder `name`, "image" or "text"."""
    return clip.model.visual if name == IMAGE else getattr(clip.text_tower, "transformer", clip.text_tower)


def _layer_names(clip: Clip, name: str, targets: TargetLayers, projections: Sequence[str]) -> list[str]:
    layers = attention_layers(encoder(clip, name))
    if not layers:
        raise InputError(
            f"The {name} encoder of {clip.name} has no attention layers that can be adapted. Set --encoders to the other encoder."
        )
    return [layers[index][projection] for index in targets.indices(len(layers)) for projection in projections]


def start(
    clip: Clip,
    options: AdapterOptions,
    components: dict[str, nn.Module],
    pixels: Iterable[torch.Tensor],
    tokens: torch.Tensor,
    cache: Path,
    seed: int,
    losses: Losses = no_losses,
    unquantized: Path | None = None,
) -> None:
    """Initialise the adapter that was just attached to `components`.

    The method runs the base model, in evaluation mode, on these images and prompts.

    Args:
        pixels: batches (n, 3, h, w) of the training images without augmentation; iterated over once for each calibration pass.
        tokens: (n, t), every prompt of every class.
        cache: the folder for activation statistics.
        seed: of the random initialisation.
        losses: `losses(count)` yields the training losses of `count` batches, for methods that are initialised from gradients.
        unquantized: the folder of `quantized`, for a quantised model.
    """
    runs = {IMAGE: partial(_run_images, clip, pixels), TEXT: partial(run_prompts, clip, tokens)}
    method, losses = options.create(), base_losses(losses, components.values())
    fixed = clip_calibration(clip, components)
    probes = {}
    for index, name in enumerate(components):
        forward = partial(_in_evaluation, clip.model, runs[name])
        generator = keyed_generator(seed, 2, index)
        weights = None if unquantized is None or not method.uses_unquantized_weights else unquantized / name
        probes[name] = Probe(forward, losses, generator, cache / f"{name}.safetensors", fixed[name], weights)
    method.prepare_start(components, probes, ADAPTER_NAME)
    for name, model in components.items():
        method.start(model, probes[name], ADAPTER_NAME)


def _in_evaluation(model: nn.Module, run: Callable[[], None]) -> None:
    with evaluating(model):
        run()


def _run_images(clip: Clip, pixels: Iterable[torch.Tensor]) -> None:
    for batch in pixels:
        clip.encode_images(batch)


def run_prompts(clip: Clip, tokens: torch.Tensor) -> None:
    """Encode `tokens` (n, t), grouped by length, so that no layer sees padding.

    If tokens after the end token have an effect (see `Clip.reads_up_to_the_end_token`), the padding is encoded too.
    """
    if not clip.reads_up_to_the_end_token:
        groups = [tokens]
    else:
        ends = clip.end_positions(tokens)
        groups = [tokens[ends == end] for end in ends.unique()]
    for group in groups:
        for batch in group.split(BATCH):
            clip.encode_texts(batch)


def allows_any_scale(components: dict[str, nn.Module]) -> bool:
    """Whether the adapter's weight change can have any scale, not only 0 and 1."""
    return all(method_of(config).allows_any_scale(config) for config in _configs(components).values())


def set_scale(components: dict[str, nn.Module], scale: float) -> None:
    """Multiply the adapter's weight change by `scale`: 1 as trained, 0 exactly the base model.

    Raises: InputError if `scale` is not in [0, 1], or is between 0 and 1 and the method does not allow that.
    """
    if not 0 <= scale <= 1:
        raise InputError(f"scale must be in [0, 1], got {scale}.")
    if scale not in (0, 1) and not allows_any_scale(components):
        raise InputError(f"The weight change of this adapter cannot be scaled: scale must be 0 or 1, got {scale}.")
    for name, config in _configs(components).items():
        for layer in tuner_layers(components[name]).values():
            if layer.disable_adapters != (scale == 0):
                layer.enable_adapters(scale != 0)
        method_of(config).set_scale(components[name], ADAPTER_NAME, scale if scale else 1.0)


def _configs(components: dict[str, nn.Module]) -> dict[str, PeftConfig]:
    return {name: model.peft_config[ADAPTER_NAME] for name, model in components.items()}


def load(clip: Clip, path: str | Path) -> dict[str, nn.Module]:
    """Split the attention of `clip` into single projections and add the adapter saved at `path`.

    Args:
        path: a native adapter folder or a run's directory.

    Returns: the adapted encoders by name.
    Raises: InputError or AdapterFileError naming the file and the entry that do not fit the model.
    """
    folder = native_folder(Path(path), (IMAGE, TEXT))
    if folder is None:
        raise InputError(
            f"There is no adapter of a CLIP model at {str(path)!r}. Give a run's directory or a native adapter folder."
        )
    separate(clip.model)
    components = {name: encoder(clip, name) for name in (IMAGE, TEXT) if (folder / name).is_dir()}
    for name, model in components.items():
        try:
            adapter_files.load({name: model}, folder, base_calibration=clip_calibration(clip, components))
        except FileNotFoundError as error:
            raise InputError(f"{folder / name} is incomplete: {error}. Copy it again, or repeat the training.") from error
        except (RuntimeError, KeyError) as error:
            raise InputError(f"{folder / name} does not fit the {name} encoder of {clip.name}: {error}") from error
    return components
