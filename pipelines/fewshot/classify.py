"""Classify images with a finished few-shot run and print the most likely classes of each image.

    python -m pipelines.fewshot.classify RUN IMAGE_OR_FOLDER... --top 3 --output predictions.csv

Exit codes: 0 if all images were classified, 1 if some could not be read, 2 for all other errors.
"""

from __future__ import annotations

import csv
import sys
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

from PIL import Image
from tqdm.auto import tqdm
from transformers import HfArgumentParser

from pipelines.errors import InputError
from pipelines.fewshot.loading import walk
from pipelines.file_names import display_path
from pipelines.help_format import HelpFormatter
from pipelines.images import has_image_name, read_image
from pipelines.lazy_modules import torch
from pipelines.output_paths import check_output_file
from pipelines.run_options import check_task
from pipelines.tables import harmless

if TYPE_CHECKING:
    from pipelines.fewshot.classifier import FewShotClassifier, Predictions


@dataclass
class ClassifyOptions:
    """The options of the command."""

    add_class: list[str] = field(
        default_factory=list,
        metadata={"help": "Names of further classes. The method of the run must compare images with prompts."},
    )
    top: int = field(default=3, metadata={"help": "Number of classes to print for each image, most likely first."})
    output: str | None = field(default=None, metadata={"help": "CSV file for the probabilities of all classes."})
    model: str | None = field(default=None, metadata={"help": "The base model, if it has moved since training."})
    pretrained: str | None = field(
        default=None, metadata={"help": "The weights of the base model, if they have moved since training."}
    )
    device: str | None = field(default=None, metadata={"help": "Device such as cpu or cuda. Default: a GPU if there is one."})
    batch_size: int = field(default=64, metadata={"help": "Number of images that are read and encoded at once."})

    def __post_init__(self) -> None:
        for name in ("top", "batch_size"):
            if getattr(self, name) < 1:
                raise InputError(f"{name} must be at least 1, got {getattr(self, name)}.")
        self.device = self.device or ("cuda" if torch.cuda.is_available() else "cpu")


def find_files(given: Sequence[str]) -> list[Path]:
    """The files in `given`, and all images below the folders in it, each once.

    Raises: InputError for a path that does not exist, or a folder without images.
    """
    files: dict[Path, None] = {}
    for path in map(Path, given):
        if path.is_dir():
            content = walk(path)
            matches = [path / name for name in (*content.files, *content.broken) if has_image_name(name)]
        else:
            matches = [path] if path.is_file() else []
        if not matches:
            what = "no image in the folder" if path.is_dir() else "no file or folder"
            raise InputError(f"There is {what} {str(path)!r}. Give images, or folders of images.")
        files |= dict.fromkeys(matches)
    return list(files)


def classify(classifier: FewShotClassifier, files: Sequence[Path], batch_size: int) -> tuple[Predictions | None, list[str]]:
    """Classify the images in `files`.

    Returns: the predictions for all readable images, in order, or None if there are none; and an error message for each other.
    """
    from pipelines.fewshot.classifier import Predictions

    names: list[str] = []
    parts: list[torch.Tensor] = []
    damaged: list[str] = []
    for start in tqdm(range(0, len(files), batch_size), desc="classifying", leave=False, delay=5):
        readable: list[Image.Image] = []
        for file in files[start : start + batch_size]:
            try:
                readable.append(read_image(file))
            except InputError as error:
                damaged.append(str(error))
            else:
                names.append(display_path(file))
        if readable:
            parts.append(classifier.predict(readable, batch_size).probabilities)
    return (Predictions(torch.cat(parts), classifier.classes, tuple(names)) if parts else None), damaged


def as_table(predictions: Predictions, top: int) -> str:
    """A text table of the name, the class, its probability, and the next most likely classes of each image."""
    rows = [("image", "class", "probability", "alternatives" if top > 1 else "")]
    for name, (best, *others) in zip(predictions.names, predictions.top(top), strict=True):
        rows.append((name, best[0], f"{best[1]:.1%}", ", ".join(f"{other} {share:.1%}" for other, share in others)))
    widths = [max(len(row[column]) for row in rows) for column in range(3)]
    return "\n".join("  ".join((*map(str.ljust, row, widths), row[3])).rstrip() for row in rows)


def write_csv(predictions: Predictions, path: Path) -> None:
    """Write `predictions.table()` as CSV; cells that a spreadsheet would evaluate as formulas are escaped.

    Raises: InputError if the file cannot be written.
    """
    from nora_vision.files import replacing

    try:
        with replacing(path) as beside, beside.open("w", encoding="utf-8", newline="") as file:
            csv.writer(file).writerows([map(harmless, row) for row in predictions.table()])
    except OSError as error:
        raise InputError(f"output {str(path)!r} cannot be written ({error}). Use another file.") from error


def run(run_path: str, given: Sequence[str], options: ClassifyOptions) -> int:
    """Classify `given` with the run at `run_path` and print the predictions; returns the exit code, 0 or 1.

    Raises: InputError or AdapterFileError if nothing can be classified.
    """
    if options.output is not None:
        check_output_file(options.output, "--output", (".csv",))
    check_task(run_path, "few-shot")
    files = find_files(given)
    # Imported here: it takes seconds, and --help and wrong paths do not need it.
    from pipelines.fewshot.classifier import FewShotClassifier

    classifier = FewShotClassifier.from_run(run_path, options.model, options.pretrained, options.device)
    predictions, damaged = classify(classifier.with_classes(*options.add_class), files, options.batch_size)
    if predictions is not None:
        sys.stdout.write(as_table(predictions, options.top) + "\n")
        if options.output is not None:
            write_csv(predictions, Path(options.output))
    sys.stderr.writelines(f"{message}\n" for message in damaged)
    return 1 if damaged else 0


def main(arguments: Sequence[str]) -> int:
    """Run the command line; returns the exit code."""
    parser = HfArgumentParser(ClassifyOptions, description=__doc__, allow_abbrev=False, formatter_class=HelpFormatter)
    parser.add_argument("run", help="Directory of a run, or folder of one trial in it.")
    parser.add_argument("images", nargs="+", help="Images, or folders of images.")
    try:
        options, given, unknown = parser.parse_args_into_dataclasses(
            arguments, return_remaining_strings=True, look_for_args_file=False
        )
    except InputError as error:
        parser.exit(2, f"error: {error}\n")
    if unknown:
        parser.error(f"unrecognized arguments: {' '.join(unknown)}")
    from nora_vision.files import AdapterFileError

    try:
        return run(given.run, given.images, options)
    except (InputError, AdapterFileError) as error:
        parser.exit(2, f"error: {error}\n")


if __name__ == "__main__":
    raise SystemExit(main(sys.argv[1:]))
