"""Rendered scenes show what their captions say."""

import random
from collections import Counter

import numpy as np
import pytest

from pipelines.backgrounds import BACKGROUNDS, PLAIN
from pipelines.corpus import rendered_corpus
from pipelines.scenes import COLOURS, PATTERNS, SHAPES, Scene, render, sample_scene, shape_mask


def test_a_caption_names_size_colour_pattern_shape_and_place():
    scene = Scene("star", "red", "striped", "large", "snow")
    assert scene.caption == "a large red striped star in the snow"
    assert Scene("letter", "orange", glyph="K").caption == "an orange letter K"


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"kind": "hexagon", "colour": "red"}, "kind must be one of .*'circle'.*, got 'hexagon'"),
        ({"kind": "star", "colour": "teal"}, "colour must be one of .*'red'.*, got 'teal'"),
        ({"kind": "star", "colour": "red", "background": "moon"}, "background must be one of .*'snow'.*, got 'moon'"),
        ({"kind": "letter", "colour": "red"}, "glyph must be one of .* for kind 'letter'"),
        ({"kind": "star", "colour": "red", "glyph": "K"}, "glyph must be .* empty otherwise, got 'K'"),
    ],
)
def test_an_unknown_word_is_refused_by_name(fields, message):
    with pytest.raises(ValueError, match=message):
        Scene(**fields)


def test_the_same_generator_gives_the_same_bytes():
    scene = Scene("heart", "blue", "dotted", background="beach")
    first, again, other = (render(scene, 64, random.Random(seed)).tobytes() for seed in (3, 3, 4))
    assert first == again
    assert first != other


@pytest.mark.parametrize("colour", COLOURS)
def test_a_plain_square_has_the_named_colour_at_its_centre_of_mass(colour):
    image = np.asarray(render(Scene("square", colour, size="large"), 64, random.Random(0)), dtype=float)
    background = np.median(np.concatenate([image[0], image[-1]]), axis=0)
    inside = np.abs(image - background).sum(-1) > 60
    middle = np.median(image[inside], axis=0)
    distances = {name: np.abs(middle - value).sum() for name, value in COLOURS.items()}
    assert min(distances, key=distances.get) == colour


@pytest.mark.parametrize("shape", SHAPES)
def test_shapes_differ_from_one_another_by_a_tenth_of_their_area_at_least(shape):
    def mask(name: str) -> np.ndarray:
        return np.asarray(shape_mask(name, 128, (64, 64), 60, 0.0)) > 127

    here = mask(shape)
    for other in set(SHAPES) - {shape}:
        assert (here ^ mask(other)).sum() > 0.1 * here.sum(), f"{shape} looks like {other}"


def test_a_larger_size_covers_more_of_the_image():
    areas = []
    for size in ("small", "", "large"):
        scene, rng = Scene("circle", "black", size=size), random.Random(0)
        areas.append((np.asarray(render(scene, 64, rng)).mean(-1) < 60).sum())
    assert areas[0] < areas[1] < areas[2]


def test_backgrounds_look_different_from_one_another():
    means = {
        name: np.asarray(background.render(96, random.Random(0)), dtype=float).mean((0, 1))
        for name, background in BACKGROUNDS.items()
    }
    for name, mean in means.items():
        others = [np.abs(mean - value).sum() for other, value in means.items() if other != name]
        assert min(others) > 20, name


def test_sampled_scenes_cover_the_vocabulary():
    rng = random.Random(0)
    scenes = [sample_scene(rng) for _ in range(2000)]
    assert {scene.kind for scene in scenes} == {*SHAPES, "toy", "letter"}
    assert {scene.colour for scene in scenes} == set(COLOURS)
    assert {scene.pattern for scene in scenes} == set(PATTERNS)
    assert {scene.background for scene in scenes} == set(BACKGROUNDS)
    shares = Counter(scene.background for scene in scenes)
    assert shares[PLAIN] < 2 * min(shares.values())


def test_a_rendered_corpus_does_not_depend_on_its_workers():
    alone, together = (rendered_corpus(300, 16, seed=5, workers=workers) for workers in (1, 2))
    assert alone.captions == together.captions
    np.testing.assert_array_equal(alone.images, together.images)
    one_way = np.asarray(["letter" in caption or "crescent" in caption for caption in alone.captions])
    np.testing.assert_array_equal(alone.mirrorable, ~one_way)
