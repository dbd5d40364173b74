"""The prompt of each training image: its caption from a file, or else the instance prompt.

See `caption_files` for the files and their precedence. In a folder of folders, each folder is a subject.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from pipelines.errors import InputError
from pipelines.subject.caption_files import read_captions
from pipelines.subject.data import TrainingImage
from pipelines.subject.folder_names import CLASS_PROMPT, folder_name, name_of_subject
from pipelines.subject.folder_scan import images_of, scan_folder
from pipelines.text_files import read_text

SUBJECT_FIELD = "{subject}"


def subject_folders(
    folder: str | Path, class_data_dir: str | Path | None = None, excluded_images: Sequence[str] = ()
) -> list[Path]:
    """The folders of the subjects: `folder` itself if it contains images, else its folders that do.

    Args:
        class_data_dir, excluded_images: as in `scan_folder`.
    Raises: InputError as `scan_folder`.
    """
    return [subject.path for subject in scan_folder(folder, class_data_dir, excluded_images).subjects]


def subject_name(folder: Path) -> str:
    """The name of the subject in `folder`: the folder's, with spaces for underscores and without kohya's repeats."""
    return name_of_subject(folder_name(folder))


def find_captioned(
    folder: str | Path,
    instance_prompt: str | None,
    class_data_dir: str | Path | None = None,
    excluded_images: Sequence[str] = (),
) -> list[TrainingImage]:
    """The images of every subject in `folder`, sorted by subject and name, each with its prompt.

    Args:
        instance_prompt: of the images without a caption; `{subject}` in it becomes the name of the subject's folder.
        class_data_dir, excluded_images: as in `scan_folder`.
    Raises: InputError naming a folder or file that cannot be used, or an image without a prompt.
    """
    scan = scan_folder(folder, class_data_dir, excluded_images)
    captions = read_captions(scan).by_image
    images = []
    for path, subject in images_of(scan):
        prompt = instance_prompt.replace(SUBJECT_FIELD, subject.name) if instance_prompt is not None else None
        caption = captions[path].text if path in captions else prompt
        if caption is None:
            raise InputError(
                f"{str(path)!r} has no caption. Give --instance_prompt, or write its caption into {path.stem}.txt beside it."
            )
        images.append(TrainingImage(path, caption, subject=subject.name))
    return images


def class_prompts(
    folder: str | Path,
    class_prompt: str | None,
    class_data_dir: str | Path | None = None,
    excluded_images: Sequence[str] = (),
) -> dict[str, str]:
    """The class prompt of each subject in `folder`: its folder's class_prompt.txt, or else `class_prompt`.

    Args:
        class_data_dir, excluded_images: as in `scan_folder`.
    Raises: InputError naming a subject that has neither.
    """
    prompts = {}
    for subject in scan_folder(folder, class_data_dir, excluded_images).subjects:
        file = next((path for path in subject.path.iterdir() if path.name.lower() == CLASS_PROMPT), None)
        prompt = read_text(file).strip() if file is not None else class_prompt
        if not prompt:
            raise InputError(
                f"Prior preservation needs the class of the subject in {str(subject.path)!r}: give --class_prompt, as in "
                f"'a photo of a dog', or write one into {CLASS_PROMPT} there."
            )
        prompts[subject.name] = prompt
    return prompts
