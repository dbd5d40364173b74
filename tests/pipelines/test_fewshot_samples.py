"""The sample dataset is scikit-learn's digits, and a few shots classify it."""

from collections import Counter

import numpy as np
from sklearn.datasets import load_digits
from sklearn.linear_model import LogisticRegression

from pipelines.fewshot.data import find_duplicates, read
from pipelines.fewshot.samples import sample_set
from pipelines.fewshot.shots import sample_split


def pixels_of(images):
    return np.stack([np.asarray(read(image).convert("L").reduce(8)) for image in images]).reshape(len(images), -1)


def test_digits_are_scikit_learns_dark_on_white_and_the_same_every_time():
    labelled, digits = sample_set(), load_digits()
    assert labelled == sample_set()
    assert labelled.classes == tuple("0123456789")
    assert [image.label for image in labelled.images] == digits.target.tolist()
    assert Counter(image.name.split("/")[0] for image in labelled.images) == Counter(map(str, digits.target))
    first = read(labelled.images[0])
    assert (first.mode, first.size, first.getpixel((0, 0))) == ("RGB", (64, 64), (255, 255, 255))
    ink = 255 - np.asarray(first.convert("L").resize((8, 8), box=(8, 8, 56, 56)), dtype=float)
    assert np.corrcoef(ink.ravel(), digits.images[0].ravel())[0, 1] > 0.95


def test_a_few_shots_classify_most_digits_and_none_is_a_duplicate():
    labelled = sample_set()
    assert not find_duplicates(labelled.images)
    split = sample_split(labelled, 16, seed=0)
    train, test = (split.images(labelled, part) for part in ("train", "test"))
    probe = LogisticRegression(max_iter=200).fit(pixels_of(train) / 255, [image.label for image in train])
    assert probe.score(pixels_of(test) / 255, [image.label for image in test]) > 0.8
