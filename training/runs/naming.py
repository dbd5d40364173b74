"""The names of a run: the title that users see and may change, and the names of its adapter's files."""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

from pipelines.built_in import is_built_in
from pipelines.errors import InputError
from pipelines.methods import title_of as adapter_title
from pipelines.run_file import RunFile

PROMPT = re.compile(r"an? (?:photo|photograph|picture|image) of (?P<words>.+)", re.IGNORECASE)
SAMPLE_TITLE, SAMPLE_CLASSES = "sks toy", "handwritten digits"
ZERO_SHOT, PIXELS, PROBE = "zeroshot", "pixels", "linear_probe"
# The name of each baseline, and what it does.
BASELINES = {
    ZERO_SHOT: ("Zero-shot", "no training, only the class names"),
    PIXELS: ("Raw pixels", "no model at all (the control)"),
    PROBE: ("Linear probe", "logistic regression on the image features"),
    "tip_adapter": ("Tip-Adapter", "compares each image with the cached training images"),
    "tip_adapter_f": ("Tip-Adapter-F", "Tip-Adapter with a fine-tuned cache"),
    "clap": ("CLAP", "a linear probe kept close to the zero-shot weights"),
    "coop": ("CoOp", "learned prompt tokens around the class names"),
    "clip_adapter": ("CLIP-Adapter", "a small network after the image encoder"),
    "lp_plus_plus": ("LP++", "a linear classifier whose weights include the class embeddings"),
    "prolip": ("ProLIP", "fine-tunes the last projection of the image encoder"),
    "taskres": ("TaskRes", "a learned offset to the class embeddings"),
    "gda": ("GDA", "Gaussian discriminant analysis"),
}
LONGEST_TITLE, LONGEST_STEM, NAMED_CLASSES = 60, 60, 3
DEMO_ONLY = "This file fits the demo model of NoRA Vision alone. It does not work with SDXL."
SDXL = "This file fits SDXL 1.0 and the models that were fine-tuned from it."
Options = Mapping[str, Any]


@dataclass(frozen=True)
class RunTitle(RunFile):
    """The title that a user gave a run."""

    NAME: ClassVar[str] = "title.json"

    title: str


def set_title(folder: Path, title: str) -> None:
    """Give the run in `folder` a title; an empty one restores the default.

    Raises: InputError if it is too long.
    """
    words = " ".join(title.split())
    if len(words) > LONGEST_TITLE:
        raise InputError(f"A title may have at most {LONGEST_TITLE} characters, got {len(words)}. Shorten it.")
    if words:
        RunTitle(words).write(folder)
    else:
        (folder / RunTitle.NAME).unlink(missing_ok=True)


def title_of(folder: Path, options: Options, task: str) -> str:
    """The title of the run in `folder`: the user's, else the default.

    Args:
        options: of the run, by group.
        task: "subject", "classify" or "arena".
    Raises: InputError if title.json cannot be read.
    """
    given = RunTitle.read(folder)
    return default_title(options, task) if given is None else given.title


def default_title(options: Options, task: str) -> str:
    """The trigger word and the class word of a subject, the classes of a classifier, or the data of an arena."""
    data = options.get("data") or {}
    titles = {"classify": _classes, "arena": _compared}
    title = titles[task](data) if task in titles else _subject(data.get("instance_prompt"))
    return title if len(title) <= LONGEST_TITLE else f"{title[: LONGEST_TITLE - 1]}…"


def _subject(prompt: object) -> str:
    words = " ".join(str(prompt).split()) if prompt else SAMPLE_TITLE
    match = PROMPT.fullmatch(words)
    return match["words"] if match else words


def _classes(data: Options) -> str:
    given = data.get("class_names")
    names = [str(each).partition("=")[2] for each in given] if isinstance(given, list) else []
    if names:
        return _listed(names)
    folder = data.get("dataset") or data.get("data_dir")
    return Path(str(folder)).name if folder else SAMPLE_CLASSES


def _compared(data: Options) -> str:
    folder, words = data.get("subjects_dir"), [str(each).partition("=")[2] for each in data.get("class_words") or ()]
    subjects = words or ([Path(str(folder)).name] if folder else [])
    return _listed([*subjects, *(Path(str(each)).stem for each in data.get("datasets") or ())])


def _listed(names: Sequence[str]) -> str:
    more = len(names) - NAMED_CLASSES
    return ", ".join(names[:NAMED_CLASSES]) + (f" and {more} more" if more > 0 else "")


def file_stem(title: str, step: int) -> str:
    """The name of an adapter's files without their suffix, such as sks-duck-step40; safe in every file system."""
    plain = unicodedata.normalize("NFKC", title)
    stem = re.sub(r"[^\w]+", "-", plain).strip("-_")[:LONGEST_STEM].rstrip("-_")
    return f"{stem or 'adapter'}-step{step}"


def header_of(title: str, options: Options, step: int, private: bool = False) -> dict[str, str]:
    """What the header of an exported LoRA file says of the run: title, trigger phrase and base model.

    Args:
        private: without words of the user and the name of a model that is not public.
    """
    model = Path(str((options.get("model") or {}).get("pretrained_model_name_or_path"))).name
    header = {"modelspec.description": DEMO_ONLY if is_built_in(model) else SDXL}
    if private:
        return header
    phrase = _subject((options.get("data") or {}).get("instance_prompt"))
    return header | {
        "modelspec.title": f"{title}, step {step}",
        "modelspec.trigger_phrase": phrase,
        "ss_sd_model_name": model,
    }


def method_name(method: str) -> str:
    """The display name of an adapter method or a baseline."""
    return BASELINES[method][0] if method in BASELINES else adapter_title(method)


def variant_title(label: str) -> str:
    """The display name of a method with options of an arena, written as in its command: name:option=value,option=value."""
    method, _, options = label.partition(":")
    given = options.replace("=", " ").replace(",", ", ")
    return f"{method_name(method)} ({given})" if given else method_name(method)
