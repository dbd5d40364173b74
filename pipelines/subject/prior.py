"""Prior preservation: images of the subject's class, generated once by the base model and reused  [Ruiz et al. 2023]."""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from PIL import Image
from tqdm.auto import tqdm

from pipelines.buckets import Size, nearest_bucket
from pipelines.errors import InputError
from pipelines.images import SETTINGS_KEY, opened_image, read_settings, save_image
from pipelines.subject.data import TrainingImage, image_size
from pipelines.subject.folder_entries import FolderAccount, FolderEntry, listed
from pipelines.subject.folder_listing import FolderListing, check_folder, first_image_below, list_folder
from pipelines.subject.folder_names import caption_names, unused_kind

# The first seed of class images, far from those of sample images.
FIRST_SEED = 1_000_000


@dataclass(frozen=True)
class ClassImages:
    """The class images that a run needs.

    Args:
        folder: their folder; with several classes, it holds one folder for each.
        prompts: the class prompt of each subject.
        count: the number of images of each class.
        model: name or folder of the base model that generates them.
        share: rank of this process and number of processes; each generates its part.
    """

    folder: Path
    prompts: Mapping[str, str]
    count: int
    model: str
    share: tuple[int, int] = (0, 1)

    def folders(self) -> dict[str, Path]:
        """The folder of each class, by prompt."""
        unique = list(dict.fromkeys(self.prompts.values()))
        if len(unique) == 1:
            return {unique[0]: self.folder}
        return {prompt: self.folder / (re.sub(r"\W+", "-", prompt.lower()).strip("-") or "class") for prompt in unique}

    def missing(self) -> list[tuple[Path, str, int]]:
        """File, prompt and seed of each image that is still to be generated.

        Raises: InputError if a folder holds images that were generated from another prompt or by another model.
        """
        missing = []
        for prompt, folder in self.folders().items():
            names = set()
            for path in list_folder(folder).images if folder.is_dir() else ():
                _check_origin(path, prompt, self.model)
                names.add(path.name)
            free = (number for number in range(self.count + len(names)) if f"{number:05d}.png" not in names)
            numbers = [next(free) for _ in range(self.count - len(names))]
            missing += [(folder / f"{number:05d}.png", prompt, FIRST_SEED + number) for number in numbers]
        return missing

    def make(
        self,
        missing: Sequence[tuple[Path, str, int]],
        generate: Callable[[list[str], list[int]], Iterator[Image.Image]],
        settings: Mapping[str, object],
    ) -> None:
        """Generate this process's part of the missing images; each is written atomically with its settings.

        Args:
            generate: yields an image for each prompt and its seed.
            settings: those shared by all images, as in `save_image`.
        """
        of_process = missing[self.share[0] :: self.share[1]]
        generated = generate([prompt for _, prompt, _ in of_process], [seed for _, _, seed in of_process])
        bar = tqdm(generated, desc="generating class images", total=len(of_process), disable=self.share[0] > 0)
        for (path, prompt, seed), image in zip(of_process, bar, strict=True):
            beside = path.with_name(f".{path.name}")
            save_image(image, beside, {**settings, "prompt": prompt, "seed": seed, "model": self.model})
            os.replace(beside, path)

    def images(self) -> list[TrainingImage]:
        """`count` images of each class."""
        subjects = {prompt: subject for subject, prompt in self.prompts.items()}
        return [
            TrainingImage(path, prompt, "class", subjects[prompt])
            for prompt, folder in self.folders().items()
            for path in list_folder(folder).images[: self.count]
        ]

    def account(self) -> FolderAccount:
        """The account of the folder of class images; empty if it does not exist.

        Raises: InputError if it is a file or cannot be read, or if all its images are in deeper folders.
        """
        if not self.folder.exists():
            return FolderAccount(self.folder)
        check_folder(self.folder, "--class_data_dir")
        prompts = {folder: prompt for prompt, folder in self.folders().items()}
        top = list_folder(self.folder)
        if self.folder in prompts:
            _check_depth(top)
            return FolderAccount(self.folder, tuple(self._entries(top, prompts[self.folder])))
        entries = [*top.unusable, *(FolderEntry(path, "unused", "class_elsewhere") for path in top.images)]
        entries += [FolderEntry(path, "unused", unused_kind(path.name, ())) for path in top.files]
        for path in top.folders:
            if path in prompts:
                entries += self._entries(list_folder(path), prompts[path])
            else:
                entries.append(_unused_folder(path))
        return FolderAccount(self.folder, tuple(entries))

    def _entries(self, listing: FolderListing, prompt: str) -> list[FolderEntry]:
        """The entries of everything in the folder of the class with `prompt`."""
        used, spare = listing.images[: self.count], listing.images[self.count :]
        entries = [FolderEntry(path, "image", subject=prompt) for path in used]
        entries += [FolderEntry(path, "unused", "spare", prompt) for path in spare]
        entries += [FolderEntry(path, "unused", kind, prompt, image) for path, (kind, image) in listing.masks.items()]
        entries += [*listing.unusable, *map(_unused_folder, listing.folders)]
        names = [path.name for path in listing.images]
        return entries + [FolderEntry(path, "unused", _class_file_kind(path, names), prompt) for path in listing.files]


def _check_depth(listing: FolderListing) -> None:
    """Raise InputError if all images of a folder are in deeper folders, which are not read."""
    below = [] if listing.images else [path for path in listing.folders if first_image_below(path)]
    if below:
        raise InputError(
            f"{str(listing.path)!r} holds no class images itself; they are in {listed(below, listing.path)}. Give "
            f"--class_data_dir the folder that contains them, such as {str(below[0])!r}."
        )


def _class_file_kind(path: Path, images: Sequence[str]) -> str:
    """Why a file beside class images is not used."""
    if any(caption_names(image, [path.name]) for image in images):
        return "class_caption"
    kind = unused_kind(path.name, images)
    # "other_format" is reported by the image checks, which do not check class images.
    return "unknown" if kind == "other_format" else kind


def _unused_folder(path: Path) -> FolderEntry:
    """The entry of a folder that is not searched for class images."""
    return FolderEntry(path, "unused", "class_folder" if first_image_below(path) else "no_images")


def _check_origin(path: Path, prompt: str, model: str) -> None:
    """Raise InputError for an image that was generated here from another prompt or by another model."""
    with opened_image(path) as opened:
        is_generated = SETTINGS_KEY in opened.info
    if not is_generated:
        return
    settings = read_settings(path)
    if settings.get("prompt") != prompt or Path(str(settings.get("model"))).name != Path(model).name:
        raise InputError(
            f"{str(path)!r} was generated from the prompt {settings.get('prompt')!r} by {settings.get('model')!r}, not from "
            f"{prompt!r} by {model!r}. Give another --class_data_dir, or remove the images in it."
        )


def in_sizes(images: Sequence[TrainingImage], sizes: Sequence[Size]) -> tuple[list[TrainingImage], list[Size]]:
    """Assign each class image to the size of `sizes` with the nearest aspect ratio, and all images to a size that gets none.

    Returns: the images, some of them several times, and the size of each.
    """
    nearest = [nearest_bucket(image_size(image.path), sizes) for image in images]
    pairs = list(zip(images, nearest, strict=True))
    pairs += [(image, size) for size in sizes if size not in nearest for image in images]
    return [image for image, _ in pairs], [size for _, size in pairs]
