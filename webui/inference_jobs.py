"""The jobs of the worker process: `python -m webui.inference_jobs DESCRIPTOR` runs them. The page's process must not import this.

Each public function is a job by its name; those with `report` as the first argument are streams. See `webui.inference_worker`.
"""

from __future__ import annotations

import base64
import functools
import io
import logging
import os
import socket
import sys
from collections.abc import Callable, Sequence
from itertools import chain, islice
from pathlib import Path
from typing import Any

import torch

from nora_vision.files import AdapterFileError
from pipelines.errors import InputError
from pipelines.fewshot.classifier import CLASSIFIER, FewShotClassifier, classifier_folder
from pipelines.fewshot.feature_cache import FeatureCache
from pipelines.fewshot.loading import load_images
from pipelines.fewshot.samples import sample_set
from pipelines.fewshot.sets import load_set
from pipelines.fewshot.sources import DatasetSource
from pipelines.images import read_image
from pipelines.subject import lora_files
from pipelines.subject.generation_request import GeneratedImage, GenerationProgress, GenerationRequest, ScaledAdapter
from pipelines.subject.image_checks import Finding, check_images
from pipelines.subject.outliers import with_outliers
from pipelines.subject.pipeline_cache import PipelineCache
from pipelines.untrusted_images import reencode
from training.options import SubjectOptions
from training.runs.fewshot_files import FewShotReport
from training.runs.record import RunRecord
from training.runs.snapshot import read_cached
from training.subject.exported import write_export
from training.subject.preview import CropPreview, crop_previews, truncated_prompts
from webui.datasets import Dataset
from webui.generation import LAYOUTS, GeneratedImages, Layout
from webui.inference_worker import CheckedImage, CheckedImages, Crop, ZeroShotAccuracy, serve
from webui.labelled_datasets import LabelledClasses
from webui.uploads import display_name
from webui.workspace import Workspace

# The jobs of a lane run one after another. Classification takes a moment, so it does not wait until images are generated.
LANES = {"generate": "diffusion", "merge": "diffusion", "adapter_file": "diffusion", "classify": "clip", "zero_shot": "clip"}
# The zero-shot accuracy uses at most MOST_ZERO_SHOT images, but FEWEST_OF_CLASS of every class, to take a few seconds.
MOST_ZERO_SHOT, FEWEST_OF_CLASS = 200, 2
MAX_CLASSIFIERS, MOST_FILES, TOP = 2, 200, 3
# Advice for users of the page, by the kind of finding; all other advice is that of the command line.
ADVICE = {
    "extreme_shape": "Crop it to the subject, or set aspect ratio buckets in the expert settings under Check.",
    "small": "Use a larger one, or a lower resolution in the expert settings under Check.",
    "tiny": "Use a larger one: at least 64 pixels on its shorter side, better several hundred.",
}
PIPELINES = PipelineCache()
FEATURES = FeatureCache()
# Two jobs more: the adapters of a request as one LoRA file, and the classes of scikit-learn's handwritten digits.
merge, digits = PIPELINES.merge, sample_set


def on_gpu() -> bool:
    """Whether models are loaded onto a GPU."""
    return torch.cuda.is_available()


def generate(report: Callable[[GenerationProgress | Path], None], workspace: Workspace, request: GenerationRequest) -> None:
    """Report progress at each denoising step, and the file of each finished image among the user's images.

    Raises: InputError if an adapter cannot be used.
    """
    images = GeneratedImages.of(workspace)

    def saved(event: GenerationProgress | GeneratedImage) -> None:
        report(images.add(event.image, event.settings) if isinstance(event, GeneratedImage) else event)

    PIPELINES.generate(request, saved)


def adapter_file(workspace: Workspace, adapter: ScaledAdapter, layout: Layout, path: Path) -> Path:
    """Write the adapter of a run in `layout` to `path`, a LoRA file or a zip of a folder; returns it.

    Raises: InputError if it does not have this layout.
    """
    run_id, _, step = adapter.reference.partition("@")
    written = write_export(workspace.run(run_id), int(step), layout, path, lambda: PIPELINES.loaded(adapter))
    if written is None:
        raise InputError(f"This adapter has no file {LAYOUTS[layout][0]!r}. Download {LAYOUTS['full'][0]!r}, which all have.")
    return written


def check_adapter(path: Path, name: str) -> list[str]:
    """Sentences on the tensors that are not applied, with `name` as the file's name.

    Raises: InputError if it is not a safetensors file with a LoRA of a supported kind and only finite values.
    """
    try:
        lora_files.check_file(path)
    except AdapterFileError as error:
        raise InputError(f"{str(error).replace(str(path), name)} Add an adapter in a .safetensors file.") from error
    except InputError as error:
        raise InputError(str(error).replace(str(path), name)) from error
    return [sentence.replace(str(path), name) for sentence in lora_files.left_out(path)]


def checked_images(images: Dataset) -> CheckedImages:
    """The results of the image checks, cached until an image changes.

    Raises: InputError if no image can be used.
    """
    return images.read(lambda: _checked_images(images, tuple(sorted(images.signature()))))


@functools.lru_cache(maxsize=64)
def _checked_images(images: Dataset, signature: tuple[str, ...]) -> CheckedImages:
    report = with_outliers(check_images(images.folder))

    def sentence(finding: Finding) -> str:
        """With the user's names in place of the generated ones."""
        words = finding.words.replace(repr(images.folder.name.replace("_", " ")), "your subject")
        for entry in images.photos():
            words = words.replace(repr(entry.file), f"“{entry.name}”")
        return f"{words} {ADVICE.get(finding.kind, finding.advice)}"

    by_file = {each.path.name: CheckedImage(each.verdict, tuple(map(sentence, each.findings))) for each in report.images}
    return CheckedImages(by_file, (*map(sentence, report.findings), *report.warnings()))


def crops(images: Dataset, options: SubjectOptions) -> list[Crop]:
    """Each image as the model sees it in training with `options`.

    Raises: InputError if an image or a size cannot be used.
    """

    def made() -> list[Crop]:
        photos = images.photos()
        previews = crop_previews([images.folder / photo.file for photo in photos], options)
        return [_crop(photo.name, preview) for photo, preview in zip(photos, previews, strict=True)]

    return images.read(made)


def _crop(name: str, preview: CropPreview) -> Crop:
    thumbnail, stream = preview.image.copy(), io.BytesIO()
    thumbnail.thumbnail((384, 384))
    thumbnail.save(stream, "PNG")
    # A data URL, so that the server stores no file for each setting that is tried.
    address = f"data:image/png;base64,{base64.b64encode(stream.getvalue()).decode()}"
    return Crop(name, address, (preview.image.height, preview.image.width), preview.variants)


def long_prompts_of(images: Dataset, options: SubjectOptions) -> list[str]:
    """A sentence for each prompt or caption that is truncated; none if the model's tokenizers are not on this machine."""
    return truncated_prompts(options, [(Path(entry.name), entry.caption) for entry in images.photos() if entry.caption])


def dataset_image(path: str | None, dataset: str | None, name: str) -> DatasetSource | None:
    """The image `name` of a dataset in any format that the recipe reads; None if there is none.

    Raises: InputError if the dataset is missing or cannot be read.
    """
    return _dataset_images(path, dataset).get(name)


@functools.lru_cache(maxsize=4)
def _dataset_images(path: str | None, dataset: str | None) -> dict[str, DatasetSource]:
    if path is None:
        return {image.name: image.source for image in sample_set().images}
    labelled = load_images(path) if dataset is None else load_set(path, dataset)
    return {image.name: image.source for image in labelled.images}


def zero_shot(classes: LabelledClasses) -> ZeroShotAccuracy:
    """Zero-shot accuracy of the built-in CLIP on some images of each class.

    Raises: InputError if there are fewer than two classes with images, or an image cannot be read.
    """
    with_images = [one for one in classes.classes if one.images]
    if len(with_images) < 2:
        raise InputError("Zero-shot accuracy needs at least two classes with images. Add images to another class.")
    template = "digits" if classes.data_dir is None else "photo"
    each = max(FEWEST_OF_CLASS, MOST_ZERO_SHOT // len(with_images))
    chosen = [one.images[:: max(1, len(one.images) // each)][:each] for one in with_images]
    predicted = iter(FEATURES.zero_shot(list(chain(*chosen)), [one.name for one in with_images], template))
    right = [list(islice(predicted, len(files))).count(label) for label, files in enumerate(chosen)]
    by_class = {one.key: (right[label], len(chosen[label])) for label, one in enumerate(with_images)}
    return ZeroShotAccuracy(sum(right), sum(map(len, chosen)), by_class)


def classify(record: RunRecord, files: Sequence[str | Path], trial: str | None = None, top: int = TOP) -> list[dict[str, Any]]:
    """Classify images with the classifier of a run.

    Args:
        files: uploaded files; each is checked like any upload.
        trial: the folder of a trial of the run; None for the trial that was chosen as the classifier.
        top: the number of classes to return per image.
    Returns: a row for each file: {"image": its name, "class", "probability", "top": [[class, probability], ...]}, with "notes"
        if there are sentences on how it was read; {"image", "error"} for a file that cannot be used. Names and sentences
        contain user input.
    Raises: InputError if there is no file, there are too many, or the run has no such classifier.
    """
    if not 1 <= len(files) <= MOST_FILES:
        raise InputError(f"1 to {MOST_FILES} images can be classified at once, got {len(files)}.")
    rows: list[dict[str, Any]] = []
    readable = []
    for file in map(Path, files):
        row: dict[str, Any] = {"image": display_name(file)}
        try:
            upload = reencode(file, row["image"])
            readable.append(read_image(io.BytesIO(upload.content), row["image"]))
            if upload.notes:
                row["notes"] = list(upload.notes)
        except InputError as error:
            row["error"] = str(error)
        rows.append(row)
    if readable:
        predictions = _classifier_of(record, trial).predict(readable).top(top)
        for row, likely in zip((row for row in rows if "error" not in row), predictions, strict=True):
            (row["class"], row["probability"]), row["top"] = likely[0], [list(one) for one in likely]
    return rows


def _classifier_of(record: RunRecord, trial: str | None = None) -> FewShotClassifier:
    """The classifier of a run; the `MAX_CLASSIFIERS` used last stay loaded."""
    report = read_cached(FewShotReport, record.path)
    if trial is not None and (report is None or report.trial_in(trial) is None):
        raise InputError("This run did not train this method. Choose one from the list.")
    if report is None:
        raise InputError("This run has no classifier yet. Wait until it is done, or choose another run.")
    folder = classifier_folder(record.path if trial is None else record.path / trial)
    return _loaded(folder.absolute(), (folder / CLASSIFIER).stat().st_mtime_ns)


@functools.lru_cache(maxsize=MAX_CLASSIFIERS)
def _loaded(folder: Path, changed: int) -> FewShotClassifier:
    return FewShotClassifier.from_run(folder)


if __name__ == "__main__":
    logging.basicConfig(level=logging.INFO, stream=sys.stderr, format="%(asctime)s %(name)s %(levelname)s: %(message)s")
    serve(socket.socket(fileno=int(sys.argv[1])), sys.modules[__name__])
    # Without waiting for jobs in flight, when the server has ended.
    os._exit(0)
