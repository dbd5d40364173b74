"""The photo doctor: what is wrong with a subject's images, in words, before any training. It never changes an image.

    python -m pipelines.subject.image_checks PHOTOS

Images that cannot be read are left out of training; all else is reported with what to do about it.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field, replace
from itertools import combinations
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image, ImageOps
from torch.utils.data import DataLoader, Dataset
from tqdm.auto import tqdm
from transformers import HfArgumentParser

from pipelines.errors import InputError
from pipelines.file_names import display_path
from pipelines.image_formats import UnsupportedFormatError
from pipelines.images import read_image_with_notes
from pipelines.output_paths import check_output_file
from pipelines.subject.caption_files import read_captions
from pipelines.subject.folder_entries import FolderAccount
from pipelines.subject.folder_names import folder_name, name_of_subject
from pipelines.subject.folder_scan import images_of, scan_folder
from pipelines.subject.prompt_length import LongPrompt

SMALLEST, WIDEST, FEWEST = 64, 3.0, 3
# Seen on 25 photos and renderings with a shorter side of 256: sharp ones have 840 and more; blurred by a Gaussian of one
# pixel 50 to 180, of two pixels at most 22.
SHARPNESS_SIDE, LEAST_SHARPNESS = 256, 40.0
# Of 128 bits, different images of one subject differ in 27 and more, an image and its JPEG of quality 30 in at most 5.
HASH_SIDE, SAME_BITS = 8, 16
# Mean difference of 8 x 8 thumbnails: 0.13 and more for sets of real photos, 0.05 for crops of one photo.
LEAST_VARIETY = 0.06
# A brighter copy differs by 0.09; flat images have the same bits and are told apart by their colours.
MOST_OF_A_DUPLICATE = 0.12


@dataclass(frozen=True)
class Finding:
    """One thing to know: its `kind` for machines, in `words` for people, and what to do about it."""

    kind: str
    words: str
    advice: str


@dataclass(frozen=True)
class Diagnosis:
    """What was found in one image.

    Args:
        path: its file.
        subject: its folder's name.
        size: width and height, upright; None where it cannot be read.
        findings: what was found.
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
        """In two words."""
        return "left out" if not self.usable else "look again" if self.findings else "good"


@dataclass(frozen=True)
class ImageCheckReport:
    """What was found in all images, and in each subject's images as a whole.

    Args:
        folder: what each file and folder of the folder is used for, or why it is not used.
        class_folder: the same of the folder of class images; None where none is given.
        long_prompts: those that the tokenizers cut; known once the base model is.
    """

    images: tuple[Diagnosis, ...]
    findings: tuple[Finding, ...] = ()
    folder: FolderAccount | None = None
    class_folder: FolderAccount | None = None
    long_prompts: tuple[LongPrompt, ...] = ()

    @property
    def has_warnings(self) -> bool:
        """Whether there is anything that a user should see before training."""
        return bool(self.findings or self.warnings() or any(diagnosis.findings for diagnosis in self.images))

    @property
    def accounts(self) -> list[FolderAccount]:
        """The accounts of all folders that were scanned."""
        return [account for account in (self.folder, self.class_folder) if account is not None]

    def warnings(self) -> list[str]:
        """Sentences on what is not used of the folders, and on prompts that are cut."""
        unused = [sentence for account in self.accounts for sentence in account.warnings()]
        return unused + [prompt.summary() for prompt in self.long_prompts]

    @property
    def usable(self) -> set[Path]:
        """The images that can be trained on."""
        return {diagnosis.path for diagnosis in self.images if diagnosis.usable}

    def for_resolution(self, resolution: int) -> ImageCheckReport:
        """The report with the images named that would be enlarged to train at `resolution` pixels."""
        return replace(self, images=tuple(_with_size_for(diagnosis, resolution) for diagnosis in self.images))

    def to_dict(self) -> dict[str, Any]:
        """Plain values, with a verdict and the image's name for each image."""
        images = [
            asdict(diagnosis) | {"path": display_path(diagnosis.path), "verdict": diagnosis.verdict} for diagnosis in self.images
        ]
        findings = [asdict(finding) for finding in self.findings]
        names = ("folder", "class_folder")
        prompts = [asdict(prompt) | {"summary": prompt.summary()} for prompt in self.long_prompts]
        folders = {name: account and account.to_json() for name in names for account in [getattr(self, name)]}
        return {"pictures": images, "findings": findings, **folders, "long_prompts": prompts}

    def summary(self) -> str:
        """One line an image and finding, then what is not used and why."""
        lines = []
        for diagnosis in self.images:
            size = "" if diagnosis.size is None else f" ({diagnosis.size[0]} x {diagnosis.size[1]})"
            lines.append(f"{diagnosis.verdict}: {display_path(diagnosis.path)}{size}")
            lines += [f"    {finding.words} {finding.advice}" for finding in diagnosis.findings]
        lines += [f"{finding.words} {finding.advice}" for finding in self.findings]
        return "\n".join([*lines, *self.warnings(), *(words for account in self.accounts for words in account.infos())])


@dataclass(frozen=True)
class _Look:
    """What of an image is kept to compare it with others."""

    diagnosis: Diagnosis
    bits: np.ndarray | None = field(default=None, repr=False)
    thumbnail: np.ndarray | None = field(default=None, repr=False)


def examine(
    folder: str | Path, resolution: int | None = None, workers: int = 0, class_data_dir: str | Path | None = None
) -> ImageCheckReport:
    """Read every image of every subject in `folder`, one at a time, and say what is wrong.

    Args:
        resolution: at which is trained, if it is known; smaller images are named.
        workers: processes that decode.
        class_data_dir: as in `scan_folder`.
    Raises: InputError if there is no image, or none that can be read, saying why, or a caption file that cannot be read.
    """
    scan = scan_folder(folder, class_data_dir)
    account = read_captions(scan).account
    files = [(path, subject.name) for path, subject in images_of(scan)]
    loader = DataLoader(_Looks(files), batch_size=None, num_workers=workers)
    looks = list(tqdm(loader, desc="examining images", delay=5, total=len(files)))
    others = [_of_another_format(path) for path in account.of_kind("other_format")]
    looks = _with_duplicates(looks)
    findings = [finding for subject in dict(files).values() for finding in _of_the_whole(subject, looks)]
    diagnoses = [look.diagnosis for look in looks] + others
    report = ImageCheckReport(tuple(diagnoses), tuple(dict.fromkeys(findings)), account)
    if not report.usable:
        raise InputError(f"{str(folder)!r} holds no image that can be used:\n{report.summary()}")
    return report if resolution is None else report.for_resolution(resolution)


class _Looks(Dataset):
    """Looks at image files, for worker processes."""

    def __init__(self, files: Sequence[tuple[Path, str]]) -> None:
        self.files = files

    def __len__(self) -> int:
        return len(self.files)

    def __getitem__(self, index: int) -> _Look:
        return _look(*self.files[index])


def _look(path: Path, subject: str) -> _Look:
    """Read one image and examine it by itself."""
    try:
        read = read_image_with_notes(path)
    except InputError as error:
        kind = "wrong_format" if isinstance(error, UnsupportedFormatError) else "unreadable"
        return _Look(Diagnosis(path, subject, None, (Finding(kind, str(error), "It is left out."),)))
    image = read.image
    findings = [*_of_its_shape(image), *_of_its_sharpness(image)]
    findings += [Finding(note.kind, note.words, note.advice) for note in read.notes]
    diagnosis = Diagnosis(path, subject, image.size, tuple(findings))
    thumbnail = np.asarray(image.resize((HASH_SIDE, HASH_SIDE), Image.Resampling.BOX), dtype=np.float32) / 255
    return _Look(diagnosis, perceptual_hash(image), thumbnail)


def _of_its_shape(image: Image.Image) -> list[Finding]:
    short, long = sorted(image.size)
    findings = []
    if short < SMALLEST:
        words = f"It is tiny: its shorter side has {short} pixels."
        findings.append(Finding("tiny", words, f"Use one with at least {SMALLEST}, better as many as the training resolution."))
    if long / short > WIDEST:
        words = f"Its shape is extreme: one side is {long / short:.1f} times the other, and most of it would be cropped."
        findings.append(Finding("extreme_shape", words, "Crop it to the subject, or train with --aspect_ratio_buckets."))
    return findings


def _of_its_sharpness(image: Image.Image) -> list[Finding]:
    measured = sharpness(image)
    if measured >= LEAST_SHARPNESS:
        return []
    words = f"It is blurred, or hardly shows anything (sharpness {measured:.0f}, sharp photos have several hundred)."
    return [Finding("blurred", words, "The adapter learns the blur: use a sharper one.")]


def sharpness(image: Image.Image) -> float:
    """The variance of the Laplacian of the grey image, with its shorter side brought down to `SHARPNESS_SIDE` pixels."""
    grey = ImageOps.grayscale(image)
    scale = SHARPNESS_SIDE / min(grey.size)
    if scale < 1:
        grey = grey.resize((round(grey.width * scale), round(grey.height * scale)), Image.Resampling.LANCZOS)
    values = np.pad(np.asarray(grey, dtype=np.float32), 1, mode="edge")
    neighbours = values[1:-1, :-2] + values[1:-1, 2:] + values[:-2, 1:-1] + values[2:, 1:-1]
    return float((neighbours - 4 * values[1:-1, 1:-1]).var())


def perceptual_hash(image: Image.Image) -> np.ndarray:
    """(128,) bool: whether brightness rises from each of 8 x 8 places to the next one, across and down."""
    side = HASH_SIDE + 1
    grey = np.asarray(ImageOps.grayscale(image).resize((side, side), Image.Resampling.LANCZOS), dtype=np.int16)
    across, down = np.diff(grey, axis=1)[:-1] > 0, np.diff(grey, axis=0)[:, :-1] > 0
    return np.concatenate([across.ravel(), down.ravel()])


def _with_duplicates(looks: list[_Look]) -> list[_Look]:
    """Name in each image the first earlier one of the same subject that looks the same."""
    marked: list[_Look] = []
    for look in looks:
        twin = next((other for other in marked if _look_alike(look, other)), None)
        if twin is not None:
            words = f"It is almost the same image as {twin.diagnosis.path.name!r}."
            finding = Finding("near_duplicate", words, "Keep one: twice shown, it is learned by heart.")
            look = replace(look, diagnosis=replace(look.diagnosis, findings=(*look.diagnosis.findings, finding)))
        marked.append(look)
    return marked


def _look_alike(first: _Look, second: _Look) -> bool:
    if first.bits is None or second.bits is None or first.diagnosis.subject != second.diagnosis.subject:
        return False
    colours_differ = np.abs(first.thumbnail - second.thumbnail).mean() > MOST_OF_A_DUPLICATE
    return bool((first.bits != second.bits).sum() <= SAME_BITS and not colours_differ)


def _of_the_whole(subject: str, looks: list[_Look]) -> list[Finding]:
    """What is wrong with a subject's images together."""
    thumbnails = [look.thumbnail for look in looks if look.thumbnail is not None and look.diagnosis.subject == subject]
    advice = "Add images with other backgrounds, sides and light: what is the same in all is learned as part of the subject."
    if len(thumbnails) < FEWEST:
        count = f"{len(thumbnails)} image{'' if len(thumbnails) == 1 else 's'}"
        return [Finding("few_pictures", f"There {'is' if len(thumbnails) == 1 else 'are'} {count} of {subject!r}.", advice)]
    variety = np.mean([np.abs(first - second).mean() for first, second in combinations(thumbnails, 2)])
    if variety >= LEAST_VARIETY:
        return []
    return [Finding("low_variety", f"The images of {subject!r} are much alike.", advice)]


def _of_another_format(path: Path) -> Diagnosis:
    """The diagnosis of an image file of a kind that is not read."""
    words = f"Files of the kind {path.suffix} are not read; it is left out."
    finding = Finding("wrong_format", words, "Save it as JPEG or PNG.")
    return Diagnosis(path, name_of_subject(folder_name(path.parent)), None, (finding,))


def _with_size_for(diagnosis: Diagnosis, resolution: int) -> Diagnosis:
    is_small = any(finding.kind in ("tiny", "small") for finding in diagnosis.findings)
    if is_small or diagnosis.size is None or min(diagnosis.size) >= resolution:
        return diagnosis
    words = f"Its shorter side has {min(diagnosis.size)} pixels, and is enlarged to {resolution} for training."
    finding = Finding("small", words, "Use a larger one, or a lower --resolution.")
    return replace(diagnosis, findings=(*diagnosis.findings, finding))


@dataclass
class DoctorOptions:
    """What to examine."""

    folder: str = field(metadata={"help": "Folder with images of a subject, or with a folder for each subject."})
    resolution: int | None = field(default=None, metadata={"help": "Side in pixels at which is to be trained."})
    dataloader_num_workers: int = field(default=0, metadata={"help": "Processes that decode the images."})
    json: str | None = field(default=None, metadata={"help": "Also write the report to this file."})


def main(options: DoctorOptions) -> ImageCheckReport:
    """Examine the folder and say what was found."""
    if not Path(options.folder).is_dir():
        raise InputError(f"There is no folder {options.folder!r}. Name a folder with images of the subject.")
    if options.json is not None:
        check_output_file(options.json, "--json", (".json",))
    report = examine(options.folder, options.resolution, options.dataloader_num_workers)
    if options.json is not None:
        Path(options.json).write_text(json.dumps(report.to_dict(), indent=2) + "\n", encoding="utf-8")
    sys.stdout.write(report.summary() + "\n")
    return report


if __name__ == "__main__":
    arguments = sys.argv[1:]
    if arguments and not arguments[0].startswith("-"):
        arguments.insert(0, "--folder")
    parser = HfArgumentParser(DoctorOptions, description=__doc__, allow_abbrev=False)
    try:
        main(parser.parse_args_into_dataclasses(arguments, look_for_args_file=False)[0])
    except InputError as error:
        parser.error(str(error))
