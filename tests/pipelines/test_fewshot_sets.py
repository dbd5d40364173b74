"""The eleven datasets in CoOp's layout with CoOp's splits."""

import json

import open_clip
import pytest
from image_sets import stored_image, write_files

from pipelines.errors import InputError
from pipelines.fewshot.data import read
from pipelines.fewshot.sets import SETS, load_set

SPLIT = {
    "train": [["b/1.jpg", 0, "a dog"], ["a/1.jpg", 1, "a_cat"]],
    "val": [["a/2.jpg", 1, "a_cat"]],
    "test": [["b/2.jpg", 0, "a dog"]],
}
WITH_SPLIT_FILES = sorted(name for name, layout in SETS.items() if layout.split)
IDENTS = ("n01", "n02")


def lay_out(root, name, split, missing=()):
    """A dataset with a split file and the listed images."""
    layout = SETS[name]
    images = f"{layout.folder}/{layout.images}/"
    listed = [entry[0] for entries in split.values() for entry in entries if entry[0] not in missing]
    files = {images + path: stored_image(seed, form="JPEG") for seed, path in enumerate(listed)}
    return write_files(root, files | {f"{layout.folder}/{layout.split}": json.dumps(split).encode()})


def lay_out_imagenet(root, names=b"n01 great white shark\nn02 house\n", val=IDENTS, idents=IDENTS):
    folders = [f"train/{ident}" for ident in idents] + [f"val/{ident}" for ident in val]
    files = {f"imagenet/images/{folder}/{place}.JPEG": b"x" for folder in folders for place in range(2)}
    return write_files(root, files | ({"imagenet/classnames.txt": names} if names else {}))


def lay_out_aircraft(root, test=b"003 An-12\n"):
    files = {f"fgvc_aircraft/images/00{place}.jpg": b"x" for place in range(4)}
    tables = {"train": b"000 An-12\n001 707-320 B\n", "val": b"002 707-320 B\n", "test": test}
    files |= {f"fgvc_aircraft/images_variant_{part}.txt": table for part, table in tables.items()}
    return write_files(root, files | {"fgvc_aircraft/variants.txt": b"707-320 B\nAn-12\n"})


def test_there_are_eleven_datasets():
    assert len(SETS) == 11
    assert len(WITH_SPLIT_FILES) == 9


@pytest.mark.parametrize("name", WITH_SPLIT_FILES)
def test_a_split_file_is_read_unchanged(tmp_path, name):
    found = load_set(lay_out(tmp_path, name, SPLIT), name)
    assert found.classes == ("a dog", "a_cat")
    listed = {part: [[p.name, p.label, p.class_name] for p in found.of_part(part)] for part in ("train", "val", "test")}
    assert listed == SPLIT
    assert read(found.images[0]).size == (8, 8)


def test_the_folder_may_differ_in_case_and_be_a_link(tmp_path):
    lay_out(tmp_path / "elsewhere", "ucf101", SPLIT)
    (tmp_path / "UCF101").symlink_to(tmp_path / "elsewhere" / "ucf101")
    assert len(load_set(tmp_path, "ucf101").images) == 4


def test_imagenets_validation_is_its_test_and_its_names_are_the_files(tmp_path):
    found = load_set(lay_out_imagenet(tmp_path), "imagenet")
    assert found.classes == ("great white shark", "house")
    assert {(p.name.split("/")[0], found.parts[p.name]) for p in found.images} == {("train", "train"), ("val", "test")}
    assert [image.label for image in found.of_part("test")] == [0, 0, 1, 1]


def test_imagenets_names_are_open_clips_where_there_is_no_file(tmp_path, monkeypatch):
    monkeypatch.setattr(open_clip, "IMAGENET_CLASSNAMES", open_clip.IMAGENET_CLASSNAMES[:2])
    assert load_set(lay_out_imagenet(tmp_path, names=None), "imagenet").classes == ("tench", "goldfish")


def test_aircraft_are_read_from_their_own_tables(tmp_path):
    found = load_set(lay_out_aircraft(tmp_path), "fgvc_aircraft")
    assert found.classes == ("707-320 B", "An-12")
    assert [(p.name, p.label, found.parts[p.name]) for p in found.images] == [
        ("000.jpg", 1, "train"),
        ("001.jpg", 0, "train"),
        ("002.jpg", 0, "val"),
        ("003.jpg", 1, "test"),
    ]


@pytest.mark.parametrize(
    ("split", "message"),
    [
        (SPLIT | {"val": None}, r"must list the images of 'val'"),
        (SPLIT | {"val": [["../x.jpg", 0, "a dog"]]}, r"\[path below the image folder, label, class\] in 'val'"),
        (SPLIT | {"val": [["/x.jpg", 0, "a dog"]]}, r"\[path below the image folder, label, class\] in 'val'"),
        (SPLIT | {"val": [["x.jpg", "0", "a dog"]]}, r"in 'val', got \['x\.jpg', '0', 'a dog'\]"),
        (SPLIT | {"val": [["b/2.jpg", 0, "a dog"]]}, r"DTD lists an image twice"),
        (SPLIT | {"val": [["a/2.jpg", 0, "a_cat"]]}, r"must be one class, but is 'a_cat' for 'a/2\.jpg' and 'a dog' before"),
        (SPLIT | {"val": [["a/2.jpg", 3, "a bird"]]}, r"labels of DTD must be 0 to 2, got 0 to 3"),
    ],
)
def test_a_split_file_that_cannot_be_used_is_named(tmp_path, split, message):
    root = lay_out(tmp_path, "dtd", {part: entries for part, entries in SPLIT.items()})
    write_files(root, {"dtd/images/a/2.jpg": b"", "dtd/split_zhou_DescribableTextures.json": json.dumps(split).encode()})
    with pytest.raises(InputError, match=message):
        load_set(root, "dtd")


def test_a_listed_image_that_does_not_exist_is_named_with_its_class(tmp_path):
    with pytest.raises(InputError, match=r"lists 'a/2\.jpg' of class 'a_cat', but there is no such file.*DATASETS\.md"):
        load_set(lay_out(tmp_path, "dtd", SPLIT, missing=["a/2.jpg"]), "dtd")


@pytest.mark.parametrize(
    ("name", "prepare", "message"),
    [
        ("mnist", None, r"must be one of imagenet, caltech101.*, got 'mnist'"),
        ("dtd", None, r"DTD must be in .*dtd.*no such folder.*DATASETS\.md"),
        ("dtd", lambda root: (root / "dtd").mkdir(), r"DTD needs .*split_zhou_DescribableTextures\.json.*missing"),
        ("imagenet", lambda root: (root / "imagenet").mkdir(), r"ImageNet needs .*train.*missing"),
        ("imagenet", lambda root: lay_out_imagenet(root, val=["n01"]), r"same classes in train and val, but 'n02'"),
        ("imagenet", lambda root: lay_out_imagenet(root, names=None), r"ImageNet needs .*classnames\.txt.*missing"),
        ("imagenet", lambda root: lay_out_imagenet(root, names=b"n01 a"), r"must name every class, but lacks 'n02'"),
        ("fgvc_aircraft", lambda root: lay_out_aircraft(root, b"003 An-13"), r"lists '003 An-13', but its image or class is"),
        ("fgvc_aircraft", lambda root: lay_out_aircraft(root, b"009 An-12"), r"lists '009 An-12', but its image or class is"),
    ],
)
def test_missing_files_are_named(tmp_path, name, prepare, message):
    if prepare:
        prepare(tmp_path)
    with pytest.raises(InputError, match=message):
        load_set(tmp_path, name)
