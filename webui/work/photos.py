"""The results of the image checks, and the images as the model sees them."""

from __future__ import annotations

import base64
import functools
import io
import json
from dataclasses import dataclass
from pathlib import Path

from PIL import Image
from transformers import CLIPTokenizer

from pipelines.buckets import AUTOMATIC, automatic_buckets, nearest_bucket, parse_buckets
from pipelines.built_in import model_path
from pipelines.images import read_image_with_notes
from pipelines.subject.data import image_size, preprocess
from pipelines.subject.encoding import CropConfig
from pipelines.subject.image_checks import Finding, check_images
from pipelines.subject.prompt_length import long_prompts
from training.options import SubjectOptions
from webui.datasets import Dataset, DatasetImage

# Assumed for models that are not on this machine.
SDXL_RESOLUTION, SDXL_MULTIPLE = 1024, 32
# Advice for users of the page, by the kind of finding; all other advice is that of the command line.
ADVICE = {
    "extreme_shape": "Crop it to the subject, or set aspect ratio buckets in the expert settings under Check.",
    "small": "Use a larger one, or a lower resolution in the expert settings under Check.",
    "tiny": "Use a larger one: at least 64 pixels on its shorter side, better several hundred.",
}


@dataclass(frozen=True)
class CheckedImage:
    """The result of the checks of one image: a verdict, one of `webui.cards.CHIPS`, and a sentence per finding."""

    verdict: str
    sentences: tuple[str, ...]


@dataclass(frozen=True)
class CheckedImages:
    """The results of the image checks by file, and sentences about the whole dataset."""

    images: dict[str, CheckedImage]
    together: tuple[str, ...]


def checked_images(images: Dataset) -> CheckedImages:
    """The results of the image checks, cached until an image changes.

    Raises: InputError if no image can be used.
    """
    return _checked_images(images, tuple(sorted(images.signature())))


@functools.lru_cache(maxsize=64)
def _checked_images(images: Dataset, signature: tuple[str, ...]) -> CheckedImages:
    report, names = check_images(images.folder), _Names(images.folder, images.photos())
    findings = {
        diagnosis.path.name: CheckedImage(diagnosis.verdict, tuple(map(names.sentence, diagnosis.findings)))
        for diagnosis in report.images
    }
    return CheckedImages(findings, (*map(names.sentence, report.findings), *report.warnings()))


@dataclass(frozen=True)
class _Names:
    """Replaces the generated file names in findings by the user's names.

    Args:
        folder: the folder of the dataset.
        entries: its images.
    """

    folder: Path
    entries: list[DatasetImage]

    def sentence(self, finding: Finding) -> str:
        words = finding.words.replace(repr(self.folder.name.replace("_", " ")), "your subject")
        for entry in self.entries:
            words = words.replace(repr(entry.file), f"“{entry.name}”")
        return f"{words} {ADVICE.get(finding.kind, finding.advice)}"


@dataclass(frozen=True)
class Crop:
    """An image as the model sees it.

    Args:
        address: the first variant as a data URL.
        size: the height and width that the model sees, in pixels.
        variants: the number of crops and mirror images of this image.
    """

    address: str
    size: tuple[int, int]
    variants: int


def crops(images: Dataset, options: SubjectOptions) -> list[Crop]:
    """Each image as the model sees it in training with `options`.

    Raises: InputError if an image or a size cannot be used.
    """
    crop_config = _crop_config(options)
    return [_crop(path, path.stat().st_mtime_ns, position, crop_config) for position, path in enumerate(images.files())]


def long_prompts_of(images: Dataset, options: SubjectOptions) -> list[str]:
    """A sentence for each prompt or caption that is truncated; none if the model's tokenizers are not on this machine."""
    data = options.data
    prompts = dict.fromkeys(options.output.validation_prompt, "validation prompt")
    if data.with_prior_preservation and data.class_prompt:
        prompts[data.class_prompt] = "class prompt"
    prompts |= dict.fromkeys(data.subject_prompts(), "instance prompt")
    captions = [(Path(entry.name), entry.caption) for entry in images.photos() if entry.caption]
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


def _crop_config(options: SubjectOptions) -> CropConfig:
    data = options.data
    resolution, multiple = _resolution_of_model(options.model.pretrained_model_name_or_path)
    resolution = data.resolution or resolution
    sizes: tuple[tuple[int, int], ...] = ((resolution, resolution),)
    if data.aspect_ratio_buckets is not None:
        text = data.aspect_ratio_buckets.strip()
        sizes = automatic_buckets(resolution, multiple) if text == AUTOMATIC else parse_buckets(text, multiple)
    crops = 0 if data.center_crop else data.crops_per_image
    return CropConfig(sizes, crops, data.random_flip, data.size_conditioning, options.optimisation.seed)


def _resolution_of_model(name_or_path: str) -> tuple[int, int]:
    """The resolution of a model in pixels, and the number of which an image's sides must be multiples."""
    files = [Path(model_path(name_or_path)) / part / "config.json" for part in ("unet", "vae")]
    if not all(path.is_file() for path in files):
        return SDXL_RESOLUTION, SDXL_MULTIPLE
    unet, vae = (json.loads(path.read_text(encoding="utf-8")) for path in files)
    factor = 2 ** (len(vae["block_out_channels"]) - 1)
    return unet["sample_size"] * factor, factor * 2 ** (len(unet["block_out_channels"]) - 1)


@functools.lru_cache(maxsize=256)
def _crop(path: Path, changed: int, position: int, crop_config: CropConfig) -> Crop:
    variants = crop_config.crop_variants(position, nearest_bucket(image_size(path), crop_config.sizes))
    pixels = preprocess(path, read_image_with_notes(path).image, variants[0]).pixels
    preview = Image.fromarray(((pixels.permute(1, 2, 0) + 1) * 127.5).round().byte().numpy())
    size = (preview.height, preview.width)
    preview.thumbnail((384, 384))
    stream = io.BytesIO()
    preview.save(stream, "PNG")
    # A data URL, so that the server stores no file for each setting that is tried.
    address = f"data:image/png;base64,{base64.b64encode(stream.getvalue()).decode()}"
    return Crop(address, size, len(variants))
