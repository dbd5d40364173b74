"""Small sets of images for tests."""

import io
import zipfile

import numpy as np
from PIL import Image


def stored_image(seed, side=8, form="PNG"):
    """The file of a random image, which depends on the seed."""
    stored = io.BytesIO()
    pixels = np.random.default_rng(seed).integers(0, 256, (side, side, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(stored, form)
    return stored.getvalue()


def class_files(counts, prefix=""):
    """The files of images by name, `counts` of each class: {"cats/0.png": ..., ...}."""
    names = [f"{prefix}{key}/{place}.png" for key, count in counts.items() for place in range(count)]
    return {name: stored_image(seed) for seed, name in enumerate(names)}


def write_files(folder, files):
    """Write `files` to `folder` and return it."""
    for name, content in files.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(content)
    return folder


def write_zip(path, files, method=zipfile.ZIP_DEFLATED):
    """Write a zip of `files`, by name or ZipInfo, to `path` and return it."""
    with zipfile.ZipFile(path, "w", method) as archive:
        for name, content in files.items():
            archive.writestr(name, content, method)
    return path
