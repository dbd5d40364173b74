"""Layouts of labelled folders: splits in any spelling and at any depth are read, ambiguous ones refused."""

import json
import os
from collections import Counter

import pytest
from image_sets import class_files, write_files, write_zip
from shared_cases import case_folder

from pipelines.errors import InputError
from pipelines.fewshot.loading import load_images
from pipelines.fewshot.shots import sample_split, split_notes
from training.fewshot.experiment import labelled_set
from training.options.fewshot import LabelledDataOptions


def loaded(tmp_path, files, zipped=False, names=None):
    """The dataset of these files, from a folder or a zip."""
    path = write_zip(tmp_path / "set.zip", files) if zipped else write_files(tmp_path / "set", files)
    return load_images(path, names)


def parts_by_folder(labelled, place=0):
    """The part of the images of each folder."""
    return {image.name.split("/")[place]: labelled.parts.get(image.name) for image in labelled.images}


@pytest.mark.parametrize("zipped", [False, True])
@pytest.mark.parametrize("outer", ["", "outer/", "a/b/"])
@pytest.mark.parametrize(
    "words",
    [
        ("Train", "Test"),
        ("Training", "Testing"),
        ("train_set", "dev", "test_set"),
        ("TRAIN", "Valid", "HoldOut"),
        ("seg_train", "seg_test"),
    ],
)
def test_the_folders_of_a_split_are_its_parts_in_any_spelling(tmp_path, words, outer, zipped):
    found = loaded(tmp_path, class_files({f"{word}/{key}": 2 for word in words for key in ("cat", "dog")}, outer), zipped)
    assert found.classes == ("cat", "dog")
    expected = ("train", "test") if len(words) == 2 else ("train", "val", "test")
    assert parts_by_folder(found, outer.count("/")) == dict(zip(words, expected, strict=True))
    assert any(f"{words[0]!r} is train (4 images)" in note for note in found.notes)


@pytest.mark.parametrize("inner", [("images", "images"), ("seg_train", "seg_test"), ("a/b", "a/b")])
def test_a_further_folder_in_every_part_is_not_a_class(tmp_path, inner):
    words = ("Train", "Test")
    found = loaded(
        tmp_path, class_files({f"{word}/{own}/{key}": 1 for word, own in zip(words, inner, strict=True) for key in "ab"})
    )
    assert found.classes == ("a", "b")
    assert parts_by_folder(found) == {"Train": "train", "Test": "test"}


def test_parts_within_class_folders_are_parts(tmp_path):
    found = loaded(tmp_path, class_files({f"{key}/{word}": 2 for key in ("cat", "dog") for word in ("Train", "test")}))
    assert found.classes == ("cat", "dog")
    assert parts_by_folder(found, 1) == {"Train": "train", "test": "test"}
    with pytest.raises(InputError, match=r"'cat/Train', 'cat/test', .* but not 'dog/old'"):
        loaded(tmp_path / "mixed", class_files({"cat/Train": 1, "cat/test": 1, "dog/train": 1, "dog/old": 1}))


@pytest.mark.parametrize("zipped", [False, True])
@pytest.mark.parametrize(
    ("counts", "message"),
    [
        ({"Train/a": 1, "Train/b": 1, "Test/a": 1, "extra/a": 1}, r"Only some .*: 'Test', 'Train', but not 'extra'\."),
        ({"train/a": 1, "train/b": 1, "cat": 1, "dog": 1}, r"Only some .*: 'train', but not 'cat', 'dog'\."),
        ({"cat": 1, "dog": 1, "test": 1}, r"'test', but not 'cat', 'dog'\. .*--class_names 'test'=NAME"),
        ({"Train": 1, "Test": 1, "extra": 1}, r"Only some .*: 'Test', 'Train', but not 'extra'\."),
        ({"train": 2, "test": 2}, r"'test', 'train' .* contain images and no class folders\. .*path, label and split"),
        ({"cats_train": 1, "cats_test": 1, "dogs_train": 1, "dogs_test": 1}, r"contain images and no class folders"),
        ({"train/a": 1, "train/b": 1, "val/a": 1, "dev/a": 1}, r"'dev' and 'val' all mean val|'val' and 'dev' all mean val"),
        ({"train/cat": 1, "train/dog": 1, "test/Cat": 1, "test/dog": 1}, r"names differ .*'Cat' is in test, 'cat' is in train"),
        ({"train/red_mug": 1, "train/dog": 1, "test/red mug": 1, "test/dog": 1}, r"'red mug' is in test, 'red_mug' is in train"),
    ],
)
def test_ambiguous_folders_are_refused_and_listed(tmp_path, counts, message, zipped):
    with pytest.raises(InputError, match=message):
        loaded(tmp_path, class_files(counts), zipped)


@pytest.mark.parametrize("counts", [{"train": 2, "bus": 2}, {"Train": 1, "bus/2021": 1}, {"valid": 1, "invalid": 1}])
def test_a_folder_of_images_named_like_a_part_is_a_class(tmp_path, counts):
    found = loaded(tmp_path, class_files(counts))
    assert found.classes == tuple(sorted(key.split("/")[0] for key in counts))
    assert not found.parts
    assert any("so it is a class" in note for note in found.notes)


def test_a_class_train_within_a_split_is_a_class(tmp_path):
    found = loaded(tmp_path, class_files({f"{word}/{key}": 1 for word in ("train", "test") for key in ("train", "bus")}))
    assert found.classes == ("bus", "train")
    assert Counter(found.parts.values()) == {"train": 2, "test": 2}


def test_a_renamed_folder_is_a_class_even_if_it_is_named_like_a_part(tmp_path):
    found = loaded(tmp_path, class_files({"train": 1, "test": 1}), names={"train": "a train", "test": "a test"})
    assert found.classes == ("a test", "a train")
    assert not found.parts


def test_a_single_part_is_no_split_and_validation_replaces_a_missing_test_with_a_note(tmp_path):
    alone = loaded(tmp_path / "alone", class_files({"train/a": 1, "train/b": 1}))
    assert not alone.parts
    assert any("'train' without another part of a split" in note for note in alone.notes)
    without = loaded(tmp_path / "without", class_files({f"{word}/{key}": 1 for word in ("Train", "Dev") for key in "ab"}))
    assert parts_by_folder(without) == {"Train": "train", "Dev": "test"}
    assert any("validation images are used as test images" in note for note in without.notes)


@pytest.mark.parametrize("entry", [lambda name: [name, 0, name[0]], lambda name: [name], lambda name: name])
@pytest.mark.parametrize(
    "words", [("Train", "Test"), ("training", "Dev", "TEST"), ("train_set", "eval", "holdout"), ("tr", "te")]
)
def test_the_keys_of_a_split_file_are_read_in_any_spelling(tmp_path, words, entry):
    files = class_files({"a": len(words), "b": len(words)})
    lists = {word: [entry(f"{key}/{place}.png") for key in "ab"] for place, word in enumerate(words)}
    found = loaded(tmp_path, files | {"split.json": json.dumps(lists | {"seed": 3}).encode("utf-8-sig")})
    expected = ("train", "test") if len(words) == 2 else ("train", "val", "test")
    assert [found.parts[f"b/{place}.png"] for place in range(len(words))] == list(expected)
    assert any("The keys 'seed' of split.json are not used" in note for note in found.notes)


@pytest.mark.parametrize(
    ("split", "message"),
    [
        (
            {"learn": [["a/0.png"]], "judge": [["b/0.png"]]},
            r"got 'learn', 'judge'\. .*holdout",
        ),
        ({"split": {"train": []}}, r"must be words for the parts train, val, test, got 'split'"),
        ({"train": [["a/0.png"]], "Train": [["b/0.png"]]}, r"'train' and 'Train' all mean train"),
        ({"Train": {"a": ["0.png"]}}, r"must have a list of images in 'Train', got dict"),
    ],
)
def test_an_ambiguous_split_file_is_refused(tmp_path, split, message):
    with pytest.raises(InputError, match=r"split\.json of .*" + message):
        loaded(tmp_path, class_files({"a": 1, "b": 1}) | {"split.json": json.dumps(split).encode()})


@pytest.mark.parametrize("encoding", ["utf-16", "cp1252"])
def test_a_split_file_in_another_encoding_is_named(tmp_path, encoding):
    content = json.dumps({"train": ["ä/0.png"]}, ensure_ascii=False).encode(encoding)
    with pytest.raises(InputError, match=r"split\.json of .* UTF-8.*Save it as UTF-8"):
        loaded(tmp_path, class_files({"a": 1, "b": 1}) | {"split.json": content})


def test_folders_and_split_file_must_agree(tmp_path):
    files = class_files({f"{word}/{key}": 1 for word in ("train", "test") for key in "ab"})
    same = {word: [name for name in files if name.startswith(word)] for word in ("train", "test")}
    assert loaded(tmp_path / "same", files | {"split.json": json.dumps(same).encode()}).classes == ("a", "b")
    other = {"train": same["test"], "test": same["train"]}
    with pytest.raises(InputError, match=r"must define the same split, but 'test/a/0\.png' is test by folder and train by file"):
        loaded(tmp_path / "other", files | {"split.json": json.dumps(other).encode()})


@pytest.mark.parametrize("column", ["split", "Subset", "SET", "part", "Usage", "phase"])
def test_the_split_column_of_a_csv_is_read_in_any_spelling(tmp_path, column):
    files = class_files({"a": 3, "b": 3})
    values = {"0": "Training", "1": "PublicTest", "2": "PrivateTest"}
    rows = [f"{name},{name[0]},{values[name[2]]},0,," for name in files]
    write_files(tmp_path, files | {"a.csv": "\n".join([f"Path,LABEL,{column},width,,", *rows]).encode()})
    found = load_images(tmp_path / "a.csv")
    assert {name: found.parts[name] for name in files} == {name: ("train", "val", "test")[int(name[2])] for name in files}
    assert any(f"Split by the column {column!r}" in note for note in found.notes)
    assert "The column 'width' is not used." in found.notes


@pytest.mark.parametrize(
    ("header", "message"),
    [
        ("path,label,Split,subset", r"'Split' and 'subset' both could"),
        ("path,label,split,Split", r"names the column 'split' more than once"),
    ],
)
def test_a_csv_with_two_split_columns_is_refused(tmp_path, header, message):
    write_files(tmp_path, class_files({"a": 1, "b": 1}))
    (tmp_path / "a.csv").write_text(f"{header}\na/0.png,a,train,test\nb/0.png,b,test,train")
    with pytest.raises(InputError, match=message):
        load_images(tmp_path / "a.csv")


@pytest.mark.parametrize("zipped", [False, True])
@pytest.mark.parametrize("place", ["", "train/"])
def test_unused_files_are_named_by_suffix_and_class(tmp_path, zipped, place):
    files = class_files({f"{place}cat": 2, f"{place}dog/deep": 1} | ({"test/cat": 1, "test/dog/deep": 1} if place else {}))
    files |= {f"{place}cat/{number}.txt": b"x" for number in range(12)} | {f"{place}dog/deep/a.TXT": b"x"}
    files |= {f"{place}cat/1.psd": b"x", f"{place}cat/2.mp4": b"x", f"{place}cat/IMG_1": b"x", f"{place}dog/Thumbs.db": b"x"}
    files |= {"README.md": b"x", "train.txt": b"x", f"{place}cat/.DS_Store": b"x", "__MACOSX/cat/._0.png": b"x"}
    notes = loaded(tmp_path, files, zipped).notes
    for expected in (
        "13 files with the suffix .txt are not used: 12 in class 'cat', 1 in class 'dog'.",
        "1 file with the suffix .mp4 is not used: 1 in class 'cat'.",
        "1 file without a suffix is not used: 1 in class 'cat'. Add a suffix such as .jpg if it is an image.",
        f"1 system file is not used: '{place}dog/Thumbs.db'.",
        "1 file outside the class folders is not used: 'README.md'.",
    ):
        assert expected in notes
    assert any(".psd is not used: 1 in class 'cat'." in note for note in notes)
    assert any(note.startswith("'train.txt' is named like a part of a split, but not used.") for note in notes)
    assert any(note.startswith("2 hidden files or folders are not used: ") for note in notes)
    assert any("subfolders of class folders" in note for note in notes)


def test_broken_links_and_folders_without_images_are_named(tmp_path):
    write_files(tmp_path, class_files({"Train/a": 1, "Train/b": 1, "Test/a": 1, "Test/b": 1}))
    (tmp_path / "Train" / "a" / "gone.png").symlink_to(tmp_path / "nowhere.png")
    os.mkfifo(tmp_path / "Train" / "b" / "pipe.png")
    (tmp_path / "Val").mkdir()
    (tmp_path / "Train" / "a" / "masks").mkdir()
    notes = load_images(tmp_path).notes
    assert "2 broken links or special files are not used: 'Train/a/gone.png', 'Train/b/pipe.png'." in notes
    assert "Folders without images are not used: 'Train/a/masks', 'Val'." in notes


def test_a_dataset_without_split_and_unused_files_has_no_notes(tmp_path):
    assert loaded(tmp_path, class_files({"cats": 2, "dogs": 2})).notes == ()


def test_images_beside_class_folders_are_refused(tmp_path):
    with pytest.raises(InputError, match=r"'set/x\.png' and 1 more of .* are not in a class folder"):
        loaded(tmp_path, class_files({"set/a": 1, "set/b": 1}) | {"set/x.png": b"", "set/y.png": b""})


def test_a_class_without_training_images_is_refused_and_one_without_test_images_named(tmp_path):
    counts = {"Train/a": 4, "Train/b": 4, "Train/c": 4, "Test/a": 2, "Test/b": 2}
    found = loaded(tmp_path / "named", class_files(counts))
    assert split_notes(found) == ["Some classes have no test images, so their accuracy is unknown: 'c'."]
    assert Counter(label for _, label in sample_split(found, 1, 0).names["test"]) == {0: 2, 1: 2}
    found = loaded(tmp_path / "refused", class_files(counts | {"Test/d": 1, "Test/e": 1}))
    with pytest.raises(InputError, match=r"has none of 'd' \(test only\), 'e' \(test only\)\. Add images"):
        sample_split(found, 1, 0)


@pytest.mark.parametrize(
    ("path", "train", "test"),
    [
        ("fewshot-split-words/Train_Test", "Train/", "Test/"),
        ("fewshot-split-words/Training.zip", "Training/", "Testing/"),
        ("fewshot-split-words/json_caps", None, None),
        ("fewshot-csv-split-column/csv/split_column.csv", None, None),
        ("fewshot-csv-split-column/csv/subset_column.csv", None, None),
    ],
)
def test_public_datasets_are_split_as_they_define(path, train, test):
    case, _, inside = path.partition("/")
    labelled, copies = labelled_set(LabelledDataOptions(data_dir=str(case_folder(case) / inside), shots=["1"]))
    assert labelled.classes == ("cardboard", "glass", "metal")
    assert not copies
    names = {part: {name for name, _ in listed} for part, listed in sample_split(labelled, 1, 0).names.items()}
    if train is not None:
        assert all(name.startswith(train) for name in names["train"] | names["val"])
        assert all(name.startswith(test) for name in names["test"])
    else:
        # Images 0 to 4 are for training in all of them, 7 is for the test.
        assert all(int(name[-7:-4]) <= 5 for name in names["train"] | names["val"])
        assert all(int(name[-7:-4]) >= 5 for name in names["test"])
    assert names["test"] == {image.name for image in labelled.of_part("test")}
