"""Checks of a subject's images before training. No image is changed.

    python -m pipelines.subject.image_checks PHOTOS

Unreadable images are left out of training; every other problem is reported with a remedy.
"""

from __future__ import annotations

import itertools
import json
import sys
from collections.abc import Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass, field, replace
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image, ImageOps
from tqdm.auto import tqdm

from pipelines.errors import InputError
from pipelines.file_names import display_path
from pipelines.help_format import HelpFormatter
from pipelines.image_formats import UnsupportedFormatError
from pipelines.images import read_image_with_notes
from pipelines.lazy_modules import transformers
from pipelines.output_paths import check_output_file
from pipelines.subject.caption_files import read_captions
from pipelines.subject.folder_entries import FolderAccount
from pipelines.subject.folder_names import folder_name, name_of_subject
from pipelines.subject.folder_scan import images_of, scan_folder
from pipelines.subject.prompt_length import LongPrompt

MIN_SIDE, MAX_ASPECT_RATIO, MIN_IMAGES = 64, 3.0, 3
# Measured on 25 photos and renderings with a shorter side of 256: sharp ones have 840 or more, with a Gaussian blur of one
# pixel 50 to 180, and of two pixels at most 22.
SHARPNESS_SIDE, MIN_SHARPNESS = 256, 40.0
# Different images of one subject differ in at least 27 of the 128 bits, an image and its JPEG of quality 30 in at most 5.
HASH_SIDE, MAX_DUPLICATE_BITS = 8, 16
# Mean difference of 8 x 8 thumbnails: at least 0.13 for sets of real photos, 0.05 for crops of one photo.
MIN_VARIETY = 0.06
# A brighter copy differs by 0.09. Flat images have equal bits and are distinguished by their colours.
MAX_DUPLICATE_DIFFERENCE = 0.12


@dataclass(frozen=True)
class Finding:
    """A problem of an image or a set of images: `kind` is its identifier, `words` the description, `advice` the remedy."""

    kind: str
    words: str
    advice: str


@dataclass(frozen=True)
class Diagnosis:
    """The findings on one image.

    Args:
        path: its file.
        subject: the name of its subject.
        size: width and height in pixels, after EXIF rotation; None if it cannot be read.
        findings: its problems.
    """

    path: Path
    subject: str
    size: tuple[int, int] | None
    findings: tuple[Finding, ...] = ()

    @property
    def usable(self) -> bool:
        """Whether it can be trained on."""
        return self.size is not None

    @property
    def verdict(self) -> str:
        """ "left out", "look again" or "good"."""
        return "left out" if not self.usable else "look again" if self.findings else "good"


@dataclass(frozen=True)
class ImageCheckReport:
    """The findings on every image and on each subject's images together.

    Args:
        images: the findings on each image.
        findings: the findings on each subject's images together.
        folder: how each file and folder is used, or why it is not.
        class_folder: the same for the folder of class images; None without one.
        long_prompts: prompts that the tokenizers truncate; filled in once the base model is loaded.
    """

    images: tuple[Diagnosis, ...]
    findings: tuple[Finding, ...] = ()
    folder: FolderAccount | None = None
    class_folder: FolderAccount | None = None
    long_prompts: tuple[LongPrompt, ...] = ()

    @property
    def has_warnings(self) -> bool:
        """Whether there is a finding or a warning to show before training."""
        return bool(self.findings or self.warnings() or any(diagnosis.findings for diagnosis in self.images))

    @property
    def accounts(self) -> list[FolderAccount]:
        """The accounts of all folders that were scanned."""
        return [account for account in (self.folder, self.class_folder) if account is not None]

    def warnings(self) -> list[str]:
        """Warnings on unused files and on truncated prompts."""
        unused = [sentence for account in self.accounts for sentence in account.warnings()]
        return unused + [prompt.summary() for prompt in self.long_prompts]

    @property
    def usable(self) -> set[Path]:
        """The images that can be trained on."""
        return {diagnosis.path for diagnosis in self.images if diagnosis.usable}

    def for_resolution(self, resolution: int) -> ImageCheckReport:
        """The report with a finding for each image that is smaller than `resolution` pixels."""
        return replace(self, images=tuple(_with_size_for(diagnosis, resolution) for diagnosis in self.images))

    def to_dict(self) -> dict[str, Any]:
        """The report as plain values for JSON, with the verdict of each image."""
        images = [
            asdict(diagnosis) | {"path": display_path(diagnosis.path), "verdict": diagnosis.verdict} for diagnosis in self.images
        ]
        findings = [asdict(finding) for finding in self.findings]
        names = ("folder", "class_folder")
        prompts = [asdict(prompt) | {"summary": prompt.summary()} for prompt in self.long_prompts]
        folders = {name: account and account.to_json() for name in names for account in [getattr(self, name)]}
        return {"pictures": images, "findings": findings, **folders, "long_prompts": prompts}

    def summary(self) -> str:
        """The report as text: one line per image and finding, then the warnings."""
        lines = []
        for diagnosis in self.images:
            size = "" if diagnosis.size is None else f" ({diagnosis.size[0]} x {diagnosis.size[1]})"
            lines.append(f"{diagnosis.verdict}: {display_path(diagnosis.path)}{size}")
            lines += [f"    {finding.words} {finding.advice}" for finding in diagnosis.findings]
        lines += [f"{finding.words} {finding.advice}" for finding in self.findings]
        return "\n".join([*lines, *self.warnings(), *(words for account in self.accounts for words in account.infos())])


@dataclass(frozen=True)
class _CheckedImage:
    """The findings on an image, and its hash and thumbnail for comparisons with the others."""

    diagnosis: Diagnosis
    bits: np.ndarray | None = field(default=None, repr=False)
    thumbnail: np.ndarray | None = field(default=None, repr=False)


def check_images(
    folder: str | Path,
    resolution: int | None = None,
    workers: int = 0,
    class_data_dir: str | Path | None = None,
    excluded_images: Sequence[str] = (),
) -> ImageCheckReport:
    """Read and check every image of every subject in `folder`.

    Args:
        resolution: training resolution in pixels; smaller images are reported. None to skip this check.
        workers: number of processes that decode images.
        class_data_dir, excluded_images: as in `scan_folder`.
    Raises: InputError if no image can be read, with the findings, or if a caption file cannot be read.
    """
    scan = scan_folder(folder, class_data_dir, excluded_images)
    account = read_captions(scan).account
    files = [(path, subject.name) for path, subject in images_of(scan)]
    checked = list(tqdm(_check_all(files, workers), desc="checking images", delay=5, total=len(files)))
    others = [_other_format(path) for path in account.of_kind("other_format")]
    checked = _with_duplicates(checked)
    findings = [finding for subject in dict(files).values() for finding in _set_findings(subject, checked)]
    diagnoses = [image.diagnosis for image in checked] + others
    report = ImageCheckReport(tuple(diagnoses), tuple(dict.fromkeys(findings)), account)
    if not report.usable:
        raise InputError(f"{str(folder)!r} holds no image that can be used:\n{report.summary()}")
    return report if resolution is None else report.for_resolution(resolution)


def _check_all(files: Sequence[tuple[Path, str]], workers: int) -> Iterator[_CheckedImage]:
    if not workers:
        # Cached until an image changes, since the web app checks a set after each change of it.
        yield from (_cached_check(path, subject, path.stat().st_mtime_ns if path.exists() else 0) for path, subject in files)
        return
    with ProcessPoolExecutor(workers) as processes:
        yield from processes.map(_check_image, *zip(*files, strict=True))


@lru_cache(maxsize=512)
def _cached_check(path: Path, subject: str, changed: int) -> _CheckedImage:
    return _check_image(path, subject)


def _check_image(path: Path, subject: str) -> _CheckedImage:
    """Read and check one image."""
    try:
        read = read_image_with_notes(path)
    except InputError as error:
        kind = "wrong_format" if isinstance(error, UnsupportedFormatError) else "unreadable"
        return _CheckedImage(Diagnosis(path, subject, None, (Finding(kind, str(error), "It is left out."),)))
    image = read.image
    findings = [*_shape_findings(image), *_sharpness_findings(image)]
    findings += [Finding(note.kind, note.words, note.advice) for note in read.notes]
    diagnosis = Diagnosis(path, subject, image.size, tuple(findings))
    thumbnail = np.asarray(image.resize((HASH_SIDE, HASH_SIDE), Image.Resampling.BOX), dtype=np.float32) / 255
    return _CheckedImage(diagnosis, perceptual_hash(image), thumbnail)


def _shape_findings(image: Image.Image) -> list[Finding]:
    short, long = sorted(image.size)
    findings = []
    if short < MIN_SIDE:
        words = f"It is tiny: its shorter side has {short} pixels."
        findings.append(Finding("tiny", words, f"Use one with at least {MIN_SIDE}, better as many as the training resolution."))
    if long / short > MAX_ASPECT_RATIO:
        words = f"Its aspect ratio is extreme: one side is {long / short:.1f} times the other, and most of it would be cropped."
        findings.append(Finding("extreme_shape", words, "Crop it to the subject, or train with --aspect_ratio_buckets."))
    return findings


def _sharpness_findings(image: Image.Image) -> list[Finding]:
    measured = sharpness(image)
    if measured >= MIN_SHARPNESS:
        return []
    words = f"It is blurred or almost empty (sharpness {measured:.0f}; sharp photos have several hundred)."
    return [Finding("blurred", words, "The adapter would learn the blur. Use a sharper image.")]


def sharpness(image: Image.Image) -> float:
    """The variance of the Laplacian of the grey image, with its shorter side reduced to `SHARPNESS_SIDE` pixels."""
    grey = ImageOps.grayscale(image)
    scale = SHARPNESS_SIDE / min(grey.size)
    if scale < 1:
        grey = grey.resize((round(grey.width * scale), round(grey.height * scale)), Image.Resampling.LANCZOS)
    values = np.pad(np.asarray(grey, dtype=np.float32), 1, mode="edge")
    neighbours = values[1:-1, :-2] + values[1:-1, 2:] + values[:-2, 1:-1] + values[2:, 1:-1]
    return float((neighbours - 4 * values[1:-1, 1:-1]).var())


def perceptual_hash(image: Image.Image) -> np.ndarray:
    """(128,) bool: whether brightness increases from each cell of an 8 x 8 grid to the next, across and down."""
    side = HASH_SIDE + 1
    grey = np.asarray(ImageOps.grayscale(image).resize((side, side), Image.Resampling.LANCZOS), dtype=np.int16)
    across, down = np.diff(grey, axis=1)[:-1] > 0, np.diff(grey, axis=0)[:, :-1] > 0
    return np.concatenate([across.ravel(), down.ravel()])


def _with_duplicates(checked: list[_CheckedImage]) -> list[_CheckedImage]:
    """Add a finding to each image that nearly duplicates an earlier one of the same subject."""
    marked: list[_CheckedImage] = []
    for image in checked:
        duplicate = next((other for other in marked if _are_near_duplicates(image, other)), None)
        if duplicate is not None:
            words = f"It is almost the same image as {duplicate.diagnosis.path.name!r}."
            finding = Finding("near_duplicate", words, "Keep one of them. A duplicate makes memorisation more likely.")
            image = replace(image, diagnosis=replace(image.diagnosis, findings=(*image.diagnosis.findings, finding)))
        marked.append(image)
    return marked


def _are_near_duplicates(first: _CheckedImage, second: _CheckedImage) -> bool:
    if first.bits is None or second.bits is None or first.diagnosis.subject != second.diagnosis.subject:
        return False
    colours_differ = np.abs(first.thumbnail - second.thumbnail).mean() > MAX_DUPLICATE_DIFFERENCE
    return bool((first.bits != second.bits).sum() <= MAX_DUPLICATE_BITS and not colours_differ)


def _set_findings(subject: str, checked: list[_CheckedImage]) -> list[Finding]:
    """The findings on all images of a subject together."""
    thumbnails = [image.thumbnail for image in checked if image.thumbnail is not None and image.diagnosis.subject == subject]
    advice = "Add images with other backgrounds, viewpoints and light: what all images share is learned as part of the subject."
    if len(thumbnails) < MIN_IMAGES:
        count = f"{len(thumbnails)} image{'' if len(thumbnails) == 1 else 's'}"
        return [Finding("few_pictures", f"There {'is' if len(thumbnails) == 1 else 'are'} {count} of {subject!r}.", advice)]
    variety = np.mean([np.abs(first - second).mean() for first, second in itertools.combinations(thumbnails, 2)])
    if variety >= MIN_VARIETY:
        return []
    return [Finding("low_variety", f"The images of {subject!r} are very similar.", advice)]


def _other_format(path: Path) -> Diagnosis:
    """The diagnosis of an image file in an unsupported format."""
    words = f"The format {path.suffix} is not supported; the image is left out."
    finding = Finding("wrong_format", words, "Save it as JPEG or PNG.")
    return Diagnosis(path, name_of_subject(folder_name(path.parent)), None, (finding,))


def _with_size_for(diagnosis: Diagnosis, resolution: int) -> Diagnosis:
    is_small = any(finding.kind in ("tiny", "small") for finding in diagnosis.findings)
    if is_small or diagnosis.size is None or min(diagnosis.size) >= resolution:
        return diagnosis
    words = f"Its shorter side has {min(diagnosis.size)} pixels and is enlarged to {resolution} for training."
    finding = Finding("small", words, "Use a larger image or a lower --resolution.")
    return replace(diagnosis, findings=(*diagnosis.findings, finding))


@dataclass
class ImageCheckOptions:
    """Options of `python -m pipelines.subject.image_checks`."""

    folder: str = field(metadata={"help": "Folder with images of a subject, or with one folder for each subject."})
    resolution: int | None = field(default=None, metadata={"help": "Training resolution in pixels."})
    dataloader_num_workers: int = field(default=0, metadata={"help": "Number of processes that decode images."})
    json: str | None = field(default=None, metadata={"help": "Also write the report to this .json file."})


def main(options: ImageCheckOptions) -> ImageCheckReport:
    """Check the images of a folder, print the report and return it.

    Raises: InputError if the folder does not exist or holds no usable image, or the file cannot be written.
    """
    if not Path(options.folder).is_dir():
        raise InputError(f"The folder {options.folder!r} does not exist. Give a folder with images of the subject.")
    if options.json is not None:
        check_output_file(options.json, "--json", (".json",))
    report = check_images(options.folder, options.resolution, options.dataloader_num_workers)
    if options.json is not None:
        Path(options.json).write_text(json.dumps(report.to_dict(), indent=2) + "\n", encoding="utf-8")
    sys.stdout.write(report.summary() + "\n")
    return report


def command() -> None:
    """The command line: exits with status 2 for wrong input."""
    arguments = sys.argv[1:]
    if arguments and not arguments[0].startswith("-"):
        arguments.insert(0, "--folder")
    parser = transformers.HfArgumentParser(
        ImageCheckOptions, description=__doc__, allow_abbrev=False, formatter_class=HelpFormatter
    )
    try:
        main(parser.parse_args_into_dataclasses(arguments, look_for_args_file=False)[0])
    except InputError as error:
        parser.error(str(error))


if __name__ == "__main__":
    command()
