"""Read the classes and the split of a dataset from its folders.

    cat/1.png                      class folders, which may have subfolders
    train/cat/1.png                a folder for each part of a split, with class folders inside
    train/images/cat/1.png         the same, with a further folder in every part
    cat/train/1.png                class folders, with a folder for each part of the split inside

All of this may be inside outer folders. A folder named like a part of a split is a part only if it contains class folders:
a folder `train` of images is a class. Ambiguous layouts are refused.
"""

from __future__ import annotations

import re
from collections import Counter, defaultdict
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field, replace

from pipelines.errors import InputError
from pipelines.fewshot.split_words import CLASS_WORDS, PARTS, Part, check_one_word_each, part_named, parts_of_folders

LISTED = 5
# A path within the dataset, split at "/".
Path = list[str]


@dataclass(frozen=True)
class FolderLayout:
    """The classes and the split that the folders of a dataset define.

    Args:
        outer: the folders around all class folders, ending in "/"; "" if there are none.
        keys: the classes, sorted, including those without images.
        classes: class by image name.
        parts: part of the split by image name; empty if the folders define no split.
        notes: sentences on how the folders were read.
        class_depth: number of folders between `outer` and a class folder.
        image_depth: number of folders between `outer` and an image that is not in a subfolder of its class.
    """

    outer: str
    keys: tuple[str, ...]
    classes: Mapping[str, str]
    parts: Mapping[str, Part] = field(default_factory=dict)
    notes: tuple[str, ...] = ()
    class_depth: int = 0
    image_depth: int = 1

    def class_of(self, name: str) -> str | None:
        """The class whose folder contains the file `name`; None for files outside the class folders."""
        path = name.removeprefix(self.outer).split("/")
        is_inside = name.startswith(self.outer) and len(path) > self.class_depth + 1
        return path[self.class_depth] if is_inside and path[self.class_depth] in self.keys else None


def listed(words: Sequence[str]) -> str:
    """The first of `words`, quoted, and the number of the others."""
    some = ", ".join(repr(word) for word in words[:LISTED])
    return f"{some} and {len(words) - LISTED} more" if len(words) > LISTED else some


def counted(count: int, what: str = "image") -> str:
    """A number and its noun, such as "1 image" or "2 images"."""
    return f"{count} {what}" if count == 1 else f"{count} {what}s"


def is_or_are(count: int) -> str:
    """The verb for `count` things."""
    return "is" if count == 1 else "are"


def with_test(parts: Mapping[str, Part]) -> dict[str, Part]:
    """`parts`; if there is a validation part and no test part, as in ImageNet's folders, validation becomes test."""
    if "test" in parts.values():
        return dict(parts)
    return {name: "test" if part == "val" else part for name, part in parts.items()}


def arrange(where: str, images: Sequence[str], folders: Collection[str], classes: Collection[str] = ()) -> FolderLayout:
    """Determine the classes and the split from the paths of images and folders.

    Args:
        where: the dataset, for error messages.
        images: paths within the dataset, with "/" as separator.
        folders: paths of all folders, including those without images.
        classes: names of folders that are classes even if they are named like parts of a split.
    Raises: InputError naming the folders or images whose layout is ambiguous or not supported.
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
    """The folders around all images that contain folders of images, ending in "/"; "" if there are none."""
    tops = {name.partition("/")[0] for name in images}
    if len(tops) != 1 or not any(name.count("/") >= 2 for name in images):
        return ""
    outer = f"{tops.pop()}/"
    return outer + outer_folder([name.removeprefix(outer) for name in images])


def _are_split_folders(where: str, inside: Mapping[str, Path], words: Mapping[str, Part]) -> bool:
    """Whether the top folders are parts of a split and not classes. Raises: InputError if that is ambiguous."""
    tops = {path[0] for path in inside.values()}
    deep = {path[0] for path in inside.values() if len(path) > 2}
    called, others = sorted(tops & words.keys()), sorted(tops - words.keys())
    if not called or (called[0].casefold() in CLASS_WORDS and len(called) == 1 and others and called[0] not in deep):
        return False
    remedy = f"If {called[0]!r} is a class, rename its folder or pass --class_names {called[0]!r}=NAME"
    if others:
        raise InputError(
            f"Only some folders of {where} are named like parts of a split: {listed(called)}, but not {listed(others)}. Move or "
            f"remove the other folders. {remedy}."
        )
    if not deep.intersection(called):
        raise InputError(
            f"The folders {listed(called)} of {where} are named like parts of a split, but contain images and no class folders. "
            f"Put the images of each part into class folders, or use a CSV with the columns path, label and split. {remedy}."
        )
    return True


def _by_split_folders(where: str, inside: Mapping[str, Path], below: Sequence[Path], words: Mapping[str, Part]) -> FolderLayout:
    """The layout of class folders inside the folders of a split, possibly with further folders in every part."""
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
    """A note on which folder is which part and how many images it contains."""
    order = sorted(tops, key=lambda top: PARTS.index(tops[top]))
    return f"Split by folders: {', '.join(f'{top!r} is {tops[top]} ({counted(counts[top])})' for top in order)}."


def _folders_above(nested: Mapping[str, Path], tops: Collection[str]) -> dict[str, Path]:
    """The path from `outer` to the class folders of each part, of equal length in all parts."""
    above = {top: [top] for top in tops}
    while all(len(path) > len(above[path[0]]) + 2 for path in nested.values()) and (inner := _only_folders(nested, above)):
        above = {top: [*path, inner[top]] for top, path in above.items()}
    return above


def _only_folders(nested: Mapping[str, Path], above: Mapping[str, Path]) -> dict[str, str] | None:
    """The only folder with images in each part; None if a part has several."""
    held: dict[str, set[str]] = defaultdict(set)
    for path in nested.values():
        held[path[0]].add(path[len(above[path[0]])])
    return {top: names.pop() for top, names in held.items()} if all(len(names) == 1 for names in held.values()) else None


def _by_class_folders(where: str, inside: Mapping[str, Path], tops: Collection[str], words: Mapping[str, Part]) -> FolderLayout:
    """The layout of class folders, possibly with the parts of a split in each."""
    classes = {name: path[0] for name, path in inside.items()}
    named = sorted(set(classes.values()) & words.keys())
    notes = [f"The folder {listed(named)} contains images and no class folders, so it is a class."] if named else []
    parts = _parts_within(where, inside)
    if parts:
        notes.append("Split by the folders inside the class folders.")
    return FolderLayout("", tuple(sorted(tops)), classes, parts, tuple(notes), image_depth=2 if parts else 1)


def _parts_within(where: str, inside: Mapping[str, Path]) -> dict[str, Part]:
    """Part by image name, from the folders inside the class folders; empty if those are not parts of a split."""
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
    """Raise InputError if only some of the folders inside classes, which `held` has by class, are parts of a split."""
    others = sorted(f"{top}/{name}" for top, names in held.items() for name in names - words[top].keys())
    if others:
        called = sorted(f"{top}/{name}" for top, split_words in words.items() for name in split_words)
        raise InputError(
            f"Only some images in the classes of {where} are in folders named like parts of a split: {listed(called)}, but not "
            f"{listed(others)}. Move those images into parts too, or rename the folders that are not parts."
        )


def check_spellings(where: str, classes: Mapping[str, str], parts: Mapping[str, Part]) -> None:
    """Raise InputError if the spelling of a class differs between parts of the split, such as train/cat and test/Cat.

    Args:
        where: the dataset, for error messages.
        classes, parts: by image name.
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
                f"Class names differ between the parts of {where}: {', '.join(listed)}. Use the same name in all parts."
            )


def _without_class(where: str, names: Sequence[str]) -> str:
    """The error message for images outside class folders."""
    if len(names) == 1:
        return f"{names[0]!r} of {where} is not in a class folder. Move it into one, or remove it."
    return f"{names[0]!r} and {len(names) - 1} more of {where} are not in a class folder. Move them into one, or remove them."


def _on_outer(outer: str, layout: FolderLayout) -> list[str]:
    """A note if the only outer folder of the classes is one part of a split."""
    part = next((part for folder in outer.split("/") if (part := part_named(folder))), None)
    if part is None or layout.parts:
        return []
    return [f"All class folders are in {outer.rstrip('/')!r} without another part of a split. Test images are sampled from them."]


def _on_deeper(inside: Mapping[str, Path], layout: FolderLayout) -> list[str]:
    """A note on images in subfolders of class folders."""
    deeper = [name for name, path in inside.items() if len(path) > layout.image_depth + 1]
    if not deeper:
        return []
    return [f"{counted(len(deeper))} in subfolders of class folders {is_or_are(len(deeper))} used, such as {deeper[0]!r}."]


def _on_imageless(images: Sequence[str], folders: Collection[str], layout: FolderLayout) -> list[str]:
    """A note on folders without images; class folders without images are refused later."""
    holding = {""}
    for name in images:
        while name := name.rpartition("/")[0]:
            holding.add(name)
    empty = sorted(
        folder
        for folder in folders
        if folder not in holding and folder.rpartition("/")[0] in holding and folder.rpartition("/")[2] not in layout.keys
    )
    return [f"Folders without images are not used: {listed(empty)}."] if empty else []
