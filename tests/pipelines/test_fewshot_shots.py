"""Few-shot splits: counts, independence, and the saved split that every method reuses."""

import json
from collections import Counter
from itertools import pairwise

import pytest

from pipelines.errors import InputError
from pipelines.fewshot.data import LabelledImage, LabelledSet, base_and_new, rename
from pipelines.fewshot.shots import load_split, sample_split, save_split, saved_split
from pipelines.fewshot.sources import ImageBytes
from pipelines.fewshot.split_words import PARTS


def make_set(counts, parts=None):
    """A dataset of images "<class>/<index>"; `parts` are the parts by index, for every class."""
    keys = tuple(counts)
    images = tuple(
        LabelledImage(ImageBytes(f"{key}/{place:03d}", b""), label, key)
        for label, (key, count) in enumerate(counts.items())
        for place in range(count)
    )
    listed = {image.name: parts[int(image.name.split("/")[1])] for image in images} if parts else {}
    return LabelledSet("the set", keys, keys, images, listed)


def counts_of(split):
    return {part: [Counter(label for _, label in split.names[part])[label] for label in range(len(split.keys))] for part in PARTS}


PLAIN = make_set({"a": 40, "b": 30, "c": 100})
OFFICIAL = make_set({"a": 40, "b": 40}, ["train"] * 20 + ["val"] * 8 + ["test"] * 12)
WITHOUT_VAL = make_set({"a": 40, "b": 40}, ["train"] * 28 + ["test"] * 12)


@pytest.mark.parametrize("shots", [1, 2, 4, 8, 16])
def test_each_class_has_its_shots_and_at_most_four_validation_images(shots):
    for labelled, test in ((PLAIN, [12, 9, 30]), (OFFICIAL, [12, 12]), (WITHOUT_VAL, [12, 12])):
        counts = counts_of(sample_split(labelled, shots, seed=1))
        assert set(counts["train"]) == {shots}
        assert set(counts["val"]) == {min(shots, 4)}
        assert counts["test"] == test


@pytest.mark.parametrize(
    ("labelled", "train"),
    [(PLAIN, [24, 17, 66]), (OFFICIAL, [20, 20]), (WITHOUT_VAL, [24, 24]), (make_set({"a": 3, "b": 9}), [1, 3])],
)
def test_all_shots_are_all_images_outside_of_test_and_validation(labelled, train):
    split = sample_split(labelled, "all", seed=0)
    assert counts_of(split)["train"] == train
    if labelled is not OFFICIAL:
        assert sum(len(split.names[part]) for part in PARTS) == len(labelled.images)


@pytest.mark.parametrize("shots", [1, 16, "all"])
@pytest.mark.parametrize("labelled", [PLAIN, OFFICIAL, WITHOUT_VAL])
def test_no_image_is_in_two_parts_and_a_defined_split_is_kept(labelled, shots):
    split = sample_split(labelled, shots, seed=3)
    names = [name for part in PARTS for name, _ in split.names[part]]
    assert len(set(names)) == len(names)
    for part in PARTS:
        for image in split.images(labelled, part):
            own = labelled.parts.get(image.name, part)
            assert own == part or (part == "val" and own == "train" and labelled is WITHOUT_VAL)
            assert (image.name, image.label) in split.names[part]


def test_the_seed_changes_the_shots_but_not_the_test_images():
    draws = [sample_split(PLAIN, 4, seed) for seed in range(6)]
    assert len({draw.names["train"] for draw in draws}) == len({draw.sha256 for draw in draws}) == 6
    assert len({draw.names["test"] for draw in draws}) == 1
    assert draws[2] == sample_split(PLAIN, 4, 2)


def test_shots_are_sampled_uniformly():
    drawn = Counter(name for seed in range(300) for name, _ in sample_split(PLAIN, 4, seed).names["train"] if name[0] == "b")
    assert len(drawn) == 21
    assert min(drawn.values()) > 0.5 * 300 * 4 / 21
    assert max(drawn.values()) < 1.6 * 300 * 4 / 21


@pytest.mark.parametrize("labelled", [PLAIN, OFFICIAL, WITHOUT_VAL])
def test_fewer_shots_are_a_subset_of_more(labelled):
    draws = [sample_split(labelled, shots, seed=5) for shots in (1, 2, 4, 8, 16)]
    for fewer, more in pairwise(draws):
        assert set(fewer.names["train"]) < set(more.names["train"])
        assert set(fewer.names["val"]) <= set(more.names["val"])


def test_classes_are_sampled_independently():
    split = sample_split(make_set({"a": 40, "b": 40}), 16, seed=1)
    for part in PARTS:
        places = [{name.split("/")[1] for name, label in split.names[part] if label == own} for own in (0, 1)]
        assert places[0] != places[1]


def test_the_sample_of_a_class_depends_neither_on_other_classes_nor_on_its_name():
    alone = sample_split(make_set({"c": 100, "x": 9}), 2, seed=1)
    for labelled in (PLAIN, rename(PLAIN, {"c": "something else"})):
        split = sample_split(labelled, 2, seed=1)
        for part in PARTS:
            assert [name for name, _ in split.names[part] if name[0] == "c"] == [n for n, _ in alone.names[part] if n[0] == "c"]


def test_held_out_classes_have_the_same_test_images_as_among_all_classes():
    labelled = make_set(dict.fromkeys("abcd", 20))
    parts = [sample_split(half, 2, seed=1).images(half, "test") for half in base_and_new(labelled)]
    assert [p.name for half in parts for p in half] == [name for name, _ in sample_split(labelled, 2, seed=1).names["test"]]


@pytest.mark.parametrize(
    ("labelled", "shots", "message"),
    [
        (
            make_set({"a": 40, "b": 5}),
            4,
            r"'b' of the set must have 4 training and 4 validation images, got 3 images besides",
        ),
        (
            make_set({"a": 40, "b": 1}),
            1,
            r"'b' of the set must have 1 .*, got 0 images besides the test images.*images to it, or remove the ",
        ),
        (make_set({"a": 40, "b": 5}), 2, r"'b' of the set must have 2 training and 2 .* or use fewer shots\."),
        (make_set({"a": 40, "b": 2}), "all", r"'b' of the set must have 1 training and 1 .*, got 1 image besides"),
        (OFFICIAL, 21, r"'a' of the set must have 21 training images, got 20 images in the part train"),
        (WITHOUT_VAL, 25, r"'a' of the set must have 25 training and 4 .* got 28 images in the part train"),
        (make_set({"a": 9, "b": 9}, ["train"] * 9), 1, r"the set has no test images: its split has only training images"),
        (PLAIN, 0, r"shots must be 1 or more, or all, got 0"),
    ],
)
def test_a_class_with_too_few_images_for_the_shots_is_named(labelled, shots, message):
    with pytest.raises(InputError, match=message):
        sample_split(labelled, shots, seed=0)


@pytest.mark.parametrize("share", [0.0, 1.0, -1.0])
def test_the_test_share_is_between_0_and_1(share):
    with pytest.raises(InputError, match=f"between 0 and 1, got {share}"):
        sample_split(PLAIN, 1, 0, share)


def test_a_split_is_sampled_once_and_then_read(tmp_path):
    first = saved_split(tmp_path / "deep" / "split.json", PLAIN, 4, seed=1)
    content = (tmp_path / "deep" / "split.json").read_bytes()
    assert saved_split(tmp_path / "deep" / "split.json", PLAIN, 4, seed=1) == first == sample_split(PLAIN, 4, 1)
    assert (tmp_path / "deep" / "split.json").read_bytes() == content
    saved = json.loads(content)
    assert saved["sha256"] == first.sha256
    assert saved["train"][0] == [*first.names["train"][0], "a"]
    assert len(list((tmp_path / "deep").iterdir())) == 1
    for asked in ((2, 1), (4, 2), (4, 1, 0.5), (4, 1, 0.3, 5)):
        with pytest.raises(InputError, match=r"must be \(4, 1, 0\.3, None\) as in .*split\.json', got"):
            saved_split(tmp_path / "deep" / "split.json", PLAIN, *asked)


@pytest.mark.parametrize("labelled", [PLAIN, OFFICIAL, WITHOUT_VAL])
@pytest.mark.parametrize("shots", [1, 4, "all"])
def test_each_class_has_the_given_number_of_validation_images(labelled, shots, tmp_path):
    split = saved_split(tmp_path / "split.json", labelled, shots, seed=1, num_validation=7)
    default = sample_split(labelled, shots, seed=1)
    assert set(counts_of(split)["val"]) == {7}
    assert split.names["test"] == default.names["test"]
    assert set(default.names["val"]) < set(split.names["val"])
    if shots != "all":
        assert split.names["train"] == default.names["train"]
    assert load_split(tmp_path / "split.json", labelled) == split
    assert "num_validation_images" not in default.content()
    for other in (None, 6):
        with pytest.raises(InputError, match=r"must be \(.*, 7\) as in .*, got \("):
            saved_split(tmp_path / "split.json", labelled, shots, seed=1, num_validation=other)


@pytest.mark.parametrize(
    ("labelled", "shots", "number", "message"),
    [
        (PLAIN, 4, 18, r"'b' .* 4 training and 18 validation images, got 21 .* or lower --num_validation_images"),
        (PLAIN, "all", 21, r"'b' .* 1 training and 21 validation images, got 21 .* or lower --num_validation_images"),
        (OFFICIAL, 1, 9, r"'a' of the set must have 9 validation images, got 8 images in the part val"),
        (PLAIN, 1, 0, r"num_validation_images must be at least 1, got 0"),
    ],
)
def test_a_class_with_fewer_validation_images_than_given_is_named(labelled, shots, number, message):
    with pytest.raises(InputError, match=message):
        sample_split(labelled, shots, 0, num_validation=number)


@pytest.mark.parametrize("shots", [2, "all"])
def test_a_split_is_saved_and_loaded_unchanged(tmp_path, shots):
    for labelled in (PLAIN, OFFICIAL):
        split = sample_split(labelled, shots, seed=9, test_share=0.25)
        save_split(split, tmp_path / "a.json")
        assert load_split(tmp_path / "a.json", labelled) == split


def test_a_split_that_was_changed_is_refused(tmp_path):
    save_split(sample_split(PLAIN, 4, 1), tmp_path / "a.json")
    saved = json.loads((tmp_path / "a.json").read_text())
    moved = saved | {"train": saved["train"] + saved["test"][:1]}
    for content in (moved, saved | {"seed": 2}, {name: saved[name] for name in saved if name != "sha256"}):
        (tmp_path / "a.json").write_text(json.dumps(content))
        with pytest.raises(InputError, match=r"a\.json.* was changed after it was written"):
            load_split(tmp_path / "a.json", PLAIN)
    (tmp_path / "a.json").write_text(json.dumps(saved))
    load_split(tmp_path / "a.json", PLAIN)


def test_a_split_of_another_dataset_is_refused(tmp_path):
    save_split(sample_split(PLAIN, 4, 1), tmp_path / "a.json")
    with pytest.raises(InputError, match=r"other classes than the set has"):
        load_split(tmp_path / "a.json", OFFICIAL)
    with pytest.raises(InputError, match=r"lists 'c/\d+' of class 'c', but the set has no such image"):
        load_split(tmp_path / "a.json", make_set({"a": 40, "b": 30, "c": 50}))
