"""In-memory datasets of captioned images, rendered scenes and photographs, for pretraining the built-in models."""

from __future__ import annotations

import io
import json
import random
import zipfile
from collections.abc import Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from tqdm.auto import tqdm

from pipelines.images import read_image
from pipelines.scenes import Scene, render, sample_scene
from pipelines.wording import with_article

CHUNK = 256
ONE_WAY = ("letter", "crescent")
# Share of each class's photographs that the built-in CLIP was not trained on.
HELD_OUT_SHARE = 0.1


@dataclass(frozen=True)
class Corpus:
    """Images with one caption each.

    Args:
        images: (count, size, size, 3) uint8.
        captions: `count` captions.
        mirrorable: (count,) bool, whether the caption also fits the mirror image, which it does not for letters and crescents.
    """

    images: np.ndarray
    captions: list[str]
    mirrorable: np.ndarray

    def __len__(self) -> int:
        return len(self.captions)


def to_pixels(images: np.ndarray) -> torch.Tensor:
    """(count, height, width, 3) uint8 to (count, 3, height, width) float32 in [-1, 1]."""
    return torch.from_numpy(np.ascontiguousarray(images)).permute(0, 3, 1, 2).float() / 127.5 - 1


def part(corpus: Corpus, indices: np.ndarray) -> Corpus:
    """The images of `corpus` at `indices` (count,)."""
    return Corpus(corpus.images[indices], [corpus.captions[index] for index in indices], corpus.mirrorable[indices])


def join(*corpora: Corpus) -> Corpus:
    """The given corpora one after another."""
    return Corpus(
        np.concatenate([corpus.images for corpus in corpora]),
        [caption for corpus in corpora for caption in corpus.captions],
        np.concatenate([corpus.mirrorable for corpus in corpora]),
    )


def _chunks(count: int, seed: int) -> tuple[list[int], list[int]]:
    """The seeds and the sizes of the chunks in which `count` scenes are sampled."""
    sizes = [min(CHUNK, count - start) for start in range(0, count, CHUNK)]
    return [seed * 1_000_003 + chunk for chunk in range(len(sizes))], sizes


def _chunk_scenes(rng: random.Random, count: int) -> list[Scene]:
    return [sample_scene(rng) for _ in range(count)]


def corpus_scenes(count: int, seed: int) -> list[Scene]:
    """The scenes of `rendered_corpus(count, size, seed)`, without rendering them."""
    return [
        scene for start, size in zip(*_chunks(count, seed), strict=True) for scene in _chunk_scenes(random.Random(start), size)
    ]


def _render_chunk(seed: int, count: int, size: int) -> Corpus:
    rng = random.Random(seed)
    scenes = _chunk_scenes(rng, count)
    images = np.stack([np.asarray(render(scene, size, rng)) for scene in scenes])
    mirrorable = np.asarray([scene.kind not in ONE_WAY for scene in scenes])
    return Corpus(images, [scene.caption for scene in scenes], mirrorable)


def rendered_corpus(count: int, size: int, seed: int, workers: int = 1) -> Corpus:
    """`count` rendered scenes of `size` x `size` pixels, which depend on `seed` but not on the number of `workers`."""
    seeds, counts = _chunks(count, seed)
    with ProcessPoolExecutor(workers) as pool:
        chunks = pool.map(_render_chunk, seeds, counts, [size] * len(counts))
        return join(*tqdm(chunks, total=len(counts), desc="rendering scenes", unit=f"x{CHUNK}"))


@dataclass(frozen=True)
class ZippedPhoto:
    """A photograph in a zip.

    Args:
        archive: the zip.
        name: of the file in it, `<class id>/<n>.webp`.
        class_name: name of the class.
    """

    archive: Path
    name: str
    class_name: str

    @property
    def caption(self) -> str:
        """The caption in the pretraining."""
        return f"a photo of {with_article(self.class_name)}"


def zipped_photos(folder: Path) -> list[ZippedPhoto]:
    """The photographs in `folder`, in zips of `<class id>/<n>.webp`; classes.json holds the names of the classes.

    Raises: FileNotFoundError if `folder` holds no classes.json or no zip.
    """
    names = json.loads((folder / "classes.json").read_text())
    zips = sorted(folder.glob("*.zip"))
    if not zips:
        raise FileNotFoundError(
            f"{str(folder)!r} holds no .zip with photographs. Put zips of <class id>/<image> beside classes.json."
        )
    photos = []
    for path in zips:
        with zipfile.ZipFile(path) as archive:
            members = [name for name in sorted(archive.namelist()) if not name.endswith("/")]
        photos += [ZippedPhoto(path, name, names[name.split("/")[0]]) for name in members]
    return photos


def read_photos(photos: Sequence[ZippedPhoto]) -> Iterator[Image.Image]:
    """The images of `photos` in RGB, in this order.

    Raises: InputError naming the photograph that cannot be read.
    """
    with ExitStack() as stack:
        archives = {path: stack.enter_context(zipfile.ZipFile(path)) for path in {photo.archive for photo in photos}}
        for photo in tqdm(photos, desc="reading photographs", leave=False, delay=5):
            content = io.BytesIO(archives[photo.archive].read(photo.name))
            yield read_image(content, f"{photo.name!r} in {str(photo.archive)!r}")


def photo_corpus(folder: Path, size: int) -> Corpus:
    """The photographs in `folder`, as `zipped_photos` lists them, resized to `size` x `size` pixels.

    Raises: FileNotFoundError if `folder` holds no classes.json or no zip.
    """
    photos = zipped_photos(folder)
    images = [np.asarray(image.resize((size, size), Image.Resampling.LANCZOS)) for image in read_photos(photos)]
    return Corpus(np.stack(images), [photo.caption for photo in photos], np.ones(len(photos), dtype=bool))


def split_held_out(captions: list[str], share: float, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """Indices (n,) of the training images and of the held-out ones, which are `share` of each caption's images."""
    rng = np.random.default_rng(seed)
    by_caption = np.unique(captions, return_inverse=True)[1]
    held_out = np.zeros(len(captions), dtype=bool)
    for caption in range(by_caption.max() + 1):
        indices = rng.permutation(np.flatnonzero(by_caption == caption))
        held_out[indices[: round(share * len(indices))]] = True
    return np.flatnonzero(~held_out), np.flatnonzero(held_out)
