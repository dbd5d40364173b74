"""What Use reads and writes: the adapters of runs and uploaded files, requests for images, the images, and files to download.

The page refers to an adapter as `RUN@STEP` or `file@ID`.
"""

from __future__ import annotations

import re
import secrets
import time
from collections.abc import Iterable, Iterator
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, NamedTuple

from PIL import Image

from pipelines.errors import InputError
from pipelines.images import read_settings, save_image
from pipelines.subject.generation_request import SAMPLERS, BlockScales, GenerationProgress, GenerationRequest, ScaledAdapter
from training.runs.record import RunRecord
from training.runs.run_files import Suggestion
from training.subject.measured import adapter_at, saved_steps
from webui import uploads
from webui.inference_worker import WORKER
from webui.runs import RunView, views
from webui.workspace import Workspace

FILE = "file"
# Gradio's limit on generations at once, all of which but one wait for the worker; each needs a thread.
AT_ONCE = {"concurrency_limit": 8, "concurrency_id": "generation"}
PATIENCE = 1.0
Layout = Literal["compact", "full", "diffusers", "kohya"]
LAYOUTS: dict[Layout, tuple[str, str]] = {
    "compact": ("Compact", "The smallest: for this app and the NoRA Vision library, with exactly the same base model."),
    "full": ("Full", "Self-contained, for the PEFT library. NoRA adapters also need the NoRA Vision library."),
    "diffusers": ("For diffusers", "A standard LoRA file for the diffusers library and programs that use it."),
    "kohya": ("For ComfyUI and A1111", "A standard LoRA file for ComfyUI, AUTOMATIC1111, Forge and kohya's scripts."),
}
# Favourites are kept beyond this number.
MAX_IMAGES_KEPT = 200
# The leading dot keeps it from being the id of a dataset.
FOLDER = ".drawn"
FAVOURITE = ".favourite"
NAME = re.compile(r"\d{19}-[0-9a-f]{6}\.png")


class Steps(NamedTuple):
    """The steps of a run with a saved adapter, in order, each after its title; and the recommended one, else the last."""

    choices: list[tuple[str, int]]
    chosen: int | None


def steps_of(record: RunRecord) -> Steps:
    """All adapters of a run: those saved while training, and the final one."""
    view, last = RunView(record), last_step(record)
    suggestion, total = view.read_file(Suggestion), view.status.total
    suggested = None if suggestion is None else suggestion.step
    steps = sorted({*saved_steps(record), *([] if last is None else [last])})
    notes = {last: " (last)", suggested: " (recommended)"}
    choices = [(f"Step {step}{f' of {total}' if total else ''}{notes.get(step, '')}", step) for step in steps]
    return Steps(choices, suggested if suggested in steps else next(reversed(steps), None))


def last_step(record: RunRecord) -> int | None:
    """The last step, whose adapter was exported in all formats; None before the run is done."""
    suggestion = RunView(record).read_file(Suggestion)
    return suggestion.last if suggestion is not None and (record.path / "adapter").is_dir() else None


def others(workspace: Workspace, run_id: str | None) -> list[tuple[str, str]]:
    """Adapters to combine with: the recommended or last one of each other run, and the uploaded files.

    Returns: titles, which may contain user input, and references.
    """
    runs = [view for view in views(workspace) if view.task == "subject" and view.id != run_id]
    steps = [(view, steps_of(view.record).chosen) for view in runs]
    entries = [(f"{view.label}, step {step}", reference_of(view.id, step)) for view, step in steps if step is not None]
    return entries + [(name, reference_of_file(path)) for name, path in uploads.adapters(workspace)]


def reference_of(run_id: str, step: int) -> str:
    """The reference of the adapter of a run at `step`."""
    return f"{run_id}@{step}"


def reference_of_file(path: Path) -> str:
    """The reference of the uploaded adapter at `path`."""
    return f"{FILE}@{path.stem}"


def find_adapter(workspace: Workspace, reference: str, scale: Any = 1.0, blocks: BlockScales | None = None) -> ScaledAdapter:
    """The adapter with this reference, at `scale`.

    Raises: InputError if this workspace has none, or the scale is out of range.
    """
    owner, _, part = reference.partition("@") if isinstance(reference, str) else ("", "", "")
    if owner == FILE:
        adapters = [{"name": name, "path": path} for name, path in uploads.adapters(workspace) if path.stem == part]
    else:
        adapters = _adapters_of(RunView(workspace.run(owner)), part)
    if not adapters:
        raise InputError("This adapter no longer exists. Choose another one.")
    return ScaledAdapter(**adapters[0], reference=reference, scale=scale, blocks=blocks or BlockScales())


def _adapters_of(view: RunView, part: str) -> list[dict[str, Any]]:
    """The adapter of a run at the step `part`, if there is one."""
    if view.task != "subject" or "model" not in view.options:
        raise InputError("This run has no adapter for generation. Choose a subject run.")
    record, steps = view.record, [step for _, step in steps_of(view.record).choices if str(step) == part]
    paths = {step: record.path if step == last_step(record) else adapter_at(record, step) for step in steps}
    return [{"name": f"{view.title}, step {step}", "path": paths[step], "model": view.options["model"]} for step in steps]


def request_again(workspace: Workspace, settings: dict[str, Any], **changes: Any) -> GenerationRequest:
    """The request that generated an image with these settings, with `changes`.

    Raises: InputError if one of its adapters no longer exists.
    """
    adapters = [(each["reference"], each["scale"], BlockScales(**each["blocks"])) for each in settings["adapters"]]
    values = {name: settings[name] for name in ("prompt", "negative_prompt", "seed", "guidance_scale")}
    # Without one of these names it was the model's own.
    sampler = settings["sampler"] if settings["sampler"] in SAMPLERS else None
    values |= {"steps": settings["num_inference_steps"], "size": settings["resolution"], "sampler": sampler}
    return request_for(workspace, adapters, **values | changes)


def request_for(
    workspace: Workspace, adapters: Iterable[tuple[str, Any, BlockScales | None]], **values: Any
) -> GenerationRequest:
    """A request with the adapters that these references name; images have the size that the first one's run trained at.

    Raises: InputError if an adapter is missing or a value is out of range.
    """
    chosen = tuple(find_adapter(workspace, *each) for each in adapters)
    if values.get("size") is None and chosen and chosen[0].model is not None:
        run = RunView(workspace.run(chosen[0].reference.partition("@")[0]))
        side = run.options.get("data", {}).get("resolution")
        values["size"] = None if side is None else (side, side)
    return GenerationRequest(adapters=chosen, **values)


def generated(workspace: Workspace, request: GenerationRequest) -> Iterator[GenerationProgress | Path | None]:
    """Generate images: the progress at each step, and the file of each finished image. Closing it cancels the generation.

    It yields None at least every `PATIENCE` seconds, since nobody can close a generator that waits for the device.
    Raises: InputError if an adapter cannot be used.
    """
    with closing(WORKER.stream("generate", workspace, request)) as events:
        yield from events.every(PATIENCE)


@dataclass(frozen=True)
class GeneratedImages:
    """One user's generated images, PNG files that contain their settings; they outlive the tab, the session and the server.

    Args:
        folder: the folder of the images.
    """

    folder: Path

    @classmethod
    def of(cls, workspace: Workspace) -> GeneratedImages:
        """The generated images of the workspace's user."""
        return cls(workspace.sets / FOLDER)

    def add(self, image: Image.Image, settings: dict[str, Any]) -> Path:
        """Save an image with its settings; returns the file. Deletes the oldest beyond `MAX_IMAGES_KEPT` but no favourites."""
        path = self.folder / f"{time.time_ns():019d}-{secrets.token_hex(3)}.png"
        save_image(image, path, settings)
        for old in [each for each in self.newest() if not is_favourite(each)][MAX_IMAGES_KEPT:]:
            old.unlink(missing_ok=True)
        return path

    def newest(self, only_favourites: bool = False) -> list[Path]:
        """All images or the favourites, newest first."""
        files = self.folder.iterdir() if self.folder.is_dir() else ()
        images = sorted((path for path in files if NAME.fullmatch(path.name)), reverse=True)
        return [path for path in images if is_favourite(path)] if only_favourites else images

    def find(self, name: str) -> Path:
        """The image with the file name `name`.

        Raises: InputError if it does not exist.
        """
        path = self.folder / name if isinstance(name, str) and NAME.fullmatch(name) else None
        if path is None or not path.is_file():
            raise InputError(f"This image no longer exists: only the newest {MAX_IMAGES_KEPT} are kept. Generate it again.")
        return path


def is_favourite(path: Path) -> bool:
    """Whether an image is one of the user's favourites, for which a file beside it stands."""
    return path.with_suffix(FAVOURITE).exists()


def toggle_favourite(path: Path) -> None:
    """Make an image a favourite, or no longer."""
    mark = path.with_suffix(FAVOURITE)
    (mark.unlink if mark.exists() else mark.touch)()


def delete_image(path: Path) -> None:
    """Delete an image."""
    for each in (path.with_suffix(FAVOURITE), path):
        each.unlink(missing_ok=True)


def settings_of(path: Path) -> tuple[dict[str, Any], int]:
    """The settings in an image's file (see `pipelines.images.read_settings`), and its width in pixels."""
    with Image.open(path, formats=("PNG",)) as image:
        return read_settings(path), image.width


def layouts_of(record: RunRecord) -> dict[Layout, int | None]:
    """The layouts in which the run's adapters can be downloaded, and the size of each in bytes; None if not yet known."""
    final, saved = record.path / "adapter", [adapter_at(record, step) for step in saved_steps(record)[-1:]]
    folders = {"compact": final, "full": final, "diffusers": record.path, "kohya": record.path}
    if saved and last_step(record) is None:
        folders = dict.fromkeys(LAYOUTS, saved[0])
    sizes = {layout: _bytes_in(folders[layout] / layout) for layout in LAYOUTS}
    # A method without a compact layout saves every step in the full one; an adapter that is no change of weights is not exported.
    missing = ["compact"] if any((folder / "full").is_dir() for folder in (final, *saved)) else []
    missing += ["diffusers", "kohya"] if final.is_dir() else []
    return {layout: size for layout, size in sizes.items() if size is not None or layout not in missing}


def _bytes_in(folder: Path) -> int | None:
    return sum(file.stat().st_size for file in folder.rglob("*") if file.is_file()) or None if folder.is_dir() else None
