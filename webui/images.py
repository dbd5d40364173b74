"""Images of a run, served as copies in Gradio's cache, the only folder that the server exposes."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from urllib.parse import quote

from gradio.processing_utils import save_file_to_cache, save_pil_to_cache
from gradio.utils import get_upload_folder
from PIL import Image

from pipelines.images import SETTINGS_KEY
from training.runs.record import RunRecord
from training.runs.run_files import STEP

# For a table cell of samples on a screen with two device pixels per CSS pixel.
SMALL_SIDE = 384
LARGE_SIDE = 512
# Images up to this side are upscaled with nearest-neighbour interpolation.
CRISP_SIDE = 128


@dataclass(frozen=True)
class Sample:
    """One sample image.

    Args:
        path: its file.
        prompt, seed: its generation settings.
        side: its width in pixels.
    """

    path: Path
    prompt: str
    seed: int
    side: int

    @property
    def css(self) -> str:
        """The CSS class of the image."""
        return "pixel" if self.side <= CRISP_SIDE else ""


def sampled_steps(record: RunRecord) -> list[int]:
    """The steps with sample images, in order; 0 is the base model."""
    names = (path.name for path in record.samples.glob(f"{STEP}*") if path.is_dir())
    return sorted(int(name.removeprefix(STEP)) for name in names if name.removeprefix(STEP).isdigit())


def samples(record: RunRecord, step: int) -> list[Sample]:
    """The sample images of `step`, one per prompt."""
    paths = sorted(record.samples_at(step).glob("*.png"), key=lambda path: int(path.stem))
    return [_sample(path, path.stat().st_mtime_ns) for path in paths]


def subject(record: RunRecord) -> list[Sample]:
    """Training images of the run."""
    paths = sorted(record.subject.glob("*.png"), key=lambda path: int(path.stem))
    return [_sample(path, path.stat().st_mtime_ns) for path in paths]


def newest_sheet(record: RunRecord) -> Path | None:
    """The newest contact sheet of samples; some recipes write no single samples. None if there is none."""
    return max(record.samples.glob(f"{STEP}*.png"), default=None)


def in_cache(path: Path) -> str:
    """The copy of an image in Gradio's cache, from which the page may load it; its path contains the hash of its content."""
    return save_file_to_cache(path, get_upload_folder())


def thumbnail(path: Path, side: int = SMALL_SIDE) -> str:
    """The cached copy of an image, downscaled to at most `side` pixels."""
    return _cached(_thumbnail, path, side)


def enlarged(path: Path, side: int = LARGE_SIDE) -> str:
    """The cached copy of an image for a large place; small images are enlarged without smoothing."""
    return _cached(_enlarged, path, side)


def _cached(make: Callable[[Path, int, int], str], path: Path, side: int) -> str:
    """The cached result of `make`; made again if Gradio has deleted it because it was not used for a day."""
    cached = make(path, path.stat().st_mtime_ns, side)
    if not Path(cached).exists():
        make.cache_clear()
        cached = make(path, path.stat().st_mtime_ns, side)
    os.utime(cached)
    return cached


def address(cached: str) -> str:
    """The URL of a cached copy, relative to the page."""
    return f"gradio_api/file={quote(cached)}"


@lru_cache(maxsize=4096)
def _sample(path: Path, changed: int) -> Sample:
    with Image.open(path, formats=("PNG",)) as image:
        settings = json.loads(image.text.get(SETTINGS_KEY, "{}"))
        return Sample(path, str(settings.get("prompt", "")), int(settings.get("seed", 0)), image.width)


@lru_cache(maxsize=256)
def _enlarged(path: Path, changed: int, side: int) -> str:
    with Image.open(path) as image:
        if max(image.size) > CRISP_SIDE:
            return in_cache(path)
        factor = -(-side // max(image.size))
        large = image.convert("RGB").resize((image.width * factor, image.height * factor), Image.Resampling.NEAREST)
        return save_pil_to_cache(large, get_upload_folder(), format="png")


@lru_cache(maxsize=4096)
def _thumbnail(path: Path, changed: int, side: int) -> str:
    with Image.open(path) as image:
        if max(image.size) <= side:
            return in_cache(path)
        image.thumbnail((side, side), Image.Resampling.LANCZOS)
        return save_pil_to_cache(image.convert("RGB"), get_upload_folder(), format="webp")
