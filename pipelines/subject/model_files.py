"""The files of an SDXL model: a folder, or the hub's cache, to which missing files are downloaded."""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from diffusers import StableDiffusionXLPipeline
from diffusers.loaders.single_file_utils import (
    DIFFUSERS_DEFAULT_PIPELINE_PATHS,
    fetch_diffusers_config,
    load_single_file_checkpoint,
)

from pipelines.errors import InputError
from pipelines.hub import HubModel, Lookup, fetch, fetch_file, fetching, files_below, is_hub_name, look_up

PIPELINE_CLASS = "StableDiffusionXLPipeline"
INDEX = "model_index.json"
PICKLES = (".ckpt", ".pt", ".pth", ".bin")
MODELS = ("unet", "vae", "text_encoder", "text_encoder_2")
# Weight files of diffusers and transformers, sharded or not; the variant is before or after the number of the shard.
WEIGHTS = re.compile(r"(?:diffusion_pytorch_model|model)(?:\.(\w+))?(?:-\d{5}-of-\d{5})?(?:\.(\w+))?\.safetensors")
CONFIGURATIONS = ("*.json", "*.txt", "*.model")


def pipeline_folder(name_or_path: str, revision: str | None, variant: str | None, **parts: Any) -> Path:
    """The folder of an SDXL model in diffusers' layout; a model on the hub is downloaded.

    Args:
        variant: of the weights, such as "fp16".
        parts: components that are loaded from elsewhere.
    Raises: InputError naming what is missing, and the remedy.
    """
    folder, wanted = Path(name_or_path), [name for name in MODELS if name not in parts]
    if folder.exists():
        _check_index(folder, name_or_path)
        _check_weights(name_or_path, files_below(folder), wanted, variant)
        return folder
    if not is_hub_name(name_or_path) or name_or_path.endswith(PICKLES):
        raise InputError(
            f"There is no model {name_or_path!r}. Give a folder with a {INDEX}, a .safetensors file, or a hub name "
            "such as 'owner/model'."
        )
    model = HubModel(name_or_path, revision, variant)
    lookup = _checked_lookup(model, wanted)
    arguments = {"revision": revision, "variant": variant, "use_safetensors": True, "local_files_only": lookup.from_cache}
    with fetching(model, lookup):
        return Path(StableDiffusionXLPipeline.download(name_or_path, **arguments, **parts))


def _checked_lookup(model: HubModel, wanted: Iterable[str]) -> Lookup:
    """Look up a model on the hub, and check that it is an SDXL model of diffusers with weights for the components `wanted`."""
    lookup = look_up(model, INDEX)
    if INDEX not in lookup.files:
        raise InputError(
            f"{model.name!r} is not a diffusers model: it has no {INDEX}. Give the hub name of one, such as "
            "'stabilityai/stable-diffusion-xl-base-1.0'."
        )
    _check_index(fetch_file(model, INDEX, lookup).parent, model.name)
    try:
        _check_weights(model.name, lookup.files, wanted, model.variant)
    except InputError as error:
        # The hub may have files that the cache lacks.
        raise lookup.unavailable or error from None
    return lookup


def autoencoder_folder(name_or_path: str) -> Path:
    """The folder of an autoencoder; one on the hub is downloaded.

    Raises: InputError naming it if there is none.
    """
    if Path(name_or_path).exists():
        return Path(name_or_path)
    option = "--pretrained_vae_model_name_or_path"
    if not is_hub_name(name_or_path):
        raise InputError(
            f"The autoencoder {name_or_path!r} could not be loaded: there is no such folder. Give {option} the hub name or "
            "folder of an AutoencoderKL."
        )
    model = HubModel(name_or_path, role="autoencoder", local=f"give {option} a folder")
    lookup = look_up(model, "config.json")
    weights = [file for file in lookup.files if WEIGHTS.fullmatch(file) and _variant_of(file) is None]
    if not weights:
        raise lookup.unavailable or InputError(
            f"The autoencoder {name_or_path!r} could not be loaded: it has no diffusion_pytorch_model.safetensors"
            f"{_pickles_among(lookup.files)}. Give the hub name or folder of an AutoencoderKL with .safetensors weights."
        )
    return fetch(model, ["config.json", "*.safetensors.index.json", *weights], lookup)


def configuration_folder(file: Path, name_or_path: str | None) -> Path:
    """The folder with the configuration and the tokenizers for a model in one file.

    Args:
        name_or_path: folder or hub name; None to choose it by the file's tensors, as diffusers does.
    Raises: InputError if it cannot be fetched.
    """
    option = "--single_file_config"
    if name_or_path is None:
        name_or_path = _default_configuration(file)
    if Path(name_or_path).is_dir():
        _check_index(Path(name_or_path), name_or_path)
        return Path(name_or_path)
    if not is_hub_name(name_or_path):
        raise InputError(f"There is no folder {name_or_path!r} for {option}. Give the folder or the hub name of an SDXL model.")
    local = f"give {option} the folder of an SDXL model, such as one that diffusers' save_pretrained wrote"
    model = HubModel(name_or_path, role="configuration", local=local)
    lookup = look_up(model, INDEX)
    folder = fetch(model, CONFIGURATIONS, lookup)
    _check_index(folder, name_or_path)
    return folder


def _default_configuration(file: Path) -> str:
    """The hub name of diffusers' configuration for a single SDXL file, by its tensors."""
    inferred = fetch_diffusers_config(load_single_file_checkpoint(str(file)))
    # diffusers takes unknown files for Stable Diffusion 1.5, but this file has SDXL's text encoders.
    defaults = DIFFUSERS_DEFAULT_PIPELINE_PATHS
    return (defaults["xl_base"] if inferred == defaults["v1"] else inferred)["pretrained_model_name_or_path"]


def _check_index(folder: Path, name: str) -> None:
    """Check that `folder`, called `name` in messages, holds an SDXL pipeline."""
    index = folder / INDEX
    if not index.is_file():
        raise InputError(
            f"{name!r} is not a diffusers model: it has no {INDEX}. Give the folder that holds unet/, vae/ and the others."
        )
    pipeline = json.loads(index.read_text(encoding="utf-8")).get("_class_name")
    if pipeline != PIPELINE_CLASS:
        raise InputError(f"{name!r} must hold a {PIPELINE_CLASS}, got {pipeline}. Only SDXL models can be adapted.")


def _variant_of(file: str) -> str | None:
    """The variant in the name of a weight file, such as "fp16"; None for a plain one."""
    match = WEIGHTS.fullmatch(file.rsplit("/", 1)[-1])
    return (match[1] or match[2]) if match else None


def _check_weights(name: str, files: Iterable[str], models: Iterable[str], variant: str | None) -> None:
    """Check that each of `models` has .safetensors weights, and that at least one has them in the variant.

    Raises: InputError naming the available variants.
    """
    by_model: dict[str, list[str]] = {model: [] for model in models}
    for file in files:
        model, _, rest = file.rpartition("/")
        if model in by_model:
            by_model[model].append(rest)
    variants = {model: {_variant_of(file) for file in names if WEIGHTS.fullmatch(file)} for model, names in by_model.items()}
    empty = next((model for model, available in variants.items() if not available), None)
    if empty is not None:
        raise InputError(
            f"The model {name!r} could not be loaded: {empty}/ has no .safetensors weights{_pickles_among(by_model[empty])}. "
            "Use a model that has them, or convert this one with diffusers' save_pretrained."
        )
    _check_variant(name, variants, variant)


def _check_variant(name: str, variants: Mapping[str, set[str | None]], variant: str | None) -> None:
    """Check that at least one model has weights in the variant, and that the others have weights without a variant."""
    available = set().union(*variants.values())
    if variant is not None and variant not in available:
        choices = filter(None, (_variant_flags(available), "no --variant" if None in available else ""))
        raise InputError(f"The model {name!r} has no files of the variant {variant!r}. Give {' or '.join(choices)}.")
    lacking = next((model for model, each in variants.items() if not each & {variant, None}), None)
    if lacking is not None:
        others = _variant_flags(variants[lacking])
        raise InputError(f"The model {name!r} could not be loaded: {lacking}/ has weights only in variants. Give {others}.")


def _variant_flags(variants: Iterable[str | None]) -> str:
    return " or ".join(f"--variant {each}" for each in sorted(set(variants) - {None}))


def _pickles_among(files: Iterable[str]) -> str:
    """A clause that names pickled weights, which are not opened; empty if there are none."""
    pickles = sorted(file for file in files if file.endswith(PICKLES))
    return f", only pickles such as {pickles[0]}, which can run programs when they are read" if pickles else ""
