"""Words for the parts of a split, in folder names, the keys of a split.json, and the columns and values of a CSV.

Case, digits and filler words are ignored: `train`, `Train_Set`, `training-data`, `images_train` and `train2017` mean the same.
"""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Collection, Iterable, Mapping, Sequence
from typing import Literal, get_args

from pipelines.errors import InputError

Part = Literal["train", "val", "test"]
PARTS: tuple[Part, ...] = get_args(Part)
SPLIT_WORDS: Mapping[Part, tuple[str, ...]] = {
    "train": ("train", "training", "trn", "trainval"),
    # FER2013 calls its validation part public test and its test part private test.
    "val": (
        *("val", "valid", "validate", "validating", "validation", "dev", "devel", "development"),
        *("eval", "evaluate", "evaluating", "evaluation", "publictest"),
    ),
    "test": ("test", "tests", "testing", "tst", "holdout", "heldout", "privatetest"),
}
# Only for values of a split column: as folder names they may be classes, such as languages.
SHORT_WORDS: Mapping[str, Part] = {"tr": "train", "va": "val", "vl": "val", "te": "test", "ts": "test"}
# Filler words before or after a word for a part.
FILLERS = (
    *("datasets", "dataset", "data", "subset", "sets", "set", "splits", "split", "partition", "part", "folder", "files", "file"),
    *("images", "image", "imgs", "img", "pictures", "picture", "pics", "pic", "photos", "photo", "samples", "sample"),
    *("examples", "example"),
)
# Not "dataset", which often names the source of an image.
SPLIT_COLUMN = re.compile(r"(?!dataset$)(data|dataset|image|img)?(splits?|subset|set|part|partition|usage)(name|type)?")
PART_OF_WORD: Mapping[str, Part] = {word: part for part, words in SPLIT_WORDS.items() for word in words}
# Words for parts that may also be classes: the vehicle, and the opposite of invalid.
CLASS_WORDS = frozenset({"train", "valid"})
# A word boundary in camel case, as in segTrain.
CAPITAL = re.compile(r"(?<=[a-z])(?=[A-Z])")


def table_of_words() -> str:
    """The table as a sentence, for error messages."""
    rows = "; ".join(f"{part}: {', '.join(words)}" for part, words in SPLIT_WORDS.items())
    return f"The words for parts are {rows}, in upper or lower case, also with set, data or images before or after"


def part_named(name: str) -> Part | None:
    """The part of a split that `name` means, such as "train" for "Train_Set"; None for other names."""
    return PART_OF_WORD.get(_without_fillers(_letters(name)))


def part_written(word: str) -> Part | None:
    """As `part_named`, for a word where nothing else is expected, which may be an abbreviation such as "tr"."""
    return part_named(word) or SHORT_WORDS.get(word.strip().casefold())


def part_of_value(value: str, where: str, column: str) -> Part:
    """The part that a value in a split column means.

    Raises: InputError with the table of words if it means no part.
    """
    part = part_written(value)
    if part is None:
        raise InputError(
            f"{where} must be in one of the parts {', '.join(PARTS)}, got {value!r} in the column {column!r}. "
            f"{table_of_words()}. Correct the value, or rename the column if it does not define a split."
        )
    return part


def names_split_column(column: str) -> bool:
    """Whether `column` is a name for the split column of a CSV."""
    return SPLIT_COLUMN.fullmatch(_letters(column)) is not None


def parts_of_folders(names: Collection[str]) -> dict[str, Part]:
    """The parts that sibling folders are named after; other folders are left out.

    A word inside a longer name counts if the name of a sibling differs only in that word, such as seg_train and seg_test.
    """
    parts = {name: part for name in names if (part := part_named(name)) is not None}
    siblings: dict[str, dict[str, Part]] = defaultdict(dict)
    for name in names:
        for rest, part in _rest_and_part(name):
            siblings[rest][name] = part
    for group in siblings.values():
        if len(set(group.values())) > 1:
            parts |= {name: part for name, part in group.items() if name not in parts}
    return parts


def check_one_word_each(parts: Mapping[str, Part], what: str) -> None:
    """Raise InputError if two names mean the same part.

    Args:
        parts: by name.
        what: subject of the error message, such as "The folders".
    """
    for part in PARTS:
        same = [name for name, same_part in parts.items() if same_part == part]
        if len(same) > 1:
            names = " and ".join(map(repr, same))
            raise InputError(
                f"{what} must name each part of the split once, but {names} all mean {part}. Merge them, or rename one. "
                f"{table_of_words()}."
            )


def split_column(columns: Sequence[str], values: Mapping[str, Iterable[str]], where: str) -> str | None:
    """The column of a CSV that defines the split, by its name or because all its values are words for parts; None without one.

    Args:
        columns: all columns except path and label.
        values: of each column, without empty cells.
        where: the CSV, for error messages.
    Raises: InputError naming the columns if there are several, or one is a flag such as is_train.
    """
    distinct = {column: set(values[column]) for column in columns}
    candidates = [column for column in columns if _may_be_split(column, distinct[column])]
    if len(candidates) > 1:
        names = " and ".join(map(repr, candidates))
        raise InputError(f"{where} must have one split column, but {names} both could be it. Remove or rename all but one.")
    if candidates:
        return candidates[0]
    flag = next((column for column in columns if len(distinct[column]) > 1 and _is_flag(_letters(column))), None)
    if flag is not None:
        raise InputError(
            f"{where} has the column {flag!r}, which suggests a split but has other values than words for parts. Replace it by a "
            "column 'split' with train, val or test in every row, or remove it."
        )
    return None


def _may_be_split(column: str, values: Collection[str]) -> bool:
    return bool(values) and (names_split_column(column) or _is_split(values))


def _is_split(values: Collection[str]) -> bool:
    parts = [part_written(value) for value in values]
    return None not in parts and len(set(parts)) > 1


def _is_flag(letters: str) -> bool:
    """Whether a column is a flag such as is_train; not `valid`, which may mean that the image is valid."""
    return letters != "valid" and part_named(letters.removeprefix("is")) is not None


def _letters(name: str) -> str:
    """The letters of `name` in lower case."""
    return re.sub(r"[\W\d_]+", "", name.casefold())


def _without_fillers(word: str) -> str:
    """`word` without filler words before or after a word for a part."""
    while word not in PART_OF_WORD:
        shorter = (cut for filler in FILLERS for cut in (word.removeprefix(filler), word.removesuffix(filler)))
        word, before = next((cut for cut in shorter if cut and cut != word), ""), word
        if not word:
            return before
    return word


def _rest_and_part(name: str) -> list[tuple[str, Part]]:
    """For each word of `name` that means a part: the name with {} in place of the word, and the part."""
    tokens = re.findall(r"[^\W\d_]+|[\W\d_]+", CAPITAL.sub("_", name).casefold())
    return [
        ("".join((*tokens[:index], "{}", *tokens[index + 1 :])), PART_OF_WORD[token])
        for index, token in enumerate(tokens)
        if token in PART_OF_WORD and len(tokens) > 1
    ]
