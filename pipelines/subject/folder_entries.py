"""The account of an image folder: what each file and folder in it is used for, or why it is not used."""

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
    "broken_link": "These links point to nothing. Restore what they point to, or remove them.",
    "unreadable": "There is no permission to read them. Change their permissions, or remove them.",
    "not_a_file": "They are neither files nor folders.",
    "mask": "They are masks of images, and training does not use masks yet.",
    "mask_folder": "It holds masks of images, and training does not use masks yet.",
    "condition": "They are conditioning images of another trainer, which are not used.",
    "class_data": "The folder looks like regularisation (class) images, which are never trained as a subject.",
    "image_too_deep": "Images are looked for in the folder itself or in one folder for each subject, not "
    "further down. Move them up, or give the folder that they lie in.",
    "no_images": "No image lies in these folders.",
    "link_to_itself": "The link points to the folder that it lies in.",
    "run": "It is the output of a run.",
    "kohya_sibling": "In a kohya project only the folder img holds the subject's images.",
    "caption_without_image": "No image has their name. A caption is called as its image: 00.txt or 00.jpg.txt for 00.jpg.",
    "foreign_caption": "No captions are read from them. Write captions into text files beside images, or into metadata.jsonl.",
    "latents_cache": "They are what another trainer computed from the images, and are computed anew.",
    "model_file": "They are model files. Give a base model with --pretrained_model_name_or_path.",
    "archive": "Archives are not opened. Unpack them, and give the folder with the images.",
    "video": "Videos are not read. Save single frames as JPEG or PNG.",
    "unknown": "Files of these kinds are not read.",
    "other_caption": "Another source of captions comes first.",
    "same_caption": "It says the same as the source of captions that comes first.",
    "other_format": "Images of this format are not read. Save them as JPEG or PNG.",
    "class_caption": "Class images all have the class prompt; captions beside them are not read.",
    "class_folder": "Class images lie directly in the folder of their class; folders below it are not read.",
    "class_elsewhere": "With several classes, class images lie in one folder for each class.",
    "spare": "There are more class images than --num_class_images asks for.",
    "system": "It is hidden, or a file of the system or of the web app.",
}
# In photos.json alone: nobody has to do anything about these, or another message names them.
QUIET = frozenset({"system", "other_caption", "same_caption", "other_format", "spare"})

# In one sentence whatever the detail, of which the first is an example.
SUMMARIZED = frozenset({"image_too_deep"})


@dataclass(frozen=True)
class FolderEntry:
    """One file or folder of an image folder.

    Args:
        path: where it lies.
        use: what it is used for.
        kind: why it is not used, a key of `REASONS`; empty for what is used.
        subject: whose image, caption or folder it is.
        image: the image whose caption or mask it is.
        detail: what `REASONS` cannot say of its kind, such as where images lie.
    """

    path: Path
    use: Use
    kind: str = ""
    subject: str = ""
    image: Path | None = None
    detail: str = ""

    @property
    def reason(self) -> str:
        """Why it is not used; empty for what is used."""
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
    """Something to know of a folder as a whole.

    Args:
        kind: for machines.
        words: for people.
        is_warning: whether it may not be what the user meant.
    """

    kind: str
    words: str
    is_warning: bool = True


@dataclass(frozen=True)
class FolderAccount:
    """Everything in an image folder: used, or not used and why.

    Args:
        folder: the folder.
        entries: its files and folders; those below a folder that is not used are not listed.
        notes: what is to be known of it as a whole.
    """

    folder: Path
    entries: tuple[FolderEntry, ...] = ()
    notes: tuple[FolderNote, ...] = ()

    def of_kind(self, kind: str) -> list[Path]:
        """What is not used for the reason `kind`."""
        return [entry.path for entry in self.entries if entry.kind == kind]

    def warnings(self) -> list[str]:
        """What is not used and why, one sentence for each reason, and the notes that are warnings."""
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
        """The notes that are no warnings."""
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
    """The first `limit` of `paths` in quotes, below `folder` where they lie in it, and how many more there are."""
    names = [repr(_below(path, folder)) for path in paths]
    more = len(names) - limit
    return ", ".join(names[:limit]) + (f" and {more} more" if more > 0 else "")


def _below(path: Path | str, folder: Path | None) -> str:
    if isinstance(path, str) or folder is None or not path.is_relative_to(folder) or path == folder:
        return str(path)
    return path.relative_to(folder).as_posix()
