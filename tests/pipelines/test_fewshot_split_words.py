"""The words for the parts of a split: one table for folders, keys, columns and values, in any spelling."""

import pytest

from pipelines.errors import InputError
from pipelines.fewshot.split_words import (
    check_one_word_each,
    names_split_column,
    part_named,
    part_of_value,
    part_written,
    parts_of_folders,
    split_column,
)

TRAIN = (
    "train Train TRAIN training Training trn trainval train_set TrainSet train-set trainset training_data images_train train2017"
)
VAL = "val valid Validation VALIDATE dev development Eval evaluation val_set ValidSet dev-set eval_images PublicTest public_test"
TEST = "test Test TESTING tests tst holdout hold-out Held_Out TestSet test_data test_images test-set test+set PrivateTest"
NONE = "trains trainer vehicles cat restaurant latest contest testimony develop valley evaluator data images set other 1 tr te"


@pytest.mark.parametrize(("part", "words"), [("train", TRAIN), ("val", VAL), ("test", TEST), (None, NONE)])
def test_every_spelling_of_a_word_means_its_part_and_no_other_word_does(part, words):
    assert {word: part_named(word.replace("+", " ")) for word in words.split()} == dict.fromkeys(words.split(), part)


def test_abbreviations_count_where_only_parts_are_expected():
    assert [part_written(word) for word in ("tr", "VA", "te")] == ["train", "val", "test"]


@pytest.mark.parametrize(
    ("names", "parts"),
    [
        (("seg_train", "seg_test", "seg_pred"), {"seg_train": "train", "seg_test": "test"}),
        (("flowersTrain", "flowersTest"), {"flowersTrain": "train", "flowersTest": "test"}),
        (("train station", "bus stop"), {}),
        (("cat_train", "dog_test"), {}),
        (("Train", "dogs"), {"Train": "train"}),
    ],
)
def test_a_word_in_a_longer_name_counts_if_a_sibling_differs_only_in_it(names, parts):
    assert parts_of_folders(names) == parts


def test_two_words_for_one_part_are_refused():
    with pytest.raises(InputError, match=r"'val' and 'dev' all mean val\. Merge them, or rename one\. .*train: train, training"):
        check_one_word_each({"train": "train", "val": "val", "dev": "val"}, "The folders of X")


@pytest.mark.parametrize(
    "column", ["split", "Split", "SUBSET", "set", "Set", "part", "partition", "Usage", "data_split", "image set", "Split Name"]
)
def test_a_split_columns_name_is_read_in_any_spelling(column):
    assert names_split_column(column)
    assert split_column([column, "note"], {column: ["x"], "note": ["y"]}, "a.csv") == column


@pytest.mark.parametrize("column", ["label2", "dataset", "parts_of_speech", "note"])
def test_other_columns_are_a_split_only_if_all_values_are_words_for_parts(column):
    assert split_column([column], {column: ["train", "red"]}, "a.csv") is None
    assert split_column([column], {column: ["Train", "Testing"]}, "a.csv") == column
    assert split_column([column], {column: ["train", "train"]}, "a.csv") is None


@pytest.mark.parametrize("columns", [("split", "set"), ("Split", "phase")])
def test_two_columns_that_could_both_be_the_split_are_refused(columns):
    with pytest.raises(InputError, match=rf"'{columns[0]}' and '{columns[1]}' both could be it\. Remove or rename all but one"):
        split_column(columns, {column: ["train", "test"] for column in columns}, "a.csv")


@pytest.mark.parametrize("column", ["is_train", "isTest", "train", "is_training_image"])
def test_a_flag_column_for_a_part_is_refused_and_not_ignored(column):
    with pytest.raises(InputError, match=rf"'{column}', which suggests a split .* column 'split'"):
        split_column([column], {column: ["0", "1"]}, "a.csv")


def test_an_unknown_value_is_refused_with_the_table():
    with pytest.raises(
        InputError, match=r"Line 3 .* train, val, test, got 'later' in the column 'set'\. .*holdout.*rename the column"
    ):
        part_of_value("later", "Line 3", "set")
