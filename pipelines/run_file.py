"""The base class of a run directory's JSON files, and those files that `pipelines` reads.

Each file is a dataclass with a version; `training.runs.run_files` has the others. No model library is imported, so that readers
such as the web app stay light.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import MISSING, asdict, dataclass, field, fields, replace
from pathlib import Path
from typing import Any, ClassVar, Self

from pipelines.deprecated_flags import with_current_names
from pipelines.errors import InputError
from pipelines.text_files import write_text_atomically

VERSION = "version"
RESTORE = "Restore the file that the run wrote."


@dataclass(frozen=True)
class RunFile:
    """A JSON file of a run directory.

    Subclasses set `NAME`, the file's name; `FILE_VERSION`, raised when keys change; and `RENAMED`, the keys of earlier versions
    with their present names. Files without a version are of version 1.
    """

    NAME: ClassVar[str]
    FILE_VERSION: ClassVar[int] = 1
    RENAMED: ClassVar[Mapping[str, str]] = {}

    def to_json(self) -> dict[str, Any]:
        """The fields as plain values, with the version."""
        return {VERSION: self.FILE_VERSION, **asdict(self)}

    @classmethod
    def from_json(cls, content: Any) -> Self:
        """Read the fields of this or an earlier version; unknown keys are ignored.

        Raises: InputError if the content is of a newer version, is not an object, or lacks a field.
        """
        values = content if isinstance(content, Mapping) else cls.object_of(content)
        version = values.get(VERSION, 1)
        if not isinstance(version, int) or version > cls.FILE_VERSION:
            raise InputError(
                f"{cls.NAME} has version {version!r}; this version of NoRA Vision reads versions up to {cls.FILE_VERSION}. "
                "Update NoRA Vision."
            )
        try:
            current = {cls.RENAMED.get(name, name): value for name, value in values.items()}
            return cls(**fields_of(cls, cls.upgrade(current, version), cls.NAME))
        except InputError:
            raise
        except KeyError as error:
            raise InputError(f"{cls.NAME} lacks {error}. {RESTORE}") from error
        except (TypeError, AttributeError, ValueError) as error:
            raise InputError(f"{cls.NAME} cannot be read: {error}. {RESTORE}") from error

    @classmethod
    def upgrade(cls, values: dict[str, Any], version: int) -> dict[str, Any]:
        """`values` of a file of `version`, already under their present names, in the form of the present version."""
        return values

    @classmethod
    def read(cls, folder: Path, name: str | None = None) -> Self | None:
        """The file in `folder`; None if there is none.

        Args:
            name: of the file, if not `NAME`.
        Raises: InputError if it cannot be read.
        """
        path = folder / (name or cls.NAME)
        try:
            content = json.loads(path.read_text(encoding="utf-8"))
        except (FileNotFoundError, NotADirectoryError):
            return None
        except (ValueError, RecursionError) as error:
            raise InputError(f"{str(path)!r} is not JSON ({error}). {RESTORE}") from error
        return cls.from_json(content)

    @classmethod
    def object_of(cls, content: Any) -> Mapping[str, Any]:
        """The object for a file that holds something else.

        Raises: InputError, unless earlier versions of the file had another form.
        """
        raise InputError(f"{cls.NAME} must hold a JSON object, got {type(content).__name__}. {RESTORE}")

    def text(self) -> str:
        """The content of the file."""
        return json.dumps(self.to_json(), indent=2) + "\n"

    def write(self, folder: Path, name: str | None = None) -> None:
        """Write the file into `folder`; a reader sees the old file or the new one.

        Args:
            name: of the file, if not `NAME`.
        """
        write_text_atomically(folder / (name or self.NAME), self.text())


def fields_of(kind: type, values: Mapping[str, Any], name: str) -> dict[str, Any]:
    """The entries of `values` that are fields of the dataclass `kind`.

    Args:
        name: of the file in the error message.
    Raises: InputError if a field without a default is missing.
    """
    required = [each.name for each in fields(kind) if each.default is MISSING and each.default_factory is MISSING]
    if missing := [each for each in required if each not in values]:
        raise InputError(f"{name} lacks {', '.join(map(repr, missing))}. {RESTORE}")
    return {each.name: values[each.name] for each in fields(kind) if each.name in values}


@dataclass(frozen=True)
class ResolvedOptions(RunFile):
    """All options of a run as they were resolved; in the file, the groups stand beside the version.

    Args:
        groups: the options by group.
    """

    NAME: ClassVar[str] = "options.json"

    groups: dict[str, Any] = field(default_factory=dict)

    @classmethod
    def upgrade(cls, values: dict[str, Any], version: int) -> dict[str, Any]:
        """Collect the groups, and give renamed options their present names."""
        return {"groups": with_current_names({name: value for name, value in values.items() if name != VERSION})}

    def to_json(self) -> dict[str, Any]:
        """The groups with the version."""
        return {VERSION: self.FILE_VERSION, **self.groups}


@dataclass(frozen=True)
class Provenance(RunFile):
    """Where a run comes from.

    Args:
        base_model: its name and the hashes of its weights.
        images, heldout: name and hash of each image that is trained on or held out.
        code: hash of the sources, and their commit.
        versions: of Python and of the libraries.
        seed: of all random choices, or one for each repetition.
        command: the command line, without access tokens; None in a published file without names.
        device: processor and accelerator.
        options: as resolved, by group; None like `command`.
    """

    NAME: ClassVar[str] = "provenance.json"
    FILE_VERSION: ClassVar[int] = 2
    RENAMED: ClassVar[Mapping[str, str]] = {"pictures": "images"}

    base_model: dict[str, Any]
    images: list[dict[str, str]] = field(default_factory=list)
    heldout: list[dict[str, str]] = field(default_factory=list)
    code: dict[str, Any] = field(default_factory=dict)
    versions: dict[str, str | None] = field(default_factory=dict)
    seed: int | list[int] | None = None
    command: str | None = None
    device: dict[str, Any] = field(default_factory=dict)
    options: dict[str, Any] | None = None

    def without_names(self) -> Provenance:
        """The provenance for publishing without captions, paths and names."""
        model = self.base_model
        public = model["public"]
        return replace(
            self,
            base_model={
                "name": model["name"] if public else None,
                "files": model["files"] if public else sorted(model["files"].values()),
            },
            images=[{"sha256": image["sha256"]} for image in self.images],
            heldout=[{"sha256": image["sha256"]} for image in self.heldout],
            command=None,
            options=None,
        )
