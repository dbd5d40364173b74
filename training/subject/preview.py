"""What training will make of images and prompts, before the model is loaded: the crops, and prompts that are truncated."""

from __future__ import annotations

import functools
import json
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

from PIL import Image
from transformers import CLIPTokenizer

from pipelines.buckets import nearest_bucket
from pipelines.built_in import model_path
from pipelines.images import read_image_with_notes
from pipelines.subject.data import image_size, preprocess
from pipelines.subject.encoding import CropConfig
from pipelines.subject.prompt_length import long_prompts
from training.options import SubjectOptions
from training.subject.preparing import crop_config_for

# Assumed for models that are not on this machine.
SDXL_RESOLUTION, SDXL_MULTIPLE = 1024, 32


@dataclass(frozen=True)
class CropPreview:
    """An image as the model sees it.

    Args:
        image: the first variant.
        variants: the number of crops and mirror images.
    """

    image: Image.Image
    variants: int


def crop_previews(files: Sequence[Path], options: SubjectOptions) -> list[CropPreview]:
    """Each image as the model sees it in training with `options`.

    Raises: InputError if an image or a size cannot be used.
    """
    resolution, multiple = _resolution_of_model(options.model.pretrained_model_name_or_path)
    crop_config = crop_config_for(multiple, options.data, options.data.resolution or resolution, options.optimisation.seed)
    return [_preview(file, file.stat().st_mtime_ns, position, crop_config) for position, file in enumerate(files)]


@functools.lru_cache(maxsize=256)
def _preview(file: Path, changed: int, position: int, crop_config: CropConfig) -> CropPreview:
    variants = crop_config.crop_variants(position, nearest_bucket(image_size(file), crop_config.sizes))
    pixels = preprocess(file, read_image_with_notes(file).image, variants[0]).pixels
    image = Image.fromarray(((pixels.permute(1, 2, 0) + 1) * 127.5).round().byte().numpy())
    return CropPreview(image, len(variants))


def _resolution_of_model(name_or_path: str) -> tuple[int, int]:
    """The resolution of a model in pixels, and the number of which an image's sides must be multiples."""
    files = [Path(model_path(name_or_path)) / part / "config.json" for part in ("unet", "vae")]
    if not all(path.is_file() for path in files):
        return SDXL_RESOLUTION, SDXL_MULTIPLE
    unet, vae = (json.loads(path.read_text(encoding="utf-8")) for path in files)
    factor = 2 ** (len(vae["block_out_channels"]) - 1)
    return unet["sample_size"] * factor, factor * 2 ** (len(unet["block_out_channels"]) - 1)


def truncated_prompts(options: SubjectOptions, captions: Iterable[tuple[Path, str]]) -> list[str]:
    """A sentence for each prompt or caption that is truncated; none if the model's tokenizers are not on this machine.

    Args:
        captions: the images that have a caption, and the caption.
    """
    data = options.data
    prompts = dict.fromkeys(options.output.validation_prompt, "validation prompt")
    if data.with_prior_preservation and data.class_prompt:
        prompts[data.class_prompt] = "class prompt"
    prompts |= dict.fromkeys(data.subject_prompts(), "instance prompt")
    tokenizers = _tokenizers(model_path(options.model.pretrained_model_name_or_path))
    return [prompt.summary() for prompt in long_prompts(tokenizers, prompts, captions)]


@functools.lru_cache(maxsize=8)
def _tokenizers(name_or_path: str) -> tuple[CLIPTokenizer, ...]:
    """The tokenizers of a model in a folder or in the Hub's cache; empty for any other model."""
    if Path(name_or_path).is_file():
        return ()
    folders = ("tokenizer", "tokenizer_2")
    try:
        return tuple(CLIPTokenizer.from_pretrained(name_or_path, subfolder=name, local_files_only=True) for name in folders)
    except OSError:
        return ()
