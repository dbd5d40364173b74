"""Labelled images: folders, zips and CSVs give the same dataset, and errors name the file."""

import io
import json
import re

import pytest
import torch
from image_sets import class_files, stored_image, write_files, write_zip
from PIL import Image
from torch.utils.data import DataLoader
from torchvision.transforms.functional import to_tensor

from pipelines.errors import InputError
from pipelines.fewshot.data import (
    DuplicateImages,
    LabelledImage,
    LabelledImageDataset,
    LabelledSet,
    base_and_new,
    check_readable,
    find_duplicates,
    read,
    rename,
    subset,
    without_duplicates,
)
from pipelines.fewshot.loading import load_images
from pipelines.fewshot.sources import ImageBytes

COUNTS = {"cats": 3, "dogs": 2, "big_birds": 1}
ORIENTATION, TURNED_RIGHT = 0x0112, 6


def as_table(files, path, header="path,label", rows=lambda name: f"{name},{name.split('/')[-2]}"):
    write_files(path.parent, files)
    path.write_text("\n".join([header, *map(rows, files)]))
    return path


def seen(labelled):
    """Class and content of every image of a dataset, independent of the order."""
    return sorted((image.class_name, image.label, image.source.content()) for image in labelled.images)


def in_memory(*classes):
    """A dataset with a class for each argument, of images with these contents."""
    images = [
        LabelledImage(ImageBytes(f"{label}/{place}.png", content), label, f"class {label}")
        for label, contents in enumerate(classes)
        for place, content in enumerate(contents)
    ]
    keys = tuple(f"class {label}" for label in range(len(classes)))
    return LabelledSet("the set", keys, keys, tuple(images))


def test_a_folder_a_zip_and_a_csv_of_the_same_images_give_the_same_dataset(tmp_path):
    files = class_files(COUNTS)
    folder = load_images(write_files(tmp_path / "folder", files))
    zipped = load_images(write_zip(tmp_path / "a.zip", files))
    listed = load_images(as_table(files, tmp_path / "listed" / "a.csv"))
    assert folder.classes == zipped.classes == listed.classes == ("big_birds", "cats", "dogs")
    assert seen(folder) == seen(zipped) == seen(listed)
    assert [p.name for p in folder.images] == [p.name for p in zipped.images] == sorted(files)
    assert not folder.parts
    for image in folder.images:
        expected = Image.open(io.BytesIO(files[image.name])).convert("RGB")
        assert read(image).tobytes() == expected.tobytes()


@pytest.mark.parametrize("outer", ["", "outer/"])
@pytest.mark.parametrize("zipped", [False, True])
def test_one_outer_folder_hidden_files_and_other_files_change_nothing(tmp_path, outer, zipped):
    more = {f"{outer}cats/notes.txt": b"", f"{outer}cats/.x.png": b"", f"{outer}.git/a/x.png": b"", "__MACOSX/cats/._0.png": b""}
    files = class_files(COUNTS, outer) | more
    found = load_images(write_zip(tmp_path / "a.zip", files) if zipped else write_files(tmp_path / "folder", files))
    assert found.classes == ("big_birds", "cats", "dogs")
    assert [image.label for image in found.images] == [0, 1, 1, 1, 2, 2]


def test_images_in_subfolders_belong_to_their_class_folder(tmp_path):
    found = load_images(write_files(tmp_path, class_files({"cats": 1, "dogs/2021": 1, "dogs/2022/may": 1})))
    assert [image.class_name for image in found.images] == ["cats", "dogs", "dogs"]


def test_a_link_to_a_parent_folder_is_followed_once(tmp_path):
    write_files(tmp_path, class_files(COUNTS))
    (tmp_path / "cats" / "again").symlink_to(tmp_path)
    assert len(load_images(tmp_path).images) == sum(COUNTS.values())


@pytest.mark.parametrize("zipped", [False, True])
@pytest.mark.parametrize("outer", ["", "outer/"])
@pytest.mark.parametrize("how", ["folders", "split.json"])
def test_a_split_in_the_dataset_is_used_and_noted(tmp_path, zipped, outer, how):
    parts = ("train", "val", "test")
    if how == "folders":
        files = class_files({f"{part}/{key}": 1 for part in parts for key in ("a", "b")}, outer)
        expected = {name: name.removeprefix(outer).split("/")[0] for name in files}
    else:
        files = class_files({"a": 3, "b": 3}, outer)
        lists = {part: [[f"{key}/{place}.png", key, "where it was"] for key in "ab"] for place, part in enumerate(parts)}
        expected = {outer + entry[0]: part for part, entries in lists.items() for entry in entries}
        files[f"{outer}split.json"] = json.dumps(lists | {"all": []}).encode()
    found = load_images(write_zip(tmp_path / "a.zip", files) if zipped else write_files(tmp_path / "folder", files))
    assert found.classes == ("a", "b")
    assert found.parts == expected
    assert {image.name for image in found.of_part("val")} == {name for name, part in expected.items() if part == "val"}


def test_a_split_file_without_parts_defines_no_split(tmp_path):
    files = class_files({"a": 2, "b": 2})
    files["split.json"] = json.dumps({"all": [[name, name[0], "x"] for name in files]}).encode()
    assert not load_images(write_files(tmp_path, files)).parts


def test_validation_without_a_test_part_is_the_test(tmp_path):
    found = load_images(write_files(tmp_path, class_files({f"{part}/{key}": 1 for part in ("train", "val") for key in "ab"})))
    assert set(found.parts.values()) == {"train", "test"}


@pytest.mark.parametrize("delimiter", [",", ";", "\t"])
def test_a_csv_may_have_parts_other_columns_quotes_and_a_byte_order_mark(tmp_path, delimiter):
    files = class_files({"a, or so": 1, "b": 1})
    path = as_table(
        files,
        tmp_path / "a.csv",
        delimiter.join(["label", "note", "path", "part"]),
        lambda name: delimiter.join([f'"{name.split("/")[0]}"', "", f'"{name}"', "train" if name[0] == "a" else "test"]),
    )
    path.write_bytes(b"\xef\xbb\xbf" + path.read_bytes())
    found = load_images(path)
    assert found.classes == ("a, or so", "b")
    assert sorted(found.parts.values()) == ["test", "train"]


@pytest.mark.parametrize(
    ("table", "message"),
    [
        ("file,label\ncats/0.png,cats", r"must name the columns path and label, got 'file,label'"),
        ("path,label\ncats/0.png,cats\ncats/9.png,cats", r"Line 3 of .*a\.csv.*'cats/9\.png' of class 'cats'.*no such file"),
        ("path,label\ncats/0.png", r"Line 2 of .*a\.csv.* must have a path and a label"),
        ("path,label\ncats/0.png,cats,x", r"Line 2 of .*a\.csv.* must have a path and a label"),
        ("path,label\ncats/0.png,cats\ncats/0.png,dogs", r"Line 3 .*'cats/0\.png' of class 'dogs' again, after line 2"),
        ("path,label\na.csv,cats", r"Line 2 .*'a\.csv' of class 'cats'.* its suffix is not that of an image"),
        ("path,label,part\ncats/0.png,cats,practice", r"Line 2 .*train, val, test, got 'practice'"),
        ("path,label,part\ncats/0.png,cats,train\ndogs/0.png,dogs,", r"Line 3 .* has no value for 'part', but other lines have"),
        ("path,label\ncats/0.png,cats", r"at least two classes, got only 'cats'"),
        ("path,label\n" + "x" * 200_000 + ",cats", r"a\.csv.* cannot be read after line 1 \(field larger"),
        ("path,label\ncats/0.png\0,cats", r"a\.csv.* has a NUL byte in line 2"),
        ('path,label\ncats/0.png,"cats\n\ncats/1.png,dogs', r"at least two classes, got only"),
        ("path,label", r"at least two classes, got none"),
    ],
)
def test_a_csv_that_cannot_be_used_is_named_with_the_line(tmp_path, table, message):
    write_files(tmp_path, class_files(COUNTS))
    (tmp_path / "a.csv").write_text(table)
    with pytest.raises(InputError, match=message):
        load_images(tmp_path / "a.csv")


def test_a_csv_in_another_encoding_is_named(tmp_path):
    (tmp_path / "a.csv").write_bytes("path,label\nä.png,a".encode("latin-1"))
    with pytest.raises(InputError, match=r"a\.csv.* must be UTF-8"):
        load_images(tmp_path / "a.csv")


@pytest.mark.parametrize("zipped", [False, True])
@pytest.mark.parametrize(
    ("files", "message"),
    [
        (class_files({"a": 1}), r"at least two classes, got only 'a'"),
        ({"notes.txt": b""}, r"at least two classes, got none"),
        (class_files({"a": 1, "b": 1}) | {"c/notes.txt": b""}, r"Class 'c' of .* has no image .*\.jpg"),
        (class_files({"a": 1, "b": 1}) | {"x.png": stored_image(9)}, r"'x\.png' of .* is not in a class folder"),
        (
            class_files({"train/a": 1, "train/b": 1, "test/a": 1}) | {"test/x.png": b""},
            r"'test/x\.png' of .* is not in a class folder",
        ),
    ],
)
def test_folders_that_cannot_be_used_are_named(tmp_path, files, message, zipped):
    path = write_zip(tmp_path / "a.zip", files) if zipped else write_files(tmp_path / "folder", files)
    with pytest.raises(InputError, match=message):
        load_images(path)


@pytest.mark.parametrize(
    ("split", "message"),
    [
        (b"{", "is not valid JSON"),
        (b"[" * 100_000, "is not valid JSON"),
        (b"[]", "must be a JSON object, got list"),
        (json.dumps({"train": [["a/9.png"]]}).encode(), r"lists \['a/9\.png'\] in 'train', which is not an image"),
        (json.dumps({"train": [["../a/0.png"]]}).encode(), r"lists \['\.\./a/0\.png'\] in 'train', which is not an image"),
        (json.dumps({"train": [[7]]}).encode(), r"lists \[7\] in 'train', which is not an image"),
        (json.dumps({"train": [["a/0.png"], ["a/0.png"]]}).encode(), r"lists 'a/0\.png' twice"),
        (json.dumps({"train": [["a/0.png"]]}).encode(), r"must list every image, but lacks 'b/0\.png' of class 'b'"),
    ],
)
def test_a_split_file_that_cannot_be_used_is_named(tmp_path, split, message):
    with pytest.raises(InputError, match=r"split\.json of .*" + message):
        load_images(write_files(tmp_path, class_files({"a": 1, "b": 1}) | {"split.json": split}))


@pytest.mark.parametrize("name", ["nothing", "a.tar"])
def test_other_paths_than_folder_zip_and_csv_are_refused(tmp_path, name):
    (tmp_path / "a.tar").touch()
    with pytest.raises(InputError, match=rf"{name}.* must be a folder of class folders, a \.zip of one, or a \.csv"):
        load_images(tmp_path / name)


def test_an_unreadable_image_is_named_with_its_class(tmp_path):
    files = class_files({"cats": 8, "dogs": 1})
    for place in range(7):
        files[f"cats/{place}.png"] = b"no image"
    found = load_images(write_files(tmp_path, files), {"cats": "small cats"})
    check_readable(found.images[7:])
    with pytest.raises(InputError, match=r"'cats/0\.png' of class 'small cats' cannot be read as an image.* And 2 more\."):
        check_readable(found.images)


def test_a_missing_image_is_named(tmp_path):
    found = load_images(write_files(tmp_path, class_files(COUNTS)))
    (tmp_path / found.images[0].name).unlink()
    for look in (read, lambda image: image.source.size()):
        with pytest.raises(InputError, match=r"big_birds/0\.png' of the dataset does not exist"):
            look(found.images[0])


def test_images_are_read_upright():
    exif = Image.Exif()
    exif[ORIENTATION] = TURNED_RIGHT
    lying = io.BytesIO()
    Image.new("RGB", (60, 40)).save(lying, "JPEG", exif=exif)
    assert read(LabelledImage(ImageBytes("a.jpg", lying.getvalue()), 0, "a")).size == (40, 60)


@pytest.mark.parametrize("workers", [0, 2])
def test_a_dataset_gives_transformed_images_and_labels_also_from_workers(tmp_path, workers):
    found = load_images(write_zip(tmp_path / "a.zip", class_files({"a": 9, "b": 7})))
    dataset = LabelledImageDataset(found.images, to_tensor)
    read(found.images[0])
    pixels, labels = zip(*DataLoader(dataset, batch_size=4, num_workers=workers), strict=True)
    torch.testing.assert_close(torch.cat(labels), dataset.labels)
    torch.testing.assert_close(torch.cat(pixels), torch.stack([to_tensor(read(image)) for image in found.images]))


def test_an_image_in_two_classes_is_reported_and_removed_from_both():
    labelled = in_memory([b"one", b"two", b"two"], [b"one", b"three"], [b"one"], [b"four"])
    found = find_duplicates(labelled.images)
    assert [(copies.names, copies.conflicting) for copies in found] == [
        (("0/0.png", "1/0.png", "2/0.png"), True),
        (("0/1.png", "0/2.png"), False),
    ]
    assert str(found[0]) == (
        "The same image occurs 3 times in the classes 'class 0', 'class 1', 'class 2': '0/0.png', '1/0.png', '2/0.png'."
    )
    with pytest.raises(InputError, match="Class 'class 2' of the set has no image"):
        without_duplicates(labelled, found)
    kept = without_duplicates(labelled, [*found[1:], DuplicateImages(("0/0.png", "1/0.png"), ("class 0", "class 1"))])
    assert [image.name for image in kept.images] == ["0/1.png", "1/1.png", "2/0.png", "3/0.png"]


def test_classes_are_renamed_by_their_folders_and_keep_their_keys():
    labelled = rename(in_memory([b"0"], [b"1"]), {"class 1": " a dog "})
    assert labelled.classes == ("class 0", "a dog")
    assert labelled.keys == ("class 0", "class 1")
    assert [image.class_name for image in labelled.images] == ["class 0", "a dog"]
    assert rename(labelled, {"class 1": "a cat"}).classes == ("class 0", "a cat")


@pytest.mark.parametrize(
    ("names", "message"),
    [
        ({"class 7": "a"}, "no class 'class 7' to rename. Its classes are 'class 0', 'class 1'"),
        ({"class 0": " "}, "class 'class 0' must be one line of text, got ''"),
        ({"class 0": "a\nb"}, "must be one line of text, got 'a\\nb'"),
        ({"class 0": "class 1"}, "'class 0', 'class 1' are all called 'class 1'"),
        ({"class 0": "class_1"}, "'class 0', 'class 1' are all called 'class 1'"),
    ],
)
def test_invalid_class_names_are_refused(names, message):
    with pytest.raises(InputError, match=re.escape(message)):
        rename(in_memory([b"0"], [b"1"]), names)


def test_half_of_the_classes_is_held_out_and_relabelled_from_zero():
    labelled = in_memory(*[[bytes([label])] for label in range(5)])
    base, new = base_and_new(labelled)
    assert base.classes + new.classes == labelled.classes
    assert [image.label for image in base.images] == [0, 1, 2]
    assert [image.label for image in new.images] == [0, 1]
    assert subset(labelled, [3, 0]).images[0].label == 1
    with pytest.raises(InputError, match="at least 4 classes, but the set has 3"):
        base_and_new(base)
