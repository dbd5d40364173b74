"""Backgrounds of rendered scenes, each with its caption phrase and the function that renders it."""

from __future__ import annotations

import random
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from PIL import Image

PLAIN = "plain"


@dataclass(frozen=True)
class Background:
    """`phrase` ends the caption; `render(canvas, rng)` returns an RGB image of `canvas` x `canvas` pixels."""

    phrase: str
    render: Callable[[int, random.Random], Image.Image]


def _noise(canvas: int, cells: int, rng: random.Random, cells_across: int | None = None) -> np.ndarray:
    """Smooth noise in [-1, 1], (canvas, canvas): a random grid of `cells` rows, interpolated."""
    generator = np.random.default_rng(rng.getrandbits(32))
    grid = generator.uniform(-1, 1, (cells, cells_across or cells)).astype(np.float32)
    return np.asarray(Image.fromarray(grid).resize((canvas, canvas), Image.Resampling.BICUBIC))


def _shade(colour: tuple[float, float, float], strength: np.ndarray, amount: float) -> np.ndarray:
    """(canvas, canvas, 3): `colour` made lighter by `amount` where `strength` is 1, and darker where it is -1."""
    return np.asarray(colour, dtype=np.float32) * (1 + amount * strength[..., None])


def _image(array: np.ndarray) -> Image.Image:
    return Image.fromarray(array.clip(0, 255).astype(np.uint8))


def _sky(canvas: int, rng: random.Random, top: tuple[float, float, float], low: tuple[float, float, float]) -> np.ndarray:
    height = np.linspace(0, 1, canvas, dtype=np.float32)[:, None, None]
    sky = np.asarray(top, np.float32) * (1 - height) + np.asarray(low, np.float32) * height
    return np.broadcast_to(sky, (canvas, canvas, 3)) * rng.uniform(0.96, 1.04)


def _land(canvas: int, rng: random.Random, ground: np.ndarray, sky: np.ndarray, low: float, high: float) -> Image.Image:
    """`ground` below a slightly wavy horizon between `low` and `high` of the height, `sky` above."""
    horizon = rng.uniform(low, high) * canvas + _noise(canvas, 4, rng)[0] * canvas * 0.03
    below = np.arange(canvas)[:, None] >= horizon[None, :]
    return _image(np.where(below[..., None], ground, sky))


def _scatter(array: np.ndarray, rng: random.Random, count: int, radius: float, colour: tuple[int, int, int]) -> np.ndarray:
    """Round dots of about `radius` pixels at `count` random places."""
    canvas = array.shape[0]
    array = np.array(array, dtype=np.float32)
    row, column = np.mgrid[-3:4, -3:4] / 3
    dot = row * row + column * column <= 1
    for _ in range(count):
        size = max(1, round(radius * rng.uniform(0.7, 1.3)))
        y, x = rng.randrange(canvas - 2 * size - 1), rng.randrange(canvas - 2 * size - 1)
        stamp = np.asarray(Image.fromarray(dot).resize((2 * size + 1, 2 * size + 1)))
        array[y : y + 2 * size + 1, x : x + 2 * size + 1][stamp] = colour
    return array


def _plain(canvas: int, rng: random.Random) -> Image.Image:
    level = rng.uniform(165, 225)
    return _image(_shade((level, level, level), _noise(canvas, 3, rng), 0.03))


def _snow(canvas: int, rng: random.Random) -> Image.Image:
    ground = _shade((236, 242, 250), _noise(canvas, 5, rng, 3), 0.05)
    sky = _sky(canvas, rng, (150, 178, 215), (200, 216, 236))
    land = np.asarray(_land(canvas, rng, ground, sky, 0.25, 0.5))
    return _image(_scatter(land, rng, 26, canvas / 75, (255, 255, 255)))


def _grass(canvas: int, rng: random.Random) -> Image.Image:
    blades = 0.6 * _noise(canvas, 10, rng, 40) + 0.4 * _noise(canvas, 4, rng)
    ground = _shade((78, 150, 48), blades, 0.32)
    return _land(canvas, rng, ground, _sky(canvas, rng, (110, 175, 240), (190, 222, 250)), 0.15, 0.35)


def _night(canvas: int, rng: random.Random) -> Image.Image:
    sky = _sky(canvas, rng, (8, 10, 38), (26, 30, 78))
    land = np.asarray(_land(canvas, rng, _shade((14, 20, 26), _noise(canvas, 6, rng), 0.2), sky, 0.78, 0.9))
    array = np.array(land, dtype=np.float32)
    for _ in range(20):
        size = rng.choice((canvas // 64, canvas // 64, canvas // 42))
        y, x = rng.randrange(int(canvas * 0.75)), rng.randrange(canvas - size)
        array[y : y + size, x : x + size] = (250, 245, 205)
    return _image(array)


def _beach(canvas: int, rng: random.Random) -> Image.Image:
    sand = _shade((232, 205, 145), 0.5 * _noise(canvas, 40, rng) + 0.5 * _noise(canvas, 5, rng), 0.07)
    sea = _shade((40, 140, 190), _noise(canvas, 30, rng, 4), 0.12)
    far = np.asarray(_land(canvas, rng, sea, _sky(canvas, rng, (120, 190, 245), (205, 232, 250)), 0.2, 0.3))
    return _land(canvas, rng, sand, far, 0.42, 0.58)


def _forest(canvas: int, rng: random.Random) -> Image.Image:
    array = _shade((34, 82, 42), _noise(canvas, 14, rng), 0.35)
    for _ in range(rng.randint(4, 6)):
        x, width = rng.uniform(-0.05, 1.0) * canvas, rng.uniform(0.05, 0.1) * canvas
        left, right = max(0, int(x)), max(0, int(x + width))
        bark = _shade((88, 58, 36), _noise(canvas, 16, rng, 8), 0.25)
        array[:, left:right] = bark[:, left:right]
    floor = _shade((52, 66, 30), _noise(canvas, 12, rng), 0.3)
    return _land(canvas, rng, floor, array, 0.82, 0.92)


def _bricks(canvas: int, rng: random.Random) -> Image.Image:
    height, width = canvas // 9, canvas // 4
    row, column = np.mgrid[0:canvas, 0:canvas]
    row = row + rng.randrange(height)
    course = row // height
    column = column + (course % 2) * (width // 2) + rng.randrange(width)
    mortar = (row % height < max(2, canvas // 64)) | (column % width < max(2, canvas // 64))
    generator = np.random.default_rng(rng.getrandbits(32))
    tones = generator.uniform(-1, 1, (16, 16)).astype(np.float32)[course % 16, (column // width) % 16]
    wall = _shade((166, 78, 58), tones, 0.14)
    return _image(np.where(mortar[..., None], np.asarray((205, 195, 185), np.float32), wall))


def _water(canvas: int, rng: random.Random) -> Image.Image:
    row, column = np.mgrid[0:canvas, 0:canvas].astype(np.float32) / canvas
    waves = np.sin(
        2 * np.pi * (row * rng.uniform(6, 9) + 0.25 * np.sin(2 * np.pi * (column * rng.uniform(1.5, 3) + rng.random())))
    )
    return _image(_shade((36, 110, 180), 0.7 * waves + 0.3 * _noise(canvas, 6, rng), 0.2))


def _wood(canvas: int, rng: random.Random) -> Image.Image:
    plank = canvas / rng.uniform(4.2, 5.2)
    row = np.mgrid[0:canvas, 0:canvas][0] + rng.uniform(0, plank)
    tones = np.asarray([rng.uniform(-1, 1) for _ in range(8)], np.float32)[(row // plank).astype(int) % 8]
    array = _shade((176, 122, 72), 0.5 * tones + 0.6 * _noise(canvas, 48, rng, 4), 0.14)
    array[np.mod(row, plank) < max(2, canvas // 64)] *= 0.55
    return _image(array)


BACKGROUNDS: dict[str, Background] = {
    PLAIN: Background("", _plain),
    "snow": Background("in the snow", _snow),
    "grass": Background("on the grass", _grass),
    "night": Background("at night", _night),
    "beach": Background("on the beach", _beach),
    "forest": Background("in the forest", _forest),
    "bricks": Background("on a brick wall", _bricks),
    "water": Background("in the water", _water),
    "wood": Background("on a wooden floor", _wood),
}
