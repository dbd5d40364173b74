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

# Seeds of class images, apart from those of sample images.
FIRST_SEED = 1_000_000


@dataclass(frozen=True)
class ClassImages:
    """The class images that a run needs.

    Args:
        folder: where they lie; with several classes, in a folder for each.
        prompts: for each subject the prompt of its class.
        count: how many of each class.
        model: name or folder of the base model that makes them.
        share: this process, and how many there are, each of which makes its part.
    """

    folder: Path
    prompts: Mapping[str, str]
    count: int
    model: str
    share: tuple[int, int] = (0, 1)

    def homes(self) -> dict[str, Path]:
        """The folder of each class, by prompt."""
        unique = list(dict.fromkeys(self.prompts.values()))
        if len(unique) == 1:
            return {unique[0]: self.folder}
        return {prompt: self.folder / (re.sub(r"\W+", "-", prompt.lower()).strip("-") or "class") for prompt in unique}

    def missing(self) -> list[tuple[Path, str, int]]:
        """File, prompt and seed of each image that is still to be made.

        Raises: InputError if a folder holds images made from another prompt or by another model.
        """
        wanted = []
        for prompt, home in self.homes().items():
            names = set()
            for path in list_folder(home).images if home.is_dir() else ():
                _check_origin(path, prompt, self.model)
                names.add(path.name)
            free = (number for number in range(self.count + len(names)) if f"{number:05d}.png" not in names)
            numbers = [next(free) for _ in range(self.count - len(names))]
            wanted += [(home / f"{number:05d}.png", prompt, FIRST_SEED + number) for number in numbers]
        return wanted

    def make(
        self,
        missing: Sequence[tuple[Path, str, int]],
        generate: Callable[[list[str], list[int]], Iterator[Image.Image]],
        settings: Mapping[str, object],
    ) -> None:
        """Generate this process's part of the missing images; each is written atomically with its settings.

        Args:
            generate: yields an image for each prompt and its seed.
            settings: of all of them, as in `save_image`.
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
            for prompt, home in self.homes().items()
            for path in list_folder(home).images[: self.count]
        ]

    def account(self) -> FolderAccount:
        """What each file and folder of the class images' folder is used for, or why it is not used; empty where there is none.

        Raises: InputError if it is a file or cannot be read, or holds the images in a folder below it.
        """
        if not self.folder.exists():
            return FolderAccount(self.folder)
        check_folder(self.folder, "--class_data_dir")
        homes = {home: prompt for prompt, home in self.homes().items()}
        top = list_folder(self.folder)
        if self.folder in homes:
            return FolderAccount(self.folder, tuple(self._entries(self._with_images(top), homes[self.folder])))
        entries = [*top.unusable, *(FolderEntry(path, "unused", "class_elsewhere") for path in top.images)]
        entries += [FolderEntry(path, "unused", unused_kind(path.name, ())) for path in top.files]
        for path in top.folders:
            if path in homes:
                entries += self._entries(list_folder(path), homes[path])
            else:
                entries.append(_strange_folder(path))
        return FolderAccount(self.folder, tuple(entries))

    def _with_images(self, listing: FolderListing) -> FolderListing:
        """`listing`. Raises: InputError if its images all lie in folders below it, where none is read."""
        below = [] if listing.images else [path for path in listing.folders if first_image_below(path)]
        if below:
            raise InputError(
                f"No class image lies in {str(listing.path)!r} itself, but in {listed(below, listing.path)}. Give "
                f"--class_data_dir the folder that holds them, as in {str(below[0])!r}."
            )
        return listing

    def _entries(self, listing: FolderListing, prompt: str) -> list[FolderEntry]:
        """Everything in the folder of the class of `prompt`."""
        used, spare = listing.images[: self.count], listing.images[self.count :]
        entries = [FolderEntry(path, "image", subject=prompt) for path in used]
        entries += [FolderEntry(path, "unused", "spare", prompt) for path in spare]
        entries += [FolderEntry(path, "unused", kind, prompt, image) for path, (kind, image) in listing.masks.items()]
        entries += [*listing.unusable, *map(_strange_folder, listing.folders)]
        names = [path.name for path in listing.images]
        return entries + [FolderEntry(path, "unused", _class_file_kind(path, names), prompt) for path in listing.files]


def _class_file_kind(path: Path, images: Sequence[str]) -> str:
    """Why a file beside class images is not used."""
    if any(caption_names(image, [path.name]) for image in images):
        return "class_caption"
    kind = unused_kind(path.name, images)
    # The image checks, which name images of other formats elsewhere, do not look at class images.
    return "unknown" if kind == "other_format" else kind


def _strange_folder(path: Path) -> FolderEntry:
    """The entry of a folder in which no class image is looked for."""
    return FolderEntry(path, "unused", "class_folder" if first_image_below(path) else "no_images")


def _check_origin(path: Path, prompt: str, model: str) -> None:
    """Refuse an image that says that it shows another class, or another model's idea of it; others are taken as they are."""
    with opened_image(path) as opened:
        made_here = SETTINGS_KEY in opened.info
    if not made_here:
        return
    settings = read_settings(path)
    if settings.get("prompt") != prompt or Path(str(settings.get("model"))).name != Path(model).name:
        raise InputError(
            f"{str(path)!r} is a class image of {settings.get('prompt')!r} by {settings.get('model')!r}, not of {prompt!r} by "
            f"{model!r}. Give another --class_data_dir, or remove the images in it."
        )


def in_sizes(images: Sequence[TrainingImage], sizes: Sequence[Size]) -> tuple[list[TrainingImage], list[Size]]:
    """Class images for batches of each of `sizes`: every one in the size nearest to its shape, all in a size that gets none.

    Returns: images, some more than once, and the size of each.
    """
    nearest = [nearest_bucket(image_size(image.path), sizes) for image in images]
    pairs = list(zip(images, nearest, strict=True))
    pairs += [(image, size) for size in sizes if size not in nearest for image in images]
    return [image for image, _ in pairs], [size for _, size in pairs]
