"""The files of a run's adapter at a step, in the layouts that `save_everywhere` writes."""

from __future__ import annotations

import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

from diffusers import StableDiffusionXLPipeline

from nora_vision.components import adapted_components
from nora_vision.files import copy_with_metadata
from pipelines.subject.adapters import save_everywhere
from training.runs import naming
from training.runs.record import RunRecord
from training.runs.run_files import Suggestion
from training.subject.finishing import SUGGESTED
from training.subject.measured import adapter_at


def write_export(
    record: RunRecord, step: int, layout: str, path: Path, load: Callable[[], tuple[StableDiffusionXLPipeline, str]]
) -> Path | None:
    """Write the adapter at `step` to `path`, a LoRA file or a zip of a folder; None if it does not have this layout.

    A LoRA file that was exported before has the run's present title in its header, and its tensors are those of that file.

    Args:
        layout: "compact", "full", "diffusers" or "kohya".
        path: in a temporary folder.
        load: loads the adapter, if the run has not exported this step; gives a pipeline with it, and its name on it.
    """
    source, options = _of_run(record, step, layout), record.options()
    private = bool(options.get("validation", {}).get("private"))
    title = "adapter" if private else naming.title_of(record.path, options, "subject")
    stem, header = naming.file_stem(title, step), naming.header_of(title, options, step, private)
    if source is None:
        pipeline, name = load()
        components: dict[str, Any] = adapted_components(pipeline, name)
        save_everywhere(pipeline, components, path.parent / "export", stem, name, header)
        source = _in(path.parent / "export", layout)
    if source is None:
        return None
    if source.is_dir():
        return _zipped(source, path)
    copy_with_metadata(source, path, header | ({"ss_output_name": stem} if layout == "kohya" else {}))
    return path


def _of_run(record: RunRecord, step: int, layout: str) -> Path | None:
    suggestion = Suggestion.read(record.path)
    if suggestion is not None and step == suggestion.last:
        return _in(record.path, layout)
    if suggestion is not None and step == suggestion.step and (record.path / SUGGESTED).is_dir():
        return _in(record.path / SUGGESTED, layout)
    exported = adapter_at(record, step) / layout
    return exported if exported.is_dir() else None


def _in(folder: Path, layout: str) -> Path | None:
    """The layout's file or folder in one that `save_everywhere` wrote."""
    if layout in ("compact", "full"):
        return folder / "adapter" / layout if (folder / "adapter" / layout).is_dir() else None
    return next(iter(sorted((folder / layout).glob("*.safetensors"))), None)


def _zipped(source: Path, path: Path) -> Path:
    """A zip of a folder at `path`, in which the folder is called as the zip."""
    # Weights do not compress.
    with zipfile.ZipFile(path, "w", zipfile.ZIP_STORED) as packed:
        for file in sorted(each for each in source.rglob("*") if each.is_file()):
            packed.write(file, Path(path.stem) / file.relative_to(source))
    return path
