"""The words that name a part of a split: in folder names, in the keys of a split.json, in the column of a CSV and its values.

One table serves all of them. Upper and lower case are the same, and so are `train`, `Train_Set`, `training-data`,
`images_train` and `train2017`.
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
    # FER2013 calls its two tests public, for choosing, and private, for the end.
    "val": (
        *("val", "valid", "validate", "validating", "validation", "dev", "devel", "development"),
        *("eval", "evaluate", "evaluating", "evaluation", "publictest"),
    ),
    "test": ("test", "tests", "testing", "tst", "holdout", "heldout", "privatetest"),
}
# As values of a split column they are plain; as names of folders they may well be classes, such as languages.
SHORT_WORDS: Mapping[str, Part] = {"tr": "train", "va": "val", "vl": "val", "te": "test", "ts": "test"}
# What is written before or after such a word.
FILLERS = (
    *("datasets", "dataset", "data", "subset", "sets", "set", "splits", "split", "partition", "part", "folder", "files", "file"),
    *("images", "image", "imgs", "img", "pictures", "picture", "pics", "pic", "photos", "photo", "samples", "sample"),
    *("examples", "example"),
)
# Not "dataset", which tells as often where an image comes from.
SPLIT_COLUMN = re.compile(r"(?!dataset$)(data|dataset|image|img)?(splits?|subset|set|part|partition|usage)(name|type)?")
PART_OF_WORD: Mapping[str, Part] = {word: part for part, words in SPLIT_WORDS.items() for word in words}
# Split words that are names of classes too: the vehicle, and the opposite of invalid.
CLASS_WORDS = frozenset({"train", "valid"})
# Where a lower-case letter is followed by a capital: segTrain.
CAPITAL = re.compile(r"(?<=[a-z])(?=[A-Z])")


def table_of_words() -> str:
    """The table in a sentence, for errors."""
    rows = "; ".join(f"{part}: {', '.join(words)}" for part, words in SPLIT_WORDS.items())
    return f"The words for parts are {rows}, in upper or lower case, also with set, data or images before or behind"


def part_named(name: str) -> Part | None:
    """The part of a split that `name` is a word for, such as "train" for "Train_Set"; None if it is none."""
    return PART_OF_WORD.get(_without_fillers(_letters(name)))


def part_written(word: str) -> Part | None:
    """The same of a word that stands where nothing else is expected, and may be as short as "tr"."""
    return part_named(word) or SHORT_WORDS.get(word.strip().casefold())


def part_of_value(value: str, where: str, column: str) -> Part:
    """The part that the value of a split column means.

    Raises: InputError with the table of words if it means none.
    """
    part = part_written(value)
    if part is None:
        raise InputError(
            f"{where} must be in one of the parts {', '.join(PARTS)}, got {value!r} in the column {column!r}. "
            f"{table_of_words()}. Mend the value, or rename the column if it is no split."
        )
    return part


def names_split_column(column: str) -> bool:
    """Whether a CSV's column of this name says which part a row is in."""
    return SPLIT_COLUMN.fullmatch(_letters(column)) is not None


def parts_of_folders(names: Collection[str]) -> dict[str, Part]:
    """The parts that folders beside each other are named after; folders that are named after none are left out.

    A word with anything before or behind it counts where a sister differs in that word alone: seg_train and seg_test.
    """
    parts = {name: part for name in names if (part := part_named(name)) is not None}
    sisters: dict[str, dict[str, Part]] = defaultdict(dict)
    for name in names:
        for rest, part in _rest_and_part(name):
            sisters[rest][name] = part
    for group in sisters.values():
        if len(set(group.values())) > 1:
            parts |= {name: part for name, part in group.items() if name not in parts}
    return parts


def check_one_word_each(parts: Mapping[str, Part], what: str) -> None:
    """Raise InputError if two of the names mean the same part.

    Args:
        parts: by name.
        what: is named so, such as "Folders".
    """
    for part in PARTS:
        same = [name for name, same_part in parts.items() if same_part == part]
        if len(same) > 1:
            names = " and ".join(map(repr, same))
            raise InputError(
                f"{what} must name each part of the split once, but {names} all mean {part}. Join them, or rename one. "
                f"{table_of_words()}."
            )


def split_column(columns: Sequence[str], values: Mapping[str, Iterable[str]], where: str) -> str | None:
    """The column of a CSV that says which part each row is in: by its name, or since all that it holds are words for parts.

    Args:
        columns: all but those of path and label.
        values: what each of them holds, empty cells left out.
        where: the CSV, for errors.
    Returns: None if there is none.
    Raises: InputError naming the columns if there are several.
    """
    held = {column: set(values[column]) for column in columns}
    candidates = [column for column in columns if _may_be_split(column, held[column])]
    if len(candidates) > 1:
        names = " and ".join(map(repr, candidates))
        raise InputError(
            f"{where} must have one column that says how it is split, but {names} both could. Remove or rename all but one."
        )
    if candidates:
        return candidates[0]
    flag = next((column for column in columns if len(held[column]) > 1 and _is_flag(_letters(column))), None)
    if flag is not None:
        raise InputError(
            f"{where} has the column {flag!r}, which speaks of a split but cannot be read as one. Make it a column 'split' "
            "with train, val or test in every row, or remove it."
        )
    return None


def _may_be_split(column: str, values: Collection[str]) -> bool:
    return bool(values) and (names_split_column(column) or _is_split(values))


def _is_split(values: Collection[str]) -> bool:
    parts = [part_written(value) for value in values]
    return None not in parts and len(set(parts)) > 1


def _is_flag(letters: str) -> bool:
    """Whether a column is called such as is_train; `valid` says as often whether an image is."""
    return letters != "valid" and part_named(letters.removeprefix("is")) is not None


def _letters(name: str) -> str:
    """Its letters alone, in lower case."""
    return re.sub(r"[\W\d_]+", "", name.casefold())


def _without_fillers(word: str) -> str:
    """`word` without what is written before or after a word for a part."""
    while word not in PART_OF_WORD:
        shorter = (cut for filler in FILLERS for cut in (word.removeprefix(filler), word.removesuffix(filler)))
        word, before = next((cut for cut in shorter if cut and cut != word), ""), word
        if not word:
            return before
    return word


def _rest_and_part(name: str) -> list[tuple[str, Part]]:
    """For each word of `name` that means a part, the name with a blank in its place, and the part."""
    tokens = re.findall(r"[^\W\d_]+|[\W\d_]+", CAPITAL.sub("_", name).casefold())
    return [
        ("".join((*tokens[:index], "{}", *tokens[index + 1 :])), PART_OF_WORD[token])
        for index, token in enumerate(tokens)
        if token in PART_OF_WORD and len(tokens) > 1
    ]
