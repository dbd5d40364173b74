"""Rendered scenes of shapes, letters and toys with captions.

A `Scene` holds what its caption describes; `render` renders it with a random pose, shade and texture. The built-in models are
pretrained on these scenes, and metrics compare generated images with them.
"""

from __future__ import annotations

import math
import random
from collections.abc import Callable, Collection
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

import matplotlib
import numpy as np
from PIL import Image, ImageDraw, ImageFilter, ImageFont

from pipelines.backgrounds import BACKGROUNDS, PLAIN
from pipelines.wording import with_article

Colour = tuple[int, int, int]

COLOURS: dict[str, Colour] = {
    "red": (214, 40, 40),
    "orange": (245, 130, 32),
    "yellow": (250, 215, 50),
    "green": (45, 160, 70),
    "blue": (45, 95, 215),
    "purple": (130, 60, 175),
    "pink": (245, 130, 180),
    "white": (248, 248, 248),
    "black": (28, 28, 32),
}
PATTERNS = ("plain", "striped", "dotted", "checkered")
SIZES: dict[str, float] = {"small": 0.40, "": 0.54, "large": 0.70}
PARTS = ("size", "colour", "pattern", "kind", "background")
GLYPHS = "ABCDEFGHJKLMNPRSTUVXYZ23456789"
SUPERSAMPLING = 3


def _regular(points: int, inner: float, start_angle: float = -math.pi / 2) -> list[tuple[float, float]]:
    """Corners of a star of `points` spikes whose valleys lie at `inner` of the radius, on the unit circle."""
    corners = []
    for k in range(2 * points):
        radius = 1.0 if k % 2 == 0 else inner
        angle = start_angle + math.pi * k / points
        corners.append((radius * math.cos(angle), radius * math.sin(angle)))
    return corners


def _heart() -> list[tuple[float, float]]:
    angles = np.linspace(0, 2 * math.pi, 48, endpoint=False)
    x = 16 * np.sin(angles) ** 3
    y = 13 * np.cos(angles) - 5 * np.cos(2 * angles) - 2 * np.cos(3 * angles) - np.cos(4 * angles)
    return list(zip(x / 17, -(y + 2.5) / 17, strict=True))


def _crescent() -> list[tuple[float, float]]:
    outer = np.linspace(0.25 * math.pi, 1.75 * math.pi, 40)
    inner = np.linspace(1.68 * math.pi, 0.32 * math.pi, 40)
    far = [(math.cos(a), math.sin(a)) for a in outer]
    near = [(0.38 + 0.74 * math.cos(a), 0.78 * math.sin(a)) for a in inner]
    return [(x + 0.15, y) for x, y in far + near]


_ARM = 0.36
POLYGONS: dict[str, list[tuple[float, float]]] = {
    "circle": [(0.92 * math.cos(a), 0.92 * math.sin(a)) for a in np.linspace(0, 2 * math.pi, 64, endpoint=False)],
    "square": [(-0.8, -0.8), (0.8, -0.8), (0.8, 0.8), (-0.8, 0.8)],
    "triangle": [(0, -0.95), (0.98, 0.75), (-0.98, 0.75)],
    "star": _regular(5, 0.42),
    "heart": _heart(),
    "crescent": _crescent(),
    "cross": [(-_ARM, -1), (_ARM, -1), (_ARM, -_ARM), (1, -_ARM), (1, _ARM), (_ARM, _ARM),
              (_ARM, 1), (-_ARM, 1), (-_ARM, _ARM), (-1, _ARM), (-1, -_ARM), (-_ARM, -_ARM)],
    "diamond": [(0, -1), (0.68, 0), (0, 1), (-0.68, 0)],
    "ring": [],
}  # fmt: skip
SHAPES = tuple(POLYGONS)


@dataclass(frozen=True)
class Scene:
    """The content of a scene, which its caption describes.

    Args:
        kind: a name of `SHAPES`, "letter" or "toy".
        colour: a name of `COLOURS`.
        pattern: a name of `PATTERNS`.
        size: a name of `SIZES`; the empty string is the middle size.
        background: a name of `BACKGROUNDS`, or "plain".
        glyph: the letter or digit, where `kind` is "letter".
    """

    kind: str
    colour: str
    pattern: str = "plain"
    size: str = ""
    background: str = PLAIN
    glyph: str = ""

    def __post_init__(self) -> None:
        allowed = {
            "kind": (*SHAPES, "letter", "toy"),
            "colour": COLOURS,
            "pattern": PATTERNS,
            "size": SIZES,
            "background": BACKGROUNDS,
        }
        for field, values in allowed.items():
            if getattr(self, field) not in values:
                raise ValueError(f"{field} must be one of {', '.join(map(repr, values))}, got {getattr(self, field)!r}.")
        if (self.kind == "letter") != (self.glyph != "") or self.glyph not in GLYPHS:
            raise ValueError(f"glyph must be one of {GLYPHS!r} for kind 'letter' and empty otherwise, got {self.glyph!r}.")

    @property
    def caption(self) -> str:
        """The scene in words, such as "a large red striped star in the snow"."""
        return self.describe(PARTS)

    def describe(self, parts: Collection[str]) -> str:
        """The scene in the words of some `parts` of it, such as "a red star", or "a red thing" without its kind."""
        words = {
            "size": self.size,
            "colour": self.colour,
            "pattern": "" if self.pattern == "plain" else self.pattern,
            "kind": f"letter {self.glyph}" if self.kind == "letter" else self.kind,
            "background": BACKGROUNDS[self.background].phrase,
        }
        included = {part: word if part in parts else "" for part, word in words.items()}
        included["kind"] = included["kind"] or "thing"
        return with_article(" ".join(filter(None, included.values())))


def sample_scene(rng: random.Random) -> Scene:
    """Sample a scene: three quarters shapes, a fifth toys, the rest letters and digits."""
    uniform = rng.random()
    kind = rng.choice(SHAPES) if uniform < 0.75 else "toy" if uniform < 0.95 else "letter"
    pattern = "plain" if kind == "letter" or rng.random() < 0.45 else rng.choice(PATTERNS[1:])
    return Scene(
        kind=kind,
        colour=rng.choice(tuple(COLOURS)),
        pattern=pattern,
        size=rng.choice(tuple(SIZES)),
        background=rng.choice(tuple(BACKGROUNDS)),
        glyph=rng.choice(GLYPHS) if kind == "letter" else "",
    )


def render(scene: Scene, size: int, rng: random.Random) -> Image.Image:
    """Render `scene` as an RGB image of `size` x `size` pixels; pose, shade and texture come from `rng`."""
    canvas = size * SUPERSAMPLING
    image = BACKGROUNDS[scene.background].render(canvas, rng)
    radius = canvas / 2 * SIZES[scene.size] * rng.uniform(0.96, 1.04)
    # Near the centre: at random positions, shapes were still blurred after pretraining on 250,000 images.
    reach = max(0.0, canvas / 2 - radius * 1.02)
    centre = tuple(canvas / 2 + rng.uniform(-0.2, 0.2) * reach for _ in range(2))
    paint = _pattern(scene.pattern, COLOURS[scene.colour], canvas, centre, radius, rng)
    if scene.kind == "toy":
        image = render_toy(image, paint, centre, radius, sample_toy(scene.colour, rng))
    else:
        mask = (
            _letter_mask(scene.glyph, canvas, centre, radius, rng)
            if scene.kind == "letter"
            else shape_mask(scene.kind, canvas, centre, radius, math.radians(rng.uniform(-6, 6)))
        )
        image = _paste_outlined(image, paint, mask, COLOURS[scene.colour])
    return image.resize((size, size), Image.Resampling.BOX)


def shape_mask(shape: str, canvas: int, centre: tuple[float, float], radius: float, angle: float) -> Image.Image:
    """The shape as a grey mask of `canvas` x `canvas` pixels, turned by `angle` radians about `centre`."""
    mask = Image.new("L", (canvas, canvas), 0)
    draw = ImageDraw.Draw(mask)
    x, y = centre
    if shape == "ring":
        for scale, value in ((0.95, 255), (0.52, 0)):
            r = radius * scale
            draw.ellipse((x - r, y - r, x + r, y + r), fill=value)
        return mask
    cos, sin = math.cos(angle), math.sin(angle)
    draw.polygon([(x + radius * (cos * u - sin * v), y + radius * (sin * u + cos * v)) for u, v in POLYGONS[shape]], fill=255)
    return mask


@lru_cache(maxsize=1)
def _font_files() -> tuple[str, ...]:
    folder = Path(matplotlib.get_data_path()) / "fonts" / "ttf"
    names = (
        "DejaVuSans",
        "DejaVuSans-Bold",
        "DejaVuSansMono-Bold",
        "DejaVuSerif",
        "DejaVuSerif-Bold",
        "DejaVuSans-BoldOblique",
        "STIXGeneralBol",
    )
    return tuple(str(folder / f"{name}.ttf") for name in names)


@lru_cache(maxsize=256)
def _font(path: str, size: int) -> ImageFont.FreeTypeFont:
    return ImageFont.truetype(path, size)


def _letter_mask(glyph: str, canvas: int, centre: tuple[float, float], radius: float, rng: random.Random) -> Image.Image:
    mask = Image.new("L", (canvas, canvas), 0)
    font = _font(rng.choice(_font_files()), int(radius * 2.3))
    ImageDraw.Draw(mask).text(centre, glyph, fill=255, font=font, anchor="mm")
    return mask


def _pattern(
    pattern: str, colour: Colour, canvas: int, centre: tuple[float, float], radius: float, rng: random.Random
) -> Image.Image:
    """An image filled with `colour`, and with the pattern about `centre` in a much lighter or much darker tone."""
    base = np.array(colour, dtype=np.float32) * rng.uniform(0.92, 1.06)
    other = base * 0.35 if base.mean() > 150 else base * 0.35 + 165
    row, column = np.mgrid[0:canvas, 0:canvas].astype(np.float32)
    # Coarse enough for latents of a quarter of the image's side.
    step = radius * (0.75 if pattern == "striped" else 0.68)
    down, right = (row - centre[1]) / step, (column - centre[0]) / step
    if pattern == "plain":
        on = np.zeros((canvas, canvas), dtype=bool)
    elif pattern == "striped":
        on = np.abs(down - np.round(down)) < 0.23
    elif pattern == "dotted":
        on = (down - np.round(down)) ** 2 + (right - np.round(right)) ** 2 < 0.31**2
    else:
        on = (np.floor(down) + np.floor(right)) % 2 == 0
    sheet = np.where(on[..., None], other, base).clip(0, 255).astype(np.uint8)
    return Image.fromarray(sheet)


def _outline_colour(colour: Colour) -> Colour:
    return tuple(int(c * 0.45) for c in colour) if sum(colour) > 120 else (120, 120, 128)


def _paste_outlined(image: Image.Image, paint: Image.Image, mask: Image.Image, colour: Colour) -> Image.Image:
    """Paste `paint` through `mask`, with a thin contour so that white stays visible on snow."""
    contour = mask.filter(ImageFilter.MaxFilter(2 * SUPERSAMPLING - 1))
    image.paste(_outline_colour(colour), mask=contour)
    image.paste(paint, mask=mask)
    return image


@dataclass(frozen=True)
class Toy:
    """The parts of a toy figure; `accent` colours its ears, arms and feet."""

    colour: Colour
    accent: Colour
    body: str
    ears: str
    eyes: int
    arms: bool
    belly: str


TOY_BODIES = ("ellipse", "box", "bell")
TOY_EARS = ("pointed", "round", "antenna", "none")
TOY_BELLIES = ("none", "circle", "heart", "star")


def sample_toy(colour: str, rng: random.Random) -> Toy:
    """Sample a toy of the named colour."""
    accent = rng.choice([value for name, value in COLOURS.items() if name != colour])
    return Toy(
        COLOURS[colour],
        accent,
        rng.choice(TOY_BODIES),
        rng.choice(TOY_EARS),
        rng.choice((1, 2, 2, 2)),
        rng.random() < 0.7,
        rng.choice(TOY_BELLIES),
    )


def render_toy(image: Image.Image, paint: Image.Image, centre: tuple[float, float], radius: float, toy: Toy) -> Image.Image:
    """Render `toy` of height 2 `radius` about `centre` onto `image`, its body in `paint`; returns `image`."""
    canvas = image.width

    def part(draw_part: Callable[[ImageDraw.ImageDraw], None], fill: Image.Image | Colour, colour: Colour) -> None:
        mask = Image.new("L", (canvas, canvas), 0)
        draw_part(ImageDraw.Draw(mask))
        sheet = fill if isinstance(fill, Image.Image) else Image.new("RGB", (canvas, canvas), fill)
        _paste_outlined(image, sheet, mask, colour)

    x, y = centre

    def box(left: float, top: float, right: float, bottom: float) -> tuple[float, float, float, float]:
        return x + left * radius, y + top * radius, x + right * radius, y + bottom * radius

    for side in (-1, 1):
        _toy_limbs(part, box, side, toy)
    if toy.body == "ellipse":
        part(lambda d: d.ellipse(box(-0.62, -0.62, 0.62, 0.82), fill=255), paint, toy.colour)
    elif toy.body == "box":
        part(lambda d: d.rounded_rectangle(box(-0.58, -0.6, 0.58, 0.8), radius=0.16 * radius, fill=255), paint, toy.colour)
    else:
        bell = [(-0.3, -0.62), (0.3, -0.62), (0.72, 0.8), (-0.72, 0.8)]
        part(lambda d: d.polygon([(x + u * radius, y + v * radius) for u, v in bell], fill=255), paint, toy.colour)
    _toy_face(ImageDraw.Draw(image), box, toy)
    if toy.belly != "none":
        belly = shape_mask(toy.belly, canvas, (x, y + 0.42 * radius), 0.27 * radius, 0.0)
        image.paste(toy.accent, mask=belly)
    return image


def _toy_limbs(part: Callable, box: Callable, side: int, toy: Toy) -> None:
    def across(left: float, top: float, right: float, bottom: float) -> tuple[float, float, float, float]:
        edges = sorted((side * left, side * right))
        return box(edges[0], top, edges[1], bottom)

    part(lambda d: d.ellipse(across(0.08, 0.66, 0.56, 1.0), fill=255), toy.accent, toy.accent)
    if toy.arms:
        part(lambda d: d.ellipse(across(0.48, 0.0, 0.96, 0.3), fill=255), toy.accent, toy.accent)
    if toy.ears == "round":
        part(lambda d: d.ellipse(across(0.14, -0.98, 0.62, -0.46), fill=255), toy.accent, toy.accent)
    elif toy.ears == "pointed":
        corners = [across(0.1, -0.5, 0.1, -0.5)[:2], across(0.36, -1.05, 0.36, -1.05)[:2], across(0.56, -0.36, 0.56, -0.36)[:2]]
        part(lambda d: d.polygon(corners, fill=255), toy.accent, toy.accent)
    elif toy.ears == "antenna":
        part(
            lambda d: d.line(
                (*across(0.12, -0.5, 0.12, -0.5)[:2], *across(0.3, -0.88, 0.3, -0.88)[:2]), fill=255, width=3 * SUPERSAMPLING // 2
            ),
            toy.accent,
            toy.accent,
        )
        part(lambda d: d.ellipse(across(0.2, -1.02, 0.42, -0.8), fill=255), toy.accent, toy.accent)


def _toy_face(draw: ImageDraw.ImageDraw, box: Callable, toy: Toy) -> None:
    eye_positions = (0.0,) if toy.eyes == 1 else (-0.22, 0.22)
    size = 0.24 if toy.eyes == 1 else 0.17
    for eye_position in eye_positions:
        draw.ellipse(
            box(eye_position - size, -0.2 - size, eye_position + size, -0.2 + size),
            fill=(255, 255, 255),
            outline=(30, 30, 30),
            width=SUPERSAMPLING // 2,
        )
        draw.ellipse(box(eye_position - size / 2, -0.2 - size / 2, eye_position + size / 2, -0.2 + size / 2), fill=(20, 20, 20))
