"""The scan of an image folder: the images of each subject, and an account of all other files.

Images are directly in the folder (one subject) or in one folder for each subject, never both. Folder names in kohya's convention
are understood: `10_sks toy` holds the subject "sks toy", and `1_toy` beside it holds regularisation images of its class.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np

from pipelines.errors import InputError
from pipelines.file_names import display_path
from pipelines.images import IMAGE_SUFFIXES, read_image
from pipelines.run_options import is_run
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
)
from pipelines.wording import with_article

# Masks are grey: the maximum difference between two channels of a pixel, which allows for JPEG compression.
GREY_TOLERANCE = 24


@dataclass(frozen=True)
class SubjectFolder:
    """One subject's folder.

    Args:
        path: the folder.
        name: of the subject.
        images: its images, sorted by name.
        captions: the text files with the caption of each image, in order of precedence.
        metadata: its metadata files, in order of precedence.
    """

    path: Path
    name: str
    images: tuple[Path, ...]
    captions: dict[Path, list[Path]]
    metadata: tuple[Path, ...]


@dataclass(frozen=True)
class FolderScan:
    """The content of an image folder.

    Args:
        subjects: the folder of each subject.
        metadata: metadata files of the image folder itself, if the subjects are in folders of it.
        account: of every file and folder; `caption_files.read_captions` adds the captions to it.
    """

    subjects: tuple[SubjectFolder, ...]
    metadata: tuple[Path, ...]
    account: FolderAccount


def scan_folder(folder: str | Path, class_data_dir: str | Path | None = None, excluded_images: Sequence[str] = ()) -> FolderScan:
    """Find the subjects in `folder`, and account for everything else in it.

    Args:
        class_data_dir: a folder of class images, which may be in `folder` and is not a subject.
        excluded_images: images that are left out, by their paths relative to `folder`.
    Raises: InputError if it cannot be read, holds no image, or holds images beside folders of images, or if an excluded image
        does not exist or none remains.
    """
    root = check_folder(folder)
    if class_data_dir is not None and Path(class_data_dir).resolve() == root.resolve():
        raise InputError(f"--class_data_dir and --instance_data_dir are both {str(root)!r}. Give class images another folder.")
    scan = _Scanner(root, None if class_data_dir is None else Path(class_data_dir).resolve()).scan()
    return _without_images(scan, excluded_images) if excluded_images else scan


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
        """The subjects in the folder, and the account of everything in it."""
        listing = list_folder(self.root)
        project = self._kohya_project(listing)
        if project is not None:
            inner = scan_folder(project, self.class_data_dir)
            words = f"{str(self.root)!r} has the layout of a kohya project: the images in {project.name!r} are used."
            self.notes.append(FolderNote("kohya_project", words, is_warning=False))
            self._beside_project(listing, project)
            self._files_of(listing, "")
            entries = (*self.entries, *inner.account.entries)
            account = FolderAccount(self.root, entries, (*self.notes, *inner.account.notes))
            return FolderScan(inner.subjects, inner.metadata, account)
        folders = self._subject_folders(listing)
        if listing.images and folders:
            raise self._mixed_images_error(listing.images, list(folders))
        if listing.images:
            folders = {self.root: listing}
        if self.root not in folders:
            self._files_of(listing, "")
        if not folders:
            raise self._no_image_error()
        subjects = tuple(self._subject(inner) for inner in folders.values())
        self._note_repeats(subjects)
        metadata = () if self.root in folders else _metadata(listing)
        return FolderScan(subjects, metadata, FolderAccount(self.root, tuple(self.entries), tuple(self.notes)))

    def _subject_folders(self, listing: FolderListing) -> dict[Path, FolderListing]:
        """The folders in `listing` that hold a subject each; the others get an entry."""
        folders = {path: inner for path in listing.folders if (inner := self._folder_of_images(path)) is not None}
        beside = {**folders, **({self.root: listing} if listing.images else {})}
        for path, inner in list(folders.items()):
            entry = self._mask_folder(path, inner, beside) or self._class_folder(path, beside)
            if entry is None and not inner.images:
                entry = self._unused_folder(path)
            if entry is not None:
                self.entries.append(entry)
                del folders[path], beside[path]
        return folders

    def _folder_of_images(self, path: Path) -> FolderListing | None:
        """The content of the folder `path`; None, after adding an entry, if it cannot be that of a subject or a class."""
        inner = _listing(path)
        if inner is None:
            self.entries.append(FolderEntry(path, "unused", "unreadable"))
        elif self._is_reserved(path) or not (inner.images or _is_class_folder(path)):
            self.entries.append(self._unused_folder(path))
        else:
            return inner
        return None

    def _is_reserved(self, path: Path) -> bool:
        """Whether a folder is that of the class images, a link to a folder that contains it, or a run directory."""
        resolved = path.resolve()
        return resolved == self.class_data_dir or self.root.resolve().is_relative_to(resolved) or is_run(path)

    def _unused_folder(self, path: Path) -> FolderEntry:
        """The entry of a folder without a subject."""
        resolved = path.resolve()
        if resolved == self.class_data_dir:
            return FolderEntry(path, "class_images")
        if self.root.resolve().is_relative_to(resolved):
            return FolderEntry(path, "unused", "link_to_itself")
        if is_run(path):
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
        images = {image.name for other, listing in beside.items() if other != path for image in listing.images}
        has_pairs = any(is_mask_in_folder(mask.name, images) for mask in inner.images)
        # Beside other subjects, a folder of this name may hold a subject, such as a carnival mask.
        are_masks = has_pairs and (self.root in beside or all(map(_is_grey, inner.images)))
        return FolderEntry(path, "mask", "mask_folder") if are_masks else None

    def _class_folder(self, path: Path, beside: dict[Path, FolderListing]) -> FolderEntry | None:
        """The entry of a folder of regularisation images; None for any other folder."""
        others = [folder_name(other) for other in beside if other != path and not _is_class_folder(other)]
        if not others:
            return None
        words = class_words(path.name, others)
        if words is None and not _is_class_folder(path):
            return None
        folders = [path] if beside[path].images else [inner for inner in beside[path].folders if first_image_below(inner)]
        advice = " ".join(_class_images_advice(folder, words) for folder in folders)
        return FolderEntry(path, "unused", "class_data", detail=advice) if advice else None

    def _kohya_project(self, listing: FolderListing) -> Path | None:
        """The folder img of a kohya project, with folders in kohya's convention; None if there is none."""
        if listing.images:
            return None
        for path in listing.folders:
            inner = _listing(path) if path.name.casefold() in IMAGE_FOLDERS else None
            if inner is not None and not inner.images and any(kohya_name(folder.name) for folder in inner.folders):
                return path
        return None

    def _beside_project(self, listing: FolderListing, project: Path) -> None:
        """Add entries for the other folders of a kohya project: reg, log, model."""
        self.entries.append(FolderEntry(project, "subject"))
        for path in listing.folders:
            if path == project:
                continue
            inner = _listing(path)
            entry = FolderEntry(path, "unused", "unreadable") if inner is None else None
            if entry is None and not self._is_reserved(path):
                entry = self._class_folder(path, {path: inner, project: listing})
            entry = entry or self._unused_folder(path)
            self.entries.append(FolderEntry(path, "unused", "kohya_sibling") if entry.kind == "image_too_deep" else entry)

    def _subject(self, listing: FolderListing) -> SubjectFolder:
        """The subject in `listing`; every file in it gets an entry."""
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
        """Add entries for the files directly in a folder; returns the text files with the caption of each image."""
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
        """Add a note on how folder names in kohya's convention are read, and that repeats are ignored."""
        names = [folder_name(subject.path) for subject in subjects]
        readings = [f"{name!r} holds {kohya.words!r}, repeats {kohya.repeats}" for name in names if (kohya := kohya_name(name))]
        if readings:
            words = (
                f"Folder names are read by kohya's convention: {'; '.join(readings)}. Repeats are ignored: every image is used "
                "equally often. For longer training, raise --max_train_steps."
            )
            self.notes.append(FolderNote("repeats_ignored", words))

    def _mixed_images_error(self, images: Sequence[Path], folders: Sequence[Path]) -> InputError:
        return InputError(
            f"{str(self.root)!r} holds images ({listed(images, self.root, 10)}) beside folders of images "
            f"({listed(folders, self.root, 10)}). For one subject, put all images directly into it; for several subjects, put "
            "the images of each into a separate folder. Move or remove the others, or give one of the folders."
        )

    def _no_image_error(self) -> InputError:
        account = FolderAccount(self.root, tuple(self.entries))
        formats = account.of_kind("other_format")
        reasons = account.warnings()[:LISTED_NAMES]
        if formats:
            reasons.insert(0, f"Images of these formats are not read: {listed(formats, self.root)}. Save them as JPEG or PNG.")
        return InputError(
            f"{str(self.root)!r} holds no image ({', '.join(sorted(IMAGE_SUFFIXES))}), nor a folder with images. Put three "
            f"to ten images of the subject there, or those of several subjects into a folder each. {' '.join(reasons)}".rstrip()
        )


def _mask_entries(listing: FolderListing, subject: str) -> Iterator[FolderEntry]:
    """The entries of masks and conditioning images."""
    for path, (kind, image) in listing.masks.items():
        yield FolderEntry(path, "mask" if kind == "mask" else "unused", kind, subject, image)


def _file_entry(path: Path, subject: str, images: Sequence[str]) -> FolderEntry:
    """The entry of a file that is neither an image nor the caption of one.

    Args:
        subject: the subject of its folder; empty for none.
        images: the names of the images in its folder.
    """
    if path.name.lower() == CLASS_PROMPT and subject:
        return FolderEntry(path, "class_prompt", subject=subject)
    if metadata_rank(path.name) is not None:
        return FolderEntry(path, "metadata", subject=subject)
    return FolderEntry(path, "unused", unused_kind(path.name, images), subject)


def _listing(path: Path) -> FolderListing | None:
    """The content of the folder `path`; None if it cannot be read."""
    try:
        return list_folder(path)
    except OSError:
        return None


def _metadata(listing: FolderListing) -> tuple[Path, ...]:
    ranked = [(rank, path) for path in listing.files if (rank := metadata_rank(path.name)) is not None]
    return tuple(path for _, path in sorted(ranked))


def _is_class_folder(path: Path) -> bool:
    return path.name.casefold() in CLASS_FOLDERS


def _is_grey(path: Path) -> bool:
    """Whether an image has no colours, like a mask."""
    try:
        pixels = np.asarray(read_image(path), dtype=np.int16)
    except InputError:
        return False
    return int((pixels.max(axis=2) - pixels.min(axis=2)).max()) <= GREY_TOLERANCE


def _class_images_advice(folder: Path, words: str | None) -> str:
    """How to use the images in `folder` as class images."""
    kohya = kohya_name(folder.name)
    words = words or (kohya.words if kohya is not None else "CLASS")
    return (
        f'To use them for prior preservation, give --with_prior_preservation --class_data_dir "{display_path(folder)}" '
        f'--class_prompt "a photo of {with_article(words)}"; to train them as a subject, rename the folder.'
    )


def _without_images(scan: FolderScan, names: Sequence[str]) -> FolderScan:
    """`scan` without the images called `names`; its account has them, and their captions and masks, as excluded.

    Raises: InputError if there is no such image, or none remains.
    """
    root, images = scan.account.folder, _named(scan, names)
    remaining = {subject.path: _without(subject, images) for subject in scan.subjects}
    subjects = tuple(subject for subject in remaining.values() if subject.images)
    if not subjects:
        raise InputError(f"excluded_images must leave an image of {str(root)!r} to train on, but has all of them.")
    excluded = {*images, *(path for path, subject in remaining.items() if not subject.images)}
    entries = tuple(
        replace(entry, use="unused", kind="excluded") if {entry.path, entry.image} & excluded else entry
        for entry in scan.account.entries
    )
    words = f"Excluded by --excluded_images: {listed(images, root, len(images))}."
    notes = (*scan.account.notes, FolderNote("excluded_images", words, is_warning=False))
    return replace(scan, subjects=subjects, account=replace(scan.account, entries=entries, notes=notes))


def _named(scan: FolderScan, names: Sequence[str]) -> list[Path]:
    """The images with these paths relative to the folder.

    Raises: InputError if there is no such image.
    """
    root = scan.account.folder
    images = {path.relative_to(root).as_posix(): path for path, _ in images_of(scan)}
    if unknown := [name for name in names if name not in images]:
        raise InputError(
            f"excluded_images must be images of {str(root)!r}, which are {', '.join(images)}, got {', '.join(unknown)}."
        )
    return sorted({images[name] for name in names})


def _without(subject: SubjectFolder, excluded: Collection[Path]) -> SubjectFolder:
    images = tuple(path for path in subject.images if path not in excluded)
    return replace(subject, images=images, captions={path: subject.captions[path] for path in images})


def images_of(scan: FolderScan) -> Iterator[tuple[Path, SubjectFolder]]:
    """Every image of every subject, with its subject."""
    for subject in scan.subjects:
        for image in subject.images:
            yield image, subject
