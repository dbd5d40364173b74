"""Datasets of photographs under a domain shift: deterministic, tested on photographs that were held out from pretraining."""

import io
import json
import re
from collections import Counter

import numpy as np
import pytest
from image_sets import class_files, stored_image, write_zip
from PIL import Image, ImageOps

from pipelines.corpus import photo_corpus, split_held_out
from pipelines.fewshot.domain_shift import DomainShiftOptions, choose_photos, main, shifted_images, write_dataset
from pipelines.fewshot.loading import load_images
from pipelines.fewshot.shifts import CLEAN, SHIFTS
from pipelines.fewshot.shots import sample_split

SIDE = 32


@pytest.fixture(scope="module")
def photographs(tmp_path_factory):
    """Two zips with ten random images of each of four classes."""
    folder = tmp_path_factory.mktemp("photographs")
    (folder / "classes.json").write_text(json.dumps({"n1": "goose", "n2": "wok", "n3": "potter's wheel", "n4": "go-kart"}))
    names = class_files(dict.fromkeys(("n1", "n2", "n3", "n4"), 20))
    files = {name: stored_image(seed, SIDE) for seed, name in enumerate(names)}
    for half in (0, 1):
        write_zip(folder / f"{half}.zip", {name: files[name] for name in files if int(name.split("/")[1][:-4]) % 2 == half})
    return folder


def options_for(photographs, output, **changes):
    return DomainShiftOptions(
        str(photographs), str(output), **{"shift": "night", "num_classes": 3, "num_train_images": 5, **changes}
    )


def files_in(folder):
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in sorted(folder.rglob("*.png"))}


def test_the_same_seed_writes_the_same_files_and_another_one_others(photographs, tmp_path):
    for name, seed in (("a", 0), ("b", 0), ("c", 1)):
        assert write_dataset(options_for(photographs, tmp_path / name, seed=seed)) == 3 * (5 + 2)
    first, same, other = (files_in(tmp_path / name) for name in "abc")
    assert first == same
    assert len({path.split("/")[1] for path in first}) == 3
    shared = first.keys() & other.keys()
    assert shared
    assert not any(first[path] == other[path] for path in shared)


def test_the_few_shot_recipe_reads_it_as_a_split_and_class_names(photographs, tmp_path):
    write_dataset(options_for(photographs, tmp_path / "shifted", num_classes=4))
    labelled = load_images(str(tmp_path / "shifted"), {})
    assert labelled.classes == ("go-kart", "goose", "potter's wheel", "wok")
    assert Counter(labelled.parts.values()) == {"train": 20, "test": 8}
    split = sample_split(labelled, 3, 0, num_validation=2)
    assert [len(split.names[part]) for part in ("train", "val", "test")] == [12, 8, 8]


def test_test_images_are_the_photographs_held_out_from_pretraining_and_training_images_are_not(photographs, tmp_path):
    write_dataset(options_for(photographs, tmp_path / "clean", shift=CLEAN, num_classes=4, num_train_images=18))
    corpus = photo_corpus(photographs, SIDE)
    _, held_out = split_held_out(corpus.captions, 0.1, seed=0)
    unseen = {corpus.images[index].tobytes() for index in held_out}
    stored = {
        path: np.asarray(Image.open(io.BytesIO(content))).tobytes() for path, content in files_in(tmp_path / "clean").items()
    }
    assert {pixels for path, pixels in stored.items() if path.startswith("test/")} == unseen
    assert {pixels for path, pixels in stored.items() if path.startswith("train/")}.isdisjoint(unseen)


@pytest.mark.parametrize("shift", SHIFTS)
def test_a_shift_depends_on_the_image_alone_and_not_on_the_others(photographs, shift):
    photos = choose_photos(photographs, 0, 2, 2)
    together = [image.tobytes() for image in shifted_images(photos, shift, 0)]
    alone = [next(shifted_images([photo], shift, 0)).tobytes() for photo in photos]
    assert together == alone
    assert (together == [image.tobytes() for image in shifted_images(photos, CLEAN, 0)]) == (shift == CLEAN)
    assert {image.size for image in shifted_images(photos, shift, 0)} == {(SIDE, SIDE)}


def test_shifts_without_random_values_are_their_definitions():
    rng, values = np.random.default_rng(0), np.random.default_rng(0).integers(0, 256, (64, 64, 3), dtype=np.uint8)
    image = Image.fromarray(values)
    assert np.array_equal(np.asarray(SHIFTS["inverted"](image, rng)), 255 - values)
    squares = np.asarray(SHIFTS["pixelated"](image, rng)).reshape(16, 4, 16, 4, 3)
    assert np.array_equal(squares, np.broadcast_to(squares[:, :1, :, :1], squares.shape))
    assert np.abs(squares[:, 0, :, 0] - values.reshape(16, 4, 16, 4, 3).mean(axis=(1, 3))).max() <= 1
    assert set(np.unique(np.asarray(SHIFTS["posterised"](image, rng)))) == {0, 255}
    # Half a turn of hue exchanges the largest and the smallest channel of pure colours.
    assert SHIFTS["hue"](Image.new("RGB", (8, 8), (255, 0, 0)), rng).getpixel((0, 0)) == pytest.approx((0, 255, 255), abs=3)
    # An image without structure has no edges and no lines.
    flat = Image.new("RGB", (8, 8), (90, 120, 30))
    assert SHIFTS["edges"](flat, rng).getextrema() == ((0, 0),) * 3
    assert SHIFTS["sketch"](flat, rng).getextrema() == ((255, 255),) * 3


def test_night_is_darker_and_fog_is_flatter(photographs):
    photos = choose_photos(photographs, 0, 2, 2)
    for clean, night, fog in zip(*(shifted_images(photos, shift, 0) for shift in (CLEAN, "night", "fog")), strict=True):
        values = [np.asarray(ImageOps.grayscale(image), dtype=float) for image in (clean, night, fog)]
        assert values[1].mean() < values[0].mean() / 2
        assert values[2].std() < values[0].std() / 2


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"shift": "rain"}, r"shift must be one of edges, .*got 'rain'"),
        ({"num_classes": 5}, r"num_classes must be at most 4, the classes in .*, got 5"),
        ({"num_train_images": 19}, r"Class '.*' must have 19 photographs to train on and one .*, got 18 and 2"),
        ({"images_dir": "none"}, r"classes.json"),
        ({"images_dir": ""}, r"images_dir must be given"),
        ({"seed": -1}, r"seed must be at least 0, got -1"),
    ],
)
def test_what_cannot_be_written_ends_with_a_message_and_leaves_no_folder(photographs, tmp_path, changes, message, capsys):
    values = {
        "images_dir": str(photographs),
        "output_dir": str(tmp_path / "out"),
        "num_classes": 3,
        "num_train_images": 5,
        **changes,
    }
    with pytest.raises(SystemExit) as ended:
        main([word for name, value in values.items() for word in (f"--{name}", str(value))])
    assert ended.value.code == 2
    assert re.search(message, " ".join(capsys.readouterr().err.split()))
    assert list(tmp_path.iterdir()) == []


def test_a_folder_with_files_is_not_overwritten(photographs, tmp_path, capsys):
    (tmp_path / "notes.txt").touch()
    with pytest.raises(SystemExit):
        main(["--images_dir", str(photographs), "--output_dir", str(tmp_path)])
    assert "must be an empty or a new folder" in " ".join(capsys.readouterr().err.split())
