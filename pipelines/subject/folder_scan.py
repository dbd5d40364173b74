"""Which files of a folder are a subject's images, and an account of all others: one scan that everything else asks.

Images lie directly in the folder (one subject) or in one folder for each subject, never both. Kohya's folders are read by their
names: `10_sks toy` holds "sks toy", and `1_toy` beside it regularisation images of its class.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from pipelines.errors import InputError
from pipelines.file_names import display_path
from pipelines.images import IMAGE_SUFFIXES, read_image
from pipelines.subject.folder_entries import LISTED_NAMES, FolderAccount, FolderEntry, FolderNote, listed
from pipelines.subject.folder_listing import FolderListing, check_folder, first_image_below, list_folder
from pipelines.subject.folder_names import (
    CLASS_FOLDERS,
    CLASS_PROMPT,
    IMAGE_FOLDERS,
    MASK_FOLDERS,
    caption_names,
    class_words,
    folder_name,
    is_mask_in_folder,
    kohya_name,
    metadata_rank,
    name_of_subject,
    unused_kind,
    with_article,
)

# Masks are grey: the most that two channels of a pixel may differ by, JPEG's rounding included.
GREY_TOLERANCE = 24


@dataclass(frozen=True)
class SubjectFolder:
    """One subject's folder.

    Args:
        path: the folder.
        name: what the subject is called.
        images: its images, sorted by name.
        captions: for each image the text files that hold its caption, the one that is used first.
        metadata: its metadata files, the one that comes first first.
    """

    path: Path
    name: str
    images: tuple[Path, ...]
    captions: dict[Path, list[Path]]
    metadata: tuple[Path, ...]


@dataclass(frozen=True)
class FolderScan:
    """What a folder of images holds.

    Args:
        subjects: one for each subject.
        metadata: metadata files of the folder itself, where the subjects lie in folders of it.
        account: every file and folder of it, but for the captions, which `caption_files.read_captions` adds.
    """

    subjects: tuple[SubjectFolder, ...]
    metadata: tuple[Path, ...]
    account: FolderAccount


def scan_folder(folder: str | Path, class_data_dir: str | Path | None = None) -> FolderScan:
    """Find the subjects in `folder`, and account for all else that lies there.

    Args:
        class_data_dir: a folder of class images, which may lie in `folder` and is no subject.
    Raises: InputError if it cannot be read, holds no image, or holds images beside folders of images.
    """
    root = check_folder(folder)
    if class_data_dir is not None and Path(class_data_dir).resolve() == root.resolve():
        raise InputError(f"--class_data_dir and --instance_data_dir are both {str(root)!r}. Give class images another folder.")
    return _Scanner(root, None if class_data_dir is None else Path(class_data_dir).resolve()).scan()


class _Scanner:
    """Scans one folder.

    Args:
        root: the folder.
        class_data_dir: as in `scan_folder`, resolved.
    """

    def __init__(self, root: Path, class_data_dir: Path | None) -> None:
        self.root, self.class_data_dir = root, class_data_dir
        self.entries: list[FolderEntry] = []
        self.notes: list[FolderNote] = []

    def scan(self) -> FolderScan:
        listing = list_folder(self.root)
        project = self._kohya_project(listing)
        if project is not None:
            inner = scan_folder(project, self.class_data_dir)
            words = f"{str(self.root)!r} is laid out as a kohya project: the images in {project.name!r} are used."
            self.notes.append(FolderNote("kohya_project", words, is_warning=False))
            self._beside_project(listing, project)
            self._files_of(listing, "")
            entries = (*self.entries, *inner.account.entries)
            account = FolderAccount(self.root, entries, (*self.notes, *inner.account.notes))
            return FolderScan(inner.subjects, inner.metadata, account)
        homes = self._candidates(listing)
        if listing.images and homes:
            raise self._mixture(listing.images, list(homes))
        if listing.images:
            homes = {self.root: listing}
        if self.root not in homes:
            self._files_of(listing, "")
        if not homes:
            raise self._no_image()
        subjects = tuple(self._subject(home) for home in homes.values())
        self._note_repeats(subjects)
        metadata = () if self.root in homes else _metadata(listing)
        return FolderScan(subjects, metadata, FolderAccount(self.root, tuple(self.entries), tuple(self.notes)))

    def _candidates(self, listing: FolderListing) -> dict[Path, FolderListing]:
        """The folders in `listing` that hold a subject each; all others are accounted for."""
        homes = {path: inner for path in listing.folders if (inner := self._folder_of_images(path)) is not None}
        beside = {**homes, **({self.root: listing} if listing.images else {})}
        for path, inner in list(homes.items()):
            entry = self._mask_folder(path, inner, beside) or self._class_folder(path, beside)
            if entry is None and not inner.images:
                entry = self._unused_folder(path)
            if entry is not None:
                self.entries.append(entry)
                del homes[path], beside[path]
        return homes

    def _folder_of_images(self, path: Path) -> FolderListing | None:
        """What lies in the folder `path`; None where it can be no subject's nor its class's, which is accounted for."""
        inner = _listing(path)
        if inner is None:
            self.entries.append(FolderEntry(path, "unused", "unreadable"))
        elif self._is_apart(path) or not (inner.images or _is_class_folder(path)):
            self.entries.append(self._unused_folder(path))
        else:
            return inner
        return None

    def _is_apart(self, path: Path) -> bool:
        resolved = path.resolve()
        return resolved == self.class_data_dir or self.root.resolve().is_relative_to(resolved) or _is_run(path)

    def _unused_folder(self, path: Path) -> FolderEntry:
        """The entry of a folder that holds no subject."""
        resolved = path.resolve()
        if resolved == self.class_data_dir:
            return FolderEntry(path, "class_images")
        if self.root.resolve().is_relative_to(resolved):
            return FolderEntry(path, "unused", "link_to_itself")
        if _is_run(path):
            return FolderEntry(path, "unused", "run")
        image = first_image_below(path)
        if image is None:
            return FolderEntry(path, "unused", "no_images")
        if self.class_data_dir is not None and image.resolve().is_relative_to(self.class_data_dir):
            return FolderEntry(path, "class_images")
        return FolderEntry(path, "unused", "image_too_deep", detail=f"The first is {str(image)!r}.")

    def _mask_folder(self, path: Path, inner: FolderListing, beside: dict[Path, FolderListing]) -> FolderEntry | None:
        """The entry of a folder whose images are masks of images beside it; None for any other folder."""
        if path.name.casefold() not in MASK_FOLDERS:
            return None
        images = {image.name for home, listing in beside.items() if home != path for image in listing.images}
        has_pairs = any(is_mask_in_folder(mask.name, images) for mask in inner.images)
        # Beside other subjects a folder of this name may hold a subject, such as a carnival mask.
        are_masks = has_pairs and (self.root in beside or all(map(_is_grey, inner.images)))
        return FolderEntry(path, "mask", "mask_folder") if are_masks else None

    def _class_folder(self, path: Path, beside: dict[Path, FolderListing]) -> FolderEntry | None:
        """The entry of a folder of regularisation images; None for any other folder."""
        others = [folder_name(home) for home in beside if home != path and not _is_class_folder(home)]
        if not others:
            return None
        words = class_words(path.name, others)
        if words is None and not _is_class_folder(path):
            return None
        homes = [path] if beside[path].images else [inner for inner in beside[path].folders if first_image_below(inner)]
        offers = [_offer(home, words) for home in homes]
        return FolderEntry(path, "unused", "class_data", detail=" ".join(offers)) if offers else None

    def _kohya_project(self, listing: FolderListing) -> Path | None:
        """The folder img of a kohya project, whose folders are called after repeats and subject; None elsewhere."""
        if listing.images:
            return None
        for path in listing.folders:
            inner = _listing(path) if path.name.casefold() in IMAGE_FOLDERS else None
            if inner is not None and not inner.images and any(kohya_name(home.name) for home in inner.folders):
                return path
        return None

    def _beside_project(self, listing: FolderListing, project: Path) -> None:
        """Account for the other folders of a kohya project: reg, log, model."""
        self.entries.append(FolderEntry(project, "subject"))
        for path in listing.folders:
            if path == project:
                continue
            inner = _listing(path)
            entry = FolderEntry(path, "unused", "unreadable") if inner is None else None
            if entry is None and not self._is_apart(path):
                entry = self._class_folder(path, {path: inner, project: listing})
            entry = entry or self._unused_folder(path)
            self.entries.append(FolderEntry(path, "unused", "kohya_sibling") if entry.kind == "image_too_deep" else entry)

    def _subject(self, listing: FolderListing) -> SubjectFolder:
        """The subject in `listing`, with every file there accounted for."""
        name = name_of_subject(folder_name(listing.path))
        if listing.path != self.root:
            self.entries.append(FolderEntry(listing.path, "subject", subject=name))
            for path in listing.folders:
                self.entries.append(self._folder_in_subject(path, listing))
        self.entries += [FolderEntry(path, "image", subject=name) for path in listing.images]
        captions = self._files_of(listing, name)
        return SubjectFolder(listing.path, name, listing.images, captions, _metadata(listing))

    def _folder_in_subject(self, path: Path, listing: FolderListing) -> FolderEntry:
        inner = _listing(path)
        if inner is None:
            return FolderEntry(path, "unused", "unreadable")
        return self._mask_folder(path, inner, {self.root: listing, path: inner}) or self._unused_folder(path)

    def _files_of(self, listing: FolderListing, subject: str) -> dict[Path, list[Path]]:
        """Account for the files directly in a folder; returns for each image the text files that hold its caption."""
        names = [path.name for path in listing.files]
        captions = {image: [listing.path / name for name in caption_names(image.name, names)] for image in listing.images}
        image_of = {path: image for image, paths in captions.items() for path in paths}
        self.entries += [*listing.unusable, *_mask_entries(listing, subject)]
        images = [image.name for image in listing.images]
        for path in listing.files:
            if path in image_of:
                self.entries.append(FolderEntry(path, "caption", subject=subject, image=image_of[path]))
            else:
                self.entries.append(_file_entry(path, subject, images))
        return captions

    def _note_repeats(self, subjects: Sequence[SubjectFolder]) -> None:
        """Say of kohya's folder names how they are read, and that repeats are not honoured."""
        names = [folder_name(subject.path) for subject in subjects]
        readings = [f"{name!r} holds {kohya.words!r}, repeats {kohya.repeats}" for name in names if (kohya := kohya_name(name))]
        if readings:
            words = (
                f"Folder names are read by kohya's convention: {'; '.join(readings)}. Repeats are not honoured: every image "
                "counts the same. Give --max_train_steps for a longer training."
            )
            self.notes.append(FolderNote("repeats_ignored", words))

    def _mixture(self, images: Sequence[Path], folders: Sequence[Path]) -> InputError:
        return InputError(
            f"{str(self.root)!r} holds images ({listed(images, self.root, 10)}) beside folders of images "
            f"({listed(folders, self.root, 10)}). Put all images directly into it for one subject, or all into one folder for "
            "each subject: move or remove either the images or the folders, or give one of the folders alone."
        )

    def _no_image(self) -> InputError:
        account = FolderAccount(self.root, tuple(self.entries))
        formats = account.of_kind("other_format")
        there = account.warnings()[:LISTED_NAMES]
        if formats:
            there.insert(0, f"Images of these formats are not read: {listed(formats, self.root)}. Save them as JPEG or PNG.")
        return InputError(
            f"{str(self.root)!r} holds no image ({', '.join(sorted(IMAGE_SUFFIXES))}), nor a folder with images. Put three "
            f"to ten images of the subject there, or of each subject into a folder of its own. {' '.join(there)}".rstrip()
        )


def _mask_entries(listing: FolderListing, subject: str) -> Iterator[FolderEntry]:
    """The entries of masks and conditioning images."""
    for path, (kind, image) in listing.masks.items():
        yield FolderEntry(path, "mask" if kind == "mask" else "unused", kind, subject, image)


def _file_entry(path: Path, subject: str, images: Sequence[str]) -> FolderEntry:
    """The entry of a file that is neither image nor caption of one image.

    Args:
        subject: in whose folder it lies; empty for none.
        images: the names of the images there.
    """
    if path.name.lower() == CLASS_PROMPT and subject:
        return FolderEntry(path, "class_prompt", subject=subject)
    if metadata_rank(path.name) is not None:
        return FolderEntry(path, "metadata", subject=subject)
    return FolderEntry(path, "unused", unused_kind(path.name, images), subject)


def _listing(path: Path) -> FolderListing | None:
    """What lies in the folder `path`; None where it cannot be read."""
    try:
        return list_folder(path)
    except OSError:
        return None


def _metadata(listing: FolderListing) -> tuple[Path, ...]:
    ranked = [(rank, path) for path in listing.files if (rank := metadata_rank(path.name)) is not None]
    return tuple(path for _, path in sorted(ranked))


def _is_class_folder(path: Path) -> bool:
    return path.name.casefold() in CLASS_FOLDERS


def _is_run(path: Path) -> bool:
    return (path / "status.json").is_file() and (path / "options.json").is_file()


def _is_grey(path: Path) -> bool:
    """Whether an image has no colours, as masks have none."""
    try:
        pixels = np.asarray(read_image(path), dtype=np.int16)
    except InputError:
        return False
    return int((pixels.max(axis=2) - pixels.min(axis=2)).max()) <= GREY_TOLERANCE


def _offer(folder: Path, words: str | None) -> str:
    """How to train with the images in `folder` as class images."""
    kohya = kohya_name(folder.name)
    words = words or (kohya.words if kohya is not None else "CLASS")
    return (
        f'To use them for prior preservation give --with_prior_preservation --class_data_dir "{display_path(folder)}" '
        f'--class_prompt "a photo of {with_article(words)}"; to train them as a subject, rename the folder.'
    )


def images_of(scan: FolderScan) -> Iterator[tuple[Path, SubjectFolder]]:
    """Every image of every subject, with its subject."""
    for subject in scan.subjects:
        for image in subject.images:
            yield image, subject
