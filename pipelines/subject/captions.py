"""What each picture of one or several subjects shows: captions from files, else the instance prompt.

A picture's caption is, in this order: the `text` of its line in a metadata.jsonl (as in `datasets`' imagefolder), the text
file of its name beside it, the instance prompt. In a folder of folders each folder is a subject.
"""

from __future__ import annotations

import json
from pathlib import Path

from pipelines.errors import InputError
from pipelines.file_names import display_path
from pipelines.pictures import PICTURE_SUFFIXES, is_picture
from pipelines.subject.data import Picture, find_pictures

METADATA, CLASS_PROMPT = "metadata.jsonl", "class_prompt.txt"
SUBJECT_FIELD = "{subject}"


def subject_folders(folder: str | Path) -> list[Path]:
    """The folders that hold one subject each: `folder` itself if pictures lie directly in it, else its folders with pictures.

    Raises: InputError if there is no such folder or no picture in it.
    """
    folder = Path(folder)
    if not folder.is_dir():
        raise InputError(f"There is no folder {str(folder)!r}. Give --instance_data_dir a folder with pictures of the subject.")
    if any(map(is_picture, folder.iterdir())):
        return [folder]
    inner = (path for path in folder.iterdir() if path.is_dir() and not path.name.startswith("."))
    found = sorted(path for path in inner if any(map(is_picture, path.iterdir())))
    if not found:
        raise InputError(
            f"{str(folder)!r} holds no picture ({', '.join(sorted(PICTURE_SUFFIXES))}), nor a folder with pictures. Put three "
            "to ten pictures of the subject there, or of each subject into a folder of its own."
        )
    return found


def subject_name(folder: Path) -> str:
    """What the subject in `folder` is called: as the folder, with spaces for underscores."""
    return display_path(folder.resolve().name).replace("_", " ")


def find_captioned(folder: str | Path, instance_prompt: str | None) -> list[Picture]:
    """The pictures of every subject in `folder`, sorted by subject and name, each with its prompt.

    Args:
        instance_prompt: of the pictures without a caption; `{subject}` in it becomes the name of the subject's folder.
    Raises: InputError naming the folder or file that cannot be used, or a picture left without any prompt.
    """
    found = []
    listed = read_metadata(Path(folder))
    for home in subject_folders(folder):
        captions = listed | read_metadata(home)
        subject = subject_name(home)
        prompt = instance_prompt.replace(SUBJECT_FIELD, subject) if instance_prompt is not None else None
        for path in find_pictures(home):
            caption = captions.get(path) or _sidecar(path) or prompt
            if caption is None:
                raise InputError(
                    f"{str(path)!r} has no caption. Give --instance_prompt, or write its caption into {path.stem}.txt beside it."
                )
            found.append(Picture(path, caption, subject=subject))
    return found


def read_metadata(folder: Path) -> dict[Path, str]:
    """The captions that `folder`'s metadata.jsonl gives, by picture; none where there is no such file.

    Raises: InputError naming the line that cannot be used.
    """
    file = folder / METADATA
    captions: dict[Path, str] = {}
    if not file.is_file():
        return captions
    for number, line in enumerate(_read_text(file).splitlines(), start=1):
        if not line.strip():
            continue
        path, caption = _metadata_line(line, f"Line {number} of {str(file)!r}")
        if not (folder / path).is_file():
            raise InputError(f"Line {number} of {str(file)!r} names {path!r}, which is not there. Mend or remove the line.")
        captions[folder / path] = caption
    return captions


def _metadata_line(line: str, where: str) -> tuple[str, str]:
    remedy = 'Write one object a line, such as {"file_name": "00.jpg", "text": "a photo of sks dog"}.'
    try:
        values = json.loads(line)
    except json.JSONDecodeError as error:
        raise InputError(f"{where} is not JSON ({error}). {remedy}") from error
    if not isinstance(values, dict):
        raise InputError(f"{where} must be an object, got {line.strip()[:40]!r}. {remedy}")
    for name in ("file_name", "text"):
        if not isinstance(values.get(name), str) or not values[name].strip():
            raise InputError(f"{where} must have a {name!r} that is not empty, got {values.get(name)!r}. {remedy}")
    return values["file_name"], values["text"].strip()


def _sidecar(picture: Path) -> str | None:
    """The caption in the text file beside `picture`; None where there is none."""
    file = picture.with_suffix(".txt")
    if not file.is_file():
        return None
    caption = _read_text(file).strip()
    if not caption:
        raise InputError(f"{str(file)!r} is empty. Write the caption of {picture.name!r} into it, or remove it.")
    return caption


def class_prompts(folder: str | Path, class_prompt: str | None) -> dict[str, str]:
    """For each subject in `folder` the prompt of its class: its folder's class_prompt.txt, else `class_prompt`.

    Raises: InputError naming a subject that has neither.
    """
    prompts = {}
    for home in subject_folders(folder):
        file = home / CLASS_PROMPT
        prompt = _read_text(file).strip() if file.is_file() else class_prompt
        if not prompt:
            raise InputError(
                f"Prior preservation needs the class of the subject in {str(home)!r}: give --class_prompt, as in 'a photo of a "
                f"dog', or write one into {CLASS_PROMPT} there."
            )
        prompts[subject_name(home)] = prompt
    return prompts


def _read_text(file: Path) -> str:
    try:
        return file.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        raise InputError(f"{str(file)!r} is not UTF-8 text ({error}). Save it as UTF-8.") from error
