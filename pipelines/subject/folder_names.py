"""The meaning of names in an image folder: masks, captions, kohya's folders, and files that are not read."""

from __future__ import annotations

import os
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

from pipelines.file_names import display_path

CLASS_PROMPT = "class_prompt.txt"
CAPTION_SUFFIXES = (".txt", ".caption")
# `datasets`' imagefolder reads the first two; the others are sd-scripts' metadata for finetuning.
METADATA = ("metadata.jsonl", "metadata.csv", "metadata.json")
SD_SCRIPTS_METADATA = re.compile(r"meta_\w+\.json", re.IGNORECASE)
SYSTEM_NAMES = frozenset({"thumbs.db", "ehthumbs.db", "desktop.ini", "icon\r", "__macosx", "@eadir", "lost+found"})
# Files of the web app in an image dataset.
WEB_APP_NAMES = frozenset({"set.json"})
SUFFIX_KINDS = {
    "other_format": ".heic .heif .hif .gif .tif .tiff .avif .jxl .jp2 .j2k .svg .psd .dng .cr2 .cr3 .nef .arw .orf .rw2 .raf "
    ".raw .ico .tga .exr .jfif .jpe .ppm .pgm .xcf .eps .pdf",
    "latents_cache": ".npz .npy .pt .pth",
    "model_file": ".safetensors .ckpt .bin .gguf .onnx",
    "archive": ".zip .rar .7z .tar .gz .tgz .bz2 .xz .zst",
    "video": ".mp4 .mov .avi .mkv .webm .m4v .mpg .mpeg .3gp .wmv",
    "foreign_caption": ".json .jsonl .csv .tsv .parquet .arrow .tags .tag .cap .capt .captions .wd14 .xml .yaml .yml .toml",
}
KIND_OF_SUFFIX = {suffix: kind for kind, suffixes in SUFFIX_KINDS.items() for suffix in suffixes.split()}
KOHYA_FOLDER = re.compile(r"(\d+)_(.*\S.*)")
# OneTrainer's -masklabel and -condlabel, and NAME.mask.png, NAME_mask.png, NAME-mask.png, mask_NAME.png.
MASK_SUFFIX = re.compile(r"(.+)(?:[-_.]masklabel|[-_. ]mask)", re.IGNORECASE)
MASK_PREFIX = re.compile(r"mask[-_.](.+)", re.IGNORECASE)
CONDITION = re.compile(r"(.+)[-_.]condlabel", re.IGNORECASE)
# Words and numbers of file names that cameras and programs choose.
GENERIC_WORDS = re.compile(
    r"\d+|[a-z]|img|image|images|dsc[fn]?|dscn|dji|pxl|photo|photos|pic|picture|pasted|screenshot|whatsapp|signal|received|scan|"
    r"untitled|file|download|copy|crop|edit|edited|final|new|at|am|pm|mvimg|burst|hdr|portrait|wa\d+",
    re.IGNORECASE,
)
MASK_FOLDERS = frozenset({"mask", "masks", "masklabel", "masklabels", "mask_images", "conditioning", "conditioning_data"})
IMAGE_FOLDERS = frozenset({"img", "imgs", "image", "images"})
CLASS_FOLDERS = frozenset(
    {"reg", "regs", "regularization", "regularisation", "class", "class_data"}
    | {f"{kind}_{images}" for kind in ("reg", "regularization", "regularisation", "class") for images in ("images", "photos")}
)


@dataclass(frozen=True)
class KohyaName:
    """The parts of a folder name in kohya's convention, `REPEATS_WORDS`.

    Args:
        repeats: how often sd-scripts uses each image in an epoch.
        words: what the folder's images show.
    """

    repeats: int
    words: str


def stem_of(name: str) -> str:
    """`name` without its last suffix."""
    return name.rpartition(".")[0] or name


def suffix_of(name: str) -> str:
    """The last suffix of `name` in lower case, with its dot; empty for none."""
    head, dot, tail = name.rpartition(".")
    return f".{tail.lower()}" if head and dot else ""


def folder_name(folder: Path) -> str:
    """The name of a folder, also for `.`; for a link its own name, not that of its target."""
    return os.path.basename(os.path.abspath(folder))


def kohya_name(folder_name: str) -> KohyaName | None:
    """Parse a folder's name by kohya's convention; None for any other name."""
    match = KOHYA_FOLDER.fullmatch(folder_name)
    return None if match is None else KohyaName(int(match[1]), _spaced(match[2]))


def name_of_subject(folder_name: str) -> str:
    """The name of the subject in a folder: the folder's, with spaces for underscores and without kohya's repeats."""
    kohya = kohya_name(folder_name)
    return _spaced(folder_name) if kohya is None else kohya.words


def class_words(folder_name: str, others: Sequence[str]) -> str | None:
    """The class of a kohya regularisation folder; None for a folder that may be a subject.

    "1_toy" is the regularisation folder of "10_sks toy", as its words end the other's. So is a folder of one word and one repeat,
    such as "1_person", if all folders beside it have several words and more than one repeat.

    Args:
        others: names of the folders beside it.
    """
    kohya = kohya_name(folder_name)
    if kohya is None:
        return None
    words = kohya.words.lower().split()
    subjects = [name_of_subject(name).lower().split() for name in others]
    ends_another = any(len(subject) > len(words) and subject[-len(words) :] == words for subject in subjects)
    is_one_word = kohya.repeats == len(words) == 1
    beside_repeated = is_one_word and bool(others) and all(map(_is_repeated_phrase, others))
    return kohya.words if ends_another or beside_repeated else None


def _is_repeated_phrase(folder_name: str) -> bool:
    """Whether a folder is named like kohya's folders of a subject: more than one repeat, and a rare word with a class."""
    kohya = kohya_name(folder_name)
    return kohya is not None and kohya.repeats > 1 and len(kohya.words.split()) > 1


def paired_image(pattern: re.Pattern[str], name: str, images: Iterable[str]) -> str | None:
    """The image whose name, with or without its suffix, is the group of `pattern` in `name`; None if there is none."""
    match = pattern.fullmatch(stem_of(name))
    if match is None:
        return None
    target = match[1].casefold()
    return next((image for image in images if image != name and target in (stem_of(image).casefold(), image.casefold())), None)


def mask_or_condition(name: str, images: Sequence[str]) -> tuple[str, str] | None:
    """Whether an image file is a mask or a conditioning image of one of `images`.

    Returns: "mask" or "condition", and the image; None if no image matches, so that `name` is an image itself.
    """
    for kind, pattern in (("mask", MASK_SUFFIX), ("mask", MASK_PREFIX), ("condition", CONDITION)):
        image = paired_image(pattern, name, images)
        if image is not None:
            return kind, image
    return None


def is_mask_in_folder(mask: str, images: Iterable[str]) -> bool:
    """Whether an image in a folder of masks is named like one of `images`, or like a mask of it."""
    names = list(images)
    stems = {stem_of(image).casefold() for image in names}
    return stem_of(mask).casefold() in stems or paired_image(MASK_SUFFIX, mask, names) is not None


def caption_names(image: str, files: Iterable[str]) -> list[str]:
    """Those of `files` that hold the caption of `image`, in order of precedence.

    For 00.jpg these are 00.txt, 00.caption, 00.jpg.txt and 00.jpg.caption, with suffixes in upper or lower case.
    """
    order = [(base, suffix) for base in (stem_of(image), image) for suffix in CAPTION_SUFFIXES]
    ranked = [(order.index(key), name) for name in files if (key := (stem_of(name), suffix_of(name))) in order]
    # Lower case comes first: it sorts after upper case.
    return [name for _, name in sorted(ranked, key=lambda pair: (pair[0], [-ord(letter) for letter in pair[1]]))]


def metadata_rank(name: str) -> int | None:
    """The precedence of a metadata file, of which the lowest is used first; None for other files."""
    if name.lower() in METADATA:
        return METADATA.index(name.lower())
    return len(METADATA) if SD_SCRIPTS_METADATA.fullmatch(name) else None


def is_system_name(name: str) -> bool:
    """Whether a file or folder is hidden, or belongs to the operating system or the web app."""
    return name.startswith(".") or name.casefold() in SYSTEM_NAMES | WEB_APP_NAMES


def unused_kind(name: str, images: Iterable[str]) -> str:
    """Why a file that is neither image nor caption is not used, as a key of `folder_entries.REASONS`.

    Args:
        images: the images in its folder.
    """
    suffix = suffix_of(name)
    if suffix in CAPTION_SUFFIXES:
        return "caption_without_image"
    if suffix in KIND_OF_SUFFIX:
        return KIND_OF_SUFFIX[suffix]
    is_beside = any(stem_of(name) in (image, stem_of(image)) for image in images)
    return "foreign_caption" if is_beside else "unknown"


def _spaced(name: str) -> str:
    return display_path(name).replace("_", " ").strip()


def words_of(name: str) -> list[str]:
    """The words of a file name that describes its image, such as "duck on the beach.jpg"; empty if it says too little."""
    words = [word for word in re.split(r"[\W_]+", stem_of(name)) if word and not GENERIC_WORDS.fullmatch(word)]
    return words if len(words) > 1 and all(word.isalpha() for word in words) else []
