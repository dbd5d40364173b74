"""How folders of labelled images are laid out: class folders, perhaps below or above the folders of a split.

    cat/1.png                      class folders; folders of a class's own may lie in them
    train/cat/1.png                a folder for each part of a split, with class folders in it
    train/images/cat/1.png         the same, with one folder more in every part
    cat/train/1.png                class folders with the parts of the split in each

All of it may lie in outer folders. A folder that is called like a part of a split is one only if it holds class folders: a class
`train` holds images. Whatever could be read in two ways is refused.
"""

from __future__ import annotations

import re
from collections import Counter, defaultdict
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field, replace

from pipelines.errors import InputError
from pipelines.fewshot.split_words import CLASS_WORDS, PARTS, Part, check_one_word_each, part_named, parts_of_folders

LISTED = 5
# A name within a set, cut at its "/".
Path = list[str]


@dataclass(frozen=True)
class FolderLayout:
    """What the folders say of the images in them.

    Args:
        outer: the folders that all class folders lie in, ending in "/"; "" for none.
        keys: the classes, sorted, those without images too.
        classes: of the images' names.
        parts: of the images' names; empty where the folders are no split.
        notes: sentences on how the folders were read.
        class_place: how many folders a class folder lies in, below `outer`.
        image_place: how many folders an image lies in, below `outer`, that is in no folder within its class's.
    """

    outer: str
    keys: tuple[str, ...]
    classes: Mapping[str, str]
    parts: Mapping[str, Part] = field(default_factory=dict)
    notes: tuple[str, ...] = ()
    class_place: int = 0
    image_place: int = 1

    def class_of(self, name: str) -> str | None:
        """The class whose folder holds the file `name`; None for files outside of class folders."""
        path = name.removeprefix(self.outer).split("/")
        is_inside = name.startswith(self.outer) and len(path) > self.class_place + 1
        return path[self.class_place] if is_inside and path[self.class_place] in self.keys else None


def listed(words: Sequence[str]) -> str:
    """The first of `words`, quoted, and how many more there are."""
    some = ", ".join(repr(word) for word in words[:LISTED])
    return f"{some} and {len(words) - LISTED} more" if len(words) > LISTED else some


def counted(count: int, what: str = "image") -> str:
    """Such as "1 image" or "2 images"."""
    return f"{count} {what}" if count == 1 else f"{count} {what}s"


def with_test(parts: Mapping[str, Part]) -> dict[str, Part]:
    """The parts; where there is validation and no test, as in ImageNet's folders, the test is what is called validation."""
    if "test" in parts.values():
        return dict(parts)
    return {name: "test" if part == "val" else part for name, part in parts.items()}


def arrange(where: str, images: Sequence[str], folders: Collection[str], classes: Collection[str] = ()) -> FolderLayout:
    """Find the classes, and the parts of a split, in the names of images and folders.

    Args:
        where: the set, for errors.
        images: paths within the set, with "/" between the parts.
        folders: paths of all folders, those without images too.
        classes: folders that are classes whatever they are called.
    Raises: InputError naming the folders or images that could be read in two ways, or in none.
    """
    outer = outer_folder(images)
    inside = {name: name.removeprefix(outer).split("/") for name in images}
    stray = [name for name, path in inside.items() if len(path) < 2]
    if stray:
        raise InputError(_without_class(where, stray))
    below = [folder.removeprefix(outer).split("/") for folder in folders if folder.startswith(outer)]
    tops = {path[0] for path in below} | {path[0] for path in inside.values()}
    words = {top: part for top, part in parts_of_folders(tops).items() if top not in classes}
    if _are_split_folders(where, inside, words):
        layout = _by_split_folders(where, inside, below, words)
    else:
        layout = _by_class_folders(where, inside, tops, words)
    notes = (*_on_outer(outer, layout), *layout.notes, *_on_deeper(inside, layout), *_on_imageless(images, folders, layout))
    return replace(layout, outer=outer, notes=notes)


def outer_folder(images: Sequence[str]) -> str:
    """The folders that all images lie in and that hold folders of images, ending in "/"; "" where there are none."""
    tops = {name.partition("/")[0] for name in images}
    if len(tops) != 1 or not any(name.count("/") >= 2 for name in images):
        return ""
    outer = f"{tops.pop()}/"
    return outer + outer_folder([name.removeprefix(outer) for name in images])


def _are_split_folders(where: str, inside: Mapping[str, Path], words: Mapping[str, Part]) -> bool:
    """Whether the top folders are the parts of a split, and no classes. Raises: InputError if that cannot be told."""
    tops = {path[0] for path in inside.values()}
    deep = {path[0] for path in inside.values() if len(path) > 2}
    called, others = sorted(tops & words.keys()), sorted(tops - words.keys())
    if not called or (called[0].casefold() in CLASS_WORDS and len(called) == 1 and others and called[0] not in deep):
        return False
    remedy = f"If {called[0]!r} is a class, rename its folder or say so with --class_names {called[0]!r}=NAME"
    if others:
        raise InputError(
            f"Only some of the folders of {where} are called like the parts of a split: {listed(called)} are, {listed(others)} "
            f"are not. Move or remove those that are not, so that only parts are left. {remedy}."
        )
    if not deep.intersection(called):
        raise InputError(
            f"The folders {listed(called)} of {where} are called like the parts of a split, but hold images and no class "
            f"folders. Put the images of each part into a folder for each class, or give a CSV with the columns path, label and "
            f"split. {remedy}."
        )
    return True


def _by_split_folders(where: str, inside: Mapping[str, Path], below: Sequence[Path], words: Mapping[str, Part]) -> FolderLayout:
    """Class folders in the folders of a split, perhaps with one folder more in every part."""
    nested = {name: path for name, path in inside.items() if len(path) > 2}
    if len(nested) < len(inside):
        raise InputError(_without_class(where, [name for name in inside if name not in nested]))
    tops = {path[0]: words[path[0]] for path in nested.values()}
    check_one_word_each(tops, f"The folders of {where}")
    above = _folders_above(nested, tops)
    depth = len(next(iter(above.values())))
    classes = {name: path[depth] for name, path in nested.items()}
    empty = {path[depth] for path in below if len(path) > depth and above.get(path[0]) == path[:depth]}
    parts = {name: tops[path[0]] for name, path in nested.items()}
    notes = (_on_parts(tops, Counter(path[0] for path in nested.values())),)
    return FolderLayout("", tuple(sorted(empty | set(classes.values()))), classes, parts, notes, depth, depth + 1)


def _on_parts(tops: Mapping[str, Part], counts: Mapping[str, int]) -> str:
    """Which folder is which part, and how many images it holds."""
    order = sorted(tops, key=lambda top: PARTS.index(tops[top]))
    return f"It is split by its folders: {', '.join(f'{top!r} is {tops[top]} ({counted(counts[top])})' for top in order)}."


def _folders_above(nested: Mapping[str, Path], tops: Collection[str]) -> dict[str, Path]:
    """The folders above the class folders of each part, as many in every part: the part's own, and those that hold all of it."""
    above = {top: [top] for top in tops}
    while all(len(path) > len(above[path[0]]) + 2 for path in nested.values()) and (inner := _only_folders(nested, above)):
        above = {top: [*path, inner[top]] for top, path in above.items()}
    return above


def _only_folders(nested: Mapping[str, Path], above: Mapping[str, Path]) -> dict[str, str] | None:
    """The one folder in each part that holds all images of the part; None where a part has several."""
    held: dict[str, set[str]] = defaultdict(set)
    for path in nested.values():
        held[path[0]].add(path[len(above[path[0]])])
    return {top: names.pop() for top, names in held.items()} if all(len(names) == 1 for names in held.values()) else None


def _by_class_folders(where: str, inside: Mapping[str, Path], tops: Collection[str], words: Mapping[str, Part]) -> FolderLayout:
    """Class folders, perhaps with the parts of a split in each."""
    classes = {name: path[0] for name, path in inside.items()}
    named = sorted(set(classes.values()) & words.keys())
    notes = [f"The folder {listed(named)} holds images and no class folders, so that it is taken for a class."] if named else []
    parts = _parts_within(where, inside)
    if parts:
        notes.append("It is split by the folders within its classes.")
    return FolderLayout("", tuple(sorted(tops)), classes, parts, tuple(notes), image_place=2 if parts else 1)


def _parts_within(where: str, inside: Mapping[str, Path]) -> dict[str, Part]:
    """The parts of the images' names by the folders within their classes; none where those are no parts of a split."""
    held: dict[str, set[str]] = defaultdict(set)
    for path in inside.values():
        held[path[0]].add(path[1] if len(path) > 2 else "")
    words = {top: parts_of_folders(names) for top, names in held.items()}
    if not any(len(set(split_words.values())) > 1 for split_words in words.values()):
        return {}
    _check_all_in_parts(where, held, words)
    for top, split_words in words.items():
        check_one_word_each(split_words, f"The folders of class {top!r} of {where}")
    return {name: words[path[0]][path[1]] for name, path in inside.items()}


def _check_all_in_parts(where: str, held: Mapping[str, set[str]], words: Mapping[str, Mapping[str, Part]]) -> None:
    """Raise InputError if, of the folders that `held` names by class, some are parts of a split and some are not."""
    others = sorted(f"{top}/{name}" for top, names in held.items() for name in names - words[top].keys())
    if others:
        called = sorted(f"{top}/{name}" for top, split_words in words.items() for name in split_words)
        raise InputError(
            f"Some folders within the classes of {where} are called like the parts of a split, {listed(called)}, but not all "
            f"images lie in such: {listed(others)}. Move those into parts too, or rename the folders that are no parts."
        )


def check_spellings(where: str, classes: Mapping[str, str], parts: Mapping[str, Part]) -> None:
    """Raise InputError if a class is spelled otherwise in another part of the split, such as train/cat and test/Cat.

    Args:
        where: the set, for errors.
        classes, parts: of the images' names.
    """
    parts_of: dict[str, set[Part]] = defaultdict(set)
    for name, part in parts.items():
        parts_of[classes[name]].add(part)
    spellings: dict[str, list[str]] = defaultdict(list)
    for key in sorted(parts_of):
        spellings[re.sub(r"[\s_-]+", " ", key).strip().casefold()].append(key)
    for same in spellings.values():
        if any(parts_of[key] != parts_of[same[0]] for key in same):
            listed = [f"{key!r} is in {' and '.join(part for part in PARTS if part in parts_of[key])}" for key in same]
            raise InputError(
                f"Class names differ between the parts of {where}: {', '.join(listed)}. Give the class one name in all of them."
            )


def _without_class(where: str, names: Sequence[str]) -> str:
    """The sentence on images that lie in no class's folder."""
    if len(names) == 1:
        return f"{names[0]!r} of {where} lies in no class's folder. Move it into one, or remove it."
    return f"{names[0]!r} of {where} lies in no class's folder, nor do {len(names) - 1} more. Move them into one, or remove them."


def _on_outer(outer: str, layout: FolderLayout) -> list[str]:
    """Where one part is all that there is of a split."""
    part = next((part for folder in outer.split("/") if (part := part_named(folder))), None)
    if part is None or layout.parts:
        return []
    return [
        f"All class folders lie in {outer.rstrip('/')!r}; no other part of a split is there, so that the test is drawn from them."
    ]


def _on_deeper(inside: Mapping[str, Path], layout: FolderLayout) -> list[str]:
    """Images in folders within class folders."""
    deeper = [name for name, path in inside.items() if len(path) > layout.image_place + 1]
    if not deeper:
        return []
    verb = (
        "lies in a folder within its class's folder and is" if len(deeper) == 1 else "lie in folders within class folders and are"
    )
    return [f"{counted(len(deeper))} {verb} used for the class, such as {deeper[0]!r}."]


def _on_imageless(images: Sequence[str], folders: Collection[str], layout: FolderLayout) -> list[str]:
    """Folders without any image; of class folders the split speaks."""
    holding = {""}
    for name in images:
        while name := name.rpartition("/")[0]:
            holding.add(name)
    idle = sorted(
        folder
        for folder in folders
        if folder not in holding and folder.rpartition("/")[0] in holding and folder.rpartition("/")[2] not in layout.keys
    )
    return [f"Folders without images are not used: {listed(idle)}."] if idle else []
