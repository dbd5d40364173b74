"""The account of an image folder: the use of each file and folder in it, or the reason why it is not used."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from pipelines.file_names import display_path

Use = Literal["image", "caption", "mask", "class_prompt", "metadata", "subject", "class_images", "unused"]
LISTED_NAMES = 3
# Why a file or folder is not used, by kind, in sentences that follow its name.
REASONS = {
    "broken_link": "Their targets do not exist. Restore the targets, or remove the links.",
    "unreadable": "There is no permission to read them. Change their permissions, or remove them.",
    "not_a_file": "They are neither files nor folders.",
    "mask": "They are masks of images, and training does not use masks yet.",
    "mask_folder": "It holds masks of images, and training does not use masks yet.",
    "condition": "They are conditioning images for another trainer.",
    "class_data": "The folder seems to hold regularisation (class) images, which are not trained as a subject.",
    "image_too_deep": "Images are read from the folder itself or from one folder for each subject, but not from deeper folders. "
    "Move them up, or give the folder that contains them.",
    "no_images": "These folders contain no images.",
    "link_to_itself": "The link points to the folder that contains it.",
    "run": "It is the output of a run.",
    "kohya_sibling": "In a kohya project, only the folder img holds the subject's images.",
    "caption_without_image": "No image has their name. A caption file is named after its image: 00.txt or 00.jpg.txt for 00.jpg.",
    "foreign_caption": "Captions are not read from them. Write captions to text files beside the images, or to metadata.jsonl.",
    "latents_cache": "They are the cache of another trainer. Latents are computed again.",
    "model_file": "They are model files. Give a base model with --pretrained_model_name_or_path.",
    "archive": "Archives are not opened. Unpack them, and give the folder with the images.",
    "video": "Videos are not read. Save single frames as JPEG or PNG.",
    "unknown": "Files of this type are not read.",
    "other_caption": "Another source of captions takes precedence.",
    "same_caption": "It has the same captions as the source that takes precedence.",
    "other_format": "Images of this format are not read. Save them as JPEG or PNG.",
    "class_caption": "All class images have the class prompt; their captions are not read.",
    "class_folder": "Class images are read from the folder of their class, but not from folders in it.",
    "class_elsewhere": "With several classes, class images are read from one folder for each class.",
    "spare": "There are more class images than --num_class_images asks for.",
    "excluded": "It is excluded by --excluded_images, or belongs to an image that is.",
    "system": "It is hidden, or belongs to the operating system or the web app.",
}
# Listed only in photos.json: they need no action, or another message names them.
QUIET = frozenset({"system", "other_caption", "same_caption", "other_format", "spare", "excluded"})

# All entries of these kinds make one sentence, with the first one's detail as an example.
SUMMARIZED = frozenset({"image_too_deep"})


@dataclass(frozen=True)
class FolderEntry:
    """One file or folder of an image folder.

    Args:
        path: of the file or folder.
        use: what it is used for.
        kind: why it is not used, a key of `REASONS`; empty if it is used.
        subject: the name of the subject that it belongs to.
        image: the image whose caption or mask it is.
        detail: details for this entry beside the text in `REASONS`, such as where images are.
    """

    path: Path
    use: Use
    kind: str = ""
    subject: str = ""
    image: Path | None = None
    detail: str = ""

    @property
    def reason(self) -> str:
        """Why it is not used; empty if it is used."""
        return " ".join(part for part in (REASONS.get(self.kind, ""), self.detail) if part)

    def to_json(self) -> dict[str, Any]:
        """Plain values, for photos.json."""
        image = None if self.image is None else display_path(self.image)
        values = {"path": display_path(self.path), "use": self.use, "kind": self.kind, "subject": self.subject, "image": image}
        return {**values, "detail": self.detail, "reason": self.reason}

    @classmethod
    def from_json(cls, values: Mapping[str, Any]) -> FolderEntry:
        """The entry that `to_json` wrote."""
        image = None if values["image"] is None else Path(values["image"])
        return cls(Path(values["path"]), values["use"], values["kind"], values["subject"], image, values["detail"])


@dataclass(frozen=True)
class FolderNote:
    """A remark on a whole folder.

    Args:
        kind: its identifier.
        words: its text.
        is_warning: whether the user may have intended something else.
    """

    kind: str
    words: str
    is_warning: bool = True


@dataclass(frozen=True)
class FolderAccount:
    """Everything in an image folder: used, or not used and why.

    Args:
        folder: the folder.
        entries: its files and folders; the content of unused folders is not listed.
        notes: remarks on the whole folder.
    """

    folder: Path
    entries: tuple[FolderEntry, ...] = ()
    notes: tuple[FolderNote, ...] = ()

    def of_kind(self, kind: str) -> list[Path]:
        """The files and folders that are not used for the reason `kind`."""
        return [entry.path for entry in self.entries if entry.kind == kind]

    def warnings(self) -> list[str]:
        """One sentence on unused files and folders for each reason, and the notes that are warnings."""
        groups: dict[tuple[str, str], list[FolderEntry]] = {}
        for entry in self.entries:
            if entry.kind and entry.kind not in QUIET:
                detail = "" if entry.kind in SUMMARIZED else entry.detail
                groups.setdefault((entry.kind, detail), []).append(entry)
        lines = [
            f"Not used: {listed([entry.path for entry in entries], self.folder)}. {entries[0].reason}"
            for entries in groups.values()
        ]
        return [*lines, *(note.words for note in self.notes if note.is_warning)]

    def infos(self) -> list[str]:
        """The notes that are not warnings."""
        return [note.words for note in self.notes if not note.is_warning]

    def to_json(self) -> dict[str, Any]:
        """Plain values, for photos.json."""
        notes = [{"kind": note.kind, "words": note.words, "is_warning": note.is_warning} for note in self.notes]
        return {"folder": display_path(self.folder), "files": [entry.to_json() for entry in self.entries], "notes": notes}

    @classmethod
    def from_json(cls, values: Mapping[str, Any]) -> FolderAccount:
        """The account that `to_json` wrote."""
        notes = tuple(FolderNote(**note) for note in values["notes"])
        return cls(Path(values["folder"]), tuple(map(FolderEntry.from_json, values["files"])), notes)


def listed(paths: Iterable[Path | str], folder: Path | None = None, limit: int = LISTED_NAMES) -> str:
    """The first `limit` of `paths` in quotes, relative to `folder` if they are in it, and the number of the others."""
    names = [repr(_below(path, folder)) for path in paths]
    more = len(names) - limit
    return ", ".join(names[:limit]) + (f" and {more} more" if more > 0 else "")


def _below(path: Path | str, folder: Path | None) -> str:
    if isinstance(path, str) or folder is None or not path.is_relative_to(folder) or path == folder:
        return str(path)
    return path.relative_to(folder).as_posix()
