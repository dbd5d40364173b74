"""The bundled sample classes: coloured shapes, rendered like the pretraining scenes of the built-in models.

    python -m pipelines.sample_classes assets/sample-classes/coloured-shapes.zip

writes the zip of class folders. On the 108 test images of its default split, the built-in CLIP classifies 97% correctly from the
class names alone, logistic regression on raw pixels 75%, and NoRA after 160 steps of 16-shot training 99%.
"""

from __future__ import annotations

import io
import random
import sys
import zipfile
from pathlib import Path

from PIL import Image

from pipelines.backgrounds import BACKGROUNDS
from pipelines.scenes import PATTERNS, SIZES, Scene, render

SIZE, PER_CLASS, SEED = 96, 40, 2026
CLASSES = tuple((colour, shape) for colour in ("red", "green", "blue") for shape in ("star", "heart", "ring"))


def sample_images(seed: int = SEED) -> dict[str, list[Image.Image]]:
    """`PER_CLASS` images of each class by its name, in random patterns and sizes on random backgrounds."""
    rng = random.Random(seed)

    def scene(colour: str, shape: str) -> Scene:
        pattern, size, background = (rng.choice(tuple(values)) for values in (PATTERNS, SIZES, BACKGROUNDS))
        return Scene(shape, colour, pattern, size, background)

    return {f"{colour} {shape}": [render(scene(colour, shape), SIZE, rng) for _ in range(PER_CLASS)] for colour, shape in CLASSES}


def main(path: Path) -> None:
    """Write the zip of class folders."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with zipfile.ZipFile(path, "w") as archive:
        for name, images in sample_images().items():
            for index, image in enumerate(images):
                stored = io.BytesIO()
                image.save(stored, "JPEG", quality=88)
                # A fixed date, so that the same images make the same file.
                archive.writestr(zipfile.ZipInfo(f"{name}/{index:02d}.jpg"), stored.getvalue())


if __name__ == "__main__":
    main(Path(sys.argv[1]))
