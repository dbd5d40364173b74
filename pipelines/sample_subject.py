"""The bundled sample subject: a figure that does not occur in the pretraining scenes.

    python -m pipelines.sample_subject assets/sample-subject

renders its five images; snow, night, forest and water are left for the prompts.
"""

from __future__ import annotations

import random
import sys
from pathlib import Path

from PIL import Image, ImageDraw

from pipelines.backgrounds import BACKGROUNDS

SCENE_BACKGROUNDS = ("plain", "grass", "beach", "bricks", "wood")
TEAL, CORAL, CREAM, INK = (30, 168, 160), (250, 112, 84), (255, 244, 214), (24, 40, 48)
SIZE, SUPERSAMPLING = 512, 2


def render_sample_subject(image: Image.Image, centre: tuple[float, float], radius: float) -> Image.Image:
    """Render the figure, 2 `radius` tall, about `centre` onto `image`; returns `image`.

    A teal bottle-shaped body, one large eye, a cream belly with a coral zigzag, a coral three-pronged crown and boots.
    """
    figure = _Figure(ImageDraw.Draw(image), centre, radius)
    for side in (-1, 1):
        figure.limbs(side)
    crown = figure.to_pixels((-0.42, -0.55), (-0.46, -1.0), (-0.2, -0.76), (0, -1.04), (0.2, -0.76), (0.46, -1.0), (0.42, -0.55))
    figure.draw.polygon(crown, fill=CORAL, outline=INK, width=figure.line)
    figure.body()
    figure.eye()
    figure.belly()
    return image


class _Figure:
    """Renders the figure's parts; corners are in units of the radius, relative to the centre."""

    def __init__(self, draw: ImageDraw.ImageDraw, centre: tuple[float, float], radius: float) -> None:
        self.draw, self.centre, self.radius = draw, centre, radius
        self.line = max(2, round(radius * 0.03))

    def to_pixels(self, *points: tuple[float, float]) -> list[tuple[float, float]]:
        """The points in pixels of the image."""
        return [(self.centre[0] + self.radius * x, self.centre[1] + self.radius * y) for x, y in points]

    def box(self, left: float, top: float, right: float, bottom: float) -> list[float]:
        """A rectangle in pixels of the image."""
        return [c for point in self.to_pixels((left, top), (right, bottom)) for c in point]

    def limbs(self, side: int) -> None:
        """A boot, an arm and its hand on one `side`, -1 or 1."""
        boot, hand = (side * 0.31 - 0.24, 0.72, side * 0.31 + 0.24, 1.0), (side * 0.86 - 0.13, -0.29, side * 0.86 + 0.13, -0.03)
        outlined = {"fill": CORAL, "outline": INK, "width": self.line}
        self.draw.rounded_rectangle(self.box(*boot), radius=self.radius * 0.1, **outlined)
        self.draw.line(self.to_pixels((side * 0.5, 0.1), (side * 0.86, -0.14)), fill=INK, width=round(self.radius * 0.2))
        self.draw.line(self.to_pixels((side * 0.5, 0.1), (side * 0.85, -0.13)), fill=TEAL, width=round(self.radius * 0.14))
        self.draw.ellipse(self.box(*hand), **outlined)

    def body(self) -> None:
        """The bottle."""
        corners = self.box(-0.56, -0.66, 0.56, 0.82)
        self.draw.rounded_rectangle(corners, radius=self.radius * 0.38, fill=TEAL, outline=INK, width=self.line)

    def eye(self) -> None:
        """The white, the pupil and the light in it."""
        self.draw.ellipse(self.box(-0.34, -0.56, 0.34, 0.12), fill=(255, 255, 255), outline=INK, width=self.line)
        self.draw.ellipse(self.box(-0.15, -0.37, 0.15, -0.07), fill=INK)
        self.draw.ellipse(self.box(-0.1, -0.33, 0.0, -0.23), fill=(255, 255, 255))

    def belly(self) -> None:
        """The belly and its zigzag."""
        corners = self.box(-0.42, 0.2, 0.42, 0.68)
        self.draw.rounded_rectangle(corners, radius=self.radius * 0.14, fill=CREAM, outline=INK, width=self.line)
        zigzag = self.to_pixels((-0.34, 0.5), (-0.2, 0.34), (-0.06, 0.5), (0.08, 0.34), (0.22, 0.5), (0.34, 0.34))
        self.draw.line(zigzag, fill=CORAL, width=round(self.radius * 0.1), joint="curve")


def sample_images(seed: int = 0) -> list[Image.Image]:
    """The five bundled images, 512 x 512 pixels, each in one of `SCENE_BACKGROUNDS`."""
    rng, canvas = random.Random(seed), SIZE * SUPERSAMPLING
    images = []
    for background in SCENE_BACKGROUNDS:
        radius = canvas * rng.uniform(0.30, 0.38)
        centre = (canvas * rng.uniform(0.44, 0.56), canvas * rng.uniform(0.5, 0.56))
        image = render_sample_subject(BACKGROUNDS[background].render(canvas, rng), centre, radius)
        images.append(image.resize((SIZE, SIZE), Image.Resampling.LANCZOS))
    return images


def main(folder: Path) -> None:
    """Write the five images to `folder` as 00.jpg to 04.jpg."""
    folder.mkdir(parents=True, exist_ok=True)
    for index, image in enumerate(sample_images()):
        image.save(folder / f"{index:02d}.jpg", quality=92)


if __name__ == "__main__":
    main(Path(sys.argv[1]))
