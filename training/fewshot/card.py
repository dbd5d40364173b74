"""The model card of a few-shot run: the methods compared, the limits of the results, and how to use the classifier."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from statistics import fmean

from huggingface_hub import ModelCardData

from pipelines.built_in import portable_name
from pipelines.clip import BUILT_IN
from pipelines.fewshot.plots import save_figure
from pipelines.fewshot.target_layers import TargetLayers
from pipelines.methods import method_names
from pipelines.quantization import EXPORT_NOTE, losses_of
from pipelines.text_files import write_text_atomically
from training.fewshot.figures import ZERO_SHOT, card_figures, shots_text
from training.runs.card_text import CARD, as_text
from training.runs.fewshot_files import FewShotReport

CONTROL = "pixels"
FIGURES, MAX_LISTED, MEBIBYTE = "figures", 20, 2**20
TAGS = ("open_clip", "clip", "few-shot")
ACCURACY = "top-1 (95% interval)"
CAPTIONS = {
    "confusion": "Confusion matrix: true and predicted classes",
    "reliability": "Reliability diagram: accuracy by confidence",
    "per_class": "Accuracy by class, zero-shot and with the classifier",
    "comparison": "Accuracy of all methods by number of training images per class",
}

OPENING = """# Few-shot image classifier with {count} classes

The CLIP model {base} on {dataset}, {images:,} images. Classes: {classes}. Trained on {shots} per class; the seeds {seeds} each
give another split. Prompts: {templates}

Loading this run gives **{method}**, {trial_shots}, seed {seed}: {parameters:,} trainable parameters, {stored:,} bytes,
{seconds:.0f} seconds to fit.{target_layers} Its hyperparameters were chosen on {validation:,} validation images; it was evaluated
once, at the end, on {test:,} test images. Accuracy: {top1}.{untested}"""

TABLE_NOTES = """{interval} ECE is the expected calibration error, before and after calibration with the temperature fitted on the
validation images. Seconds and MiB (peak memory) are those of fitting alone."""
SEVERAL_SEEDS = "Means over {count} seeds with Student's interval, which covers other splits of the same images."
ONE_SEED = "One seed with Wilson's interval, which covers other test images but no other training images."

NO_CONTROL = f"""The control `{CONTROL}`, a logistic regression on raw pixels, was not run, so these results do not show whether
the images need CLIP at all. Add it with `--method {CONTROL}`."""
ABOVE_CONTROL = "With {shots}, the intervals of these methods lie above that of the control `{control}`, {value}: {methods}."
NOT_ABOVE_CONTROL = """> **With {shots}, no adapter's interval lies above that of the control.** Logistic regression on raw pixels
> reaches {value}; {methods}. These results do not show that CLIP helps on these images."""

USE = """## Use

With NoRA Vision installed, and RUN for the directory of this card:

```python
from pipelines.fewshot.classifier import FewShotClassifier

classifier = FewShotClassifier.from_run("RUN")
predictions = classifier.predict(["one.jpg", "two.jpg"])
print(predictions.labels, predictions.probabilities)
```

```bash
python -m pipelines.fewshot.classify RUN IMAGE_OR_FOLDER --output predictions.csv
```

If the base model has moved, pass `model` and `pretrained` to `from_run`, or `--model` and `--pretrained` to the command."""
USE_OPEN = """Classes without training images can be added with `classifier.with_classes("a new class")` or `--add_class`: they
are represented by their prompts alone, and the logits of the other classes do not change."""

LIMITS = """## Limits

- {test:,} test images, {fewest}: one more correct image is {one_of_all:.1%} of the accuracy and {one_of_class:.0%} of that
  class's. Smaller differences are not significant.{untested}
- The test images come from the same source as the training images. Accuracy on other images may be lower.
- An image of none of the classes is assigned to one of them."""
FEWEST = "{fewest:,} in the smallest class"
FEWEST_OF_OTHERS = "0 in the smallest class and {fewest:,} in the smallest of the others"
UNTESTED = """
- **Classes without test images: {classes}.** Their accuracy is unknown: their rows of the confusion matrix are empty, and the
  overall accuracy covers the other classes only."""
BUILT_IN_LIMITS = """- The built-in model sees 64 x 64 pixels. **ImageNet's terms apply to its weights: non-commercial research
  and education only.**"""


def write_card(run_path: Path, report: FewShotReport, target_layers: TargetLayers | None = None) -> None:
    """Write README.md and its figures into the directory of a finished run.

    Args:
        target_layers: the adapted layers, which the card then names.
    """
    figures = card_figures(report)
    for name, figure in figures.items():
        save_figure(figure, run_path / FIGURES / f"{name}.png")
    write_text_atomically(run_path / CARD, card(report, target_layers, list(figures)))


def card(report: FewShotReport, target_layers: TargetLayers | None, figures: Sequence[str]) -> str:
    """The card as Markdown with a YAML header.

    Args:
        figures: names of the files in `figures/`, without suffix.
    """
    sections = (
        f"---\n{card_header(report).to_yaml().strip()}\n---",
        _opening(report, target_layers),
        _results(report),
        report.choice,
        _failed(report),
        *_control_comparison(report),
        _scales(report),
        _classifier(report, figures),
        _new_classes(report),
        _duplicates(report),
        _notes(report),
        f"{USE}\n\n{USE_OPEN}" if _is_open(report) else USE,
        _limits(report),
    )
    return "\n\n".join(section for section in sections if section) + "\n"


def card_header(report: FewShotReport) -> ModelCardData:
    """The metadata for the hub."""
    task = "zero-shot-image-classification" if _is_open(report) else "image-classification"
    return ModelCardData(library_name="open_clip", pipeline_tag=task, tags=[*TAGS, *report.methods])


def _is_open(report: FewShotReport) -> bool:
    """Whether classes can be added to the classifier by their prompts."""
    return report.representative.method in (ZERO_SHOT, *method_names())


def _opening(report: FewShotReport, target_layers: TargetLayers | None) -> str:
    """The title, the data, and the classifier that loading the run gives."""
    trial, dataset = report.representative, report.dataset
    weights = f" ({portable_name(report.pretrained)})" if report.pretrained else ""
    untested = trial.test.untested
    is_adapter = trial.method in method_names()
    return OPENING.format(
        count=len(dataset.classes),
        base=as_text(portable_name(report.model) + weights),
        dataset=_dataset_name(dataset.name),
        images=dataset.images,
        classes=_listed(dataset.classes),
        shots=" and ".join(map(shots_text, report.shots)),
        seeds=", ".join(map(str, report.seeds)),
        templates=_listed(report.templates),
        method=trial.method,
        trial_shots=shots_text(trial.shots),
        seed=trial.seed,
        parameters=trial.num_trainable_parameters,
        stored=trial.stored_bytes,
        seconds=trial.seconds,
        target_layers=_target_layers(target_layers, trial.method) if target_layers is not None and is_adapter else "",
        validation=trial.validation.count,
        test=trial.test.count,
        top1=trial.test.top1.as_share(),
        untested=f" Classes without test images: {_listed(untested)}." if untested else "",
    )


def _target_layers(targets: TargetLayers, method: str) -> str:
    """A sentence that names the adapted layers."""
    encoders = "both encoders" if targets.encoders == "both" else f"the {targets.encoders} encoder"
    return f" It adapts {', '.join(targets.projections_of(method))} of {encoders}, layers: {targets.layers}."


def _dataset_name(name: str) -> str:
    """The dataset's name; a quoted path is shortened to its last part."""
    return as_text(Path(name[1:-1]).resolve().name if name[:1] in ("'", '"') else name)


def _listed(words: Sequence[str]) -> str:
    more = f" and {len(words) - MAX_LISTED} more" if len(words) > MAX_LISTED else ""
    return ", ".join(map(as_text, words[:MAX_LISTED])) + more


def _table(columns: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    lines = (columns, ["---"] * len(columns), *rows)
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def _results(report: FewShotReport) -> str:
    """All methods by number of shots, with a note on the intervals."""
    columns = ("shots", "method", ACCURACY, "ECE", "calibrated ECE", "trainable parameters", "bytes", "seconds", "MiB")
    rows = [
        (
            str(row.shots),
            row.method,
            row.top1.as_share(),
            f"{row.calibration_error:.3f}",
            f"{row.calibrated_calibration_error:.3f}",
            f"{row.num_trainable_parameters:,.0f}",
            f"{row.stored_bytes:,.0f}",
            f"{row.seconds:.1f}",
            f"{row.peak_memory / MEBIBYTE:,.0f}",
        )
        for row in report.summary
    ]
    count = len(report.seeds)
    notes = TABLE_NOTES.format(interval=SEVERAL_SEEDS.format(count=count) if count > 1 else ONE_SEED)
    return f"## Results\n\n{_table(columns, rows)}\n\n{notes}"


def _failed(report: FewShotReport) -> str:
    """The methods that could not be fitted, and why."""
    lines = [f"- {method}: {as_text(reason)}" for method, reason in report.failed.items()]
    return "\n".join(("## Methods that failed\n", *lines)) if lines else ""


def _control_comparison(report: FewShotReport) -> Iterator[str]:
    """For each number of shots, whether the adapters beat logistic regression on raw pixels."""
    adapters = [method for method in report.methods if method in method_names()]
    if not adapters:
        return
    if CONTROL not in report.methods:
        yield NO_CONTROL
        return
    for shots in report.shots:
        accuracy = {row.method: row.top1 for row in report.summary if row.shots == shots}
        above = [method for method in adapters if accuracy[method].is_above(accuracy[CONTROL])]
        yield (ABOVE_CONTROL if above else NOT_ABOVE_CONTROL).format(
            shots=shots_text(shots),
            control=CONTROL,
            value=accuracy[CONTROL].as_share(),
            methods=", ".join(f"{method} {accuracy[method].as_share()}" for method in above or adapters),
        )


def _scales(report: FewShotReport) -> str:
    """The adapters that are used at a scale below 1."""
    lines = [
        f"- {trial.method}, {shots_text(trial.shots)}, seed {trial.seed}: {as_text(trial.scale_reason)}"
        for trial in report.trials
        if trial.scale_reason
    ]
    return "\n".join(("## Adapters with a scale below 1\n", *lines)) if lines else ""


def _classifier(report: FewShotReport, figures: Sequence[str]) -> str:
    """The calibration of the classifier that represents the run, and the figures."""
    trial = report.representative
    before, after = trial.test.calibration_error, trial.calibrated.calibration_error
    calibration = (
        f"Its logits are divided by the temperature {trial.temperature:.3g}, which was fitted on the validation images. This "
        f"changes the probabilities but not the predicted classes: the calibration error is {before:.3f} before and {after:.3f} "
        "after."
    )
    images = (f"![{CAPTIONS[name]}]({FIGURES}/{name}.png)" for name in figures)
    return "\n\n".join(("## The classifier", calibration, *images))


def _new_classes(report: FewShotReport) -> str:
    """The accuracy on the held-out classes."""
    new = report.dataset.new_classes
    if not new:
        return ""
    rows = []
    for row in report.summary:
        if row.new_classes is not None:
            zero_shot = fmean(_new_zero_shot(report, row.shots, row.method))
            rows.append((str(row.shots), row.method, row.new_classes.as_share(), f"{zero_shot:.1%}", f"{row.harmonic_mean:.1%}"))
    columns = ("shots", "method", ACCURACY, "zero-shot", "harmonic mean with the accuracy on trained classes")
    results = _table(columns, rows) if rows else "No method of this run can classify held-out classes."
    heading = f"## Held-out classes\n\n{len(new)} classes, classified among themselves by their prompts alone:"
    return f"{heading} {_listed(new)}.\n\n{results}"


def _new_zero_shot(report: FewShotReport, shots: int | str, method: str) -> Iterator[float]:
    """The zero-shot accuracies on the held-out classes, one for each seed."""
    for trial in report.trials:
        if (trial.shots, trial.method) == (shots, method) and trial.new_classes is not None:
            yield trial.new_classes.zero_shot_top1


def _duplicates(report: FewShotReport) -> str:
    """The identical images in the dataset."""
    duplicates = report.dataset.duplicates
    if not duplicates:
        return ""
    lines = [f"- {as_text(sentence)}" for sentence in duplicates[:MAX_LISTED]]
    lines += [f"- And {len(duplicates) - MAX_LISTED} more."] if len(duplicates) > MAX_LISTED else []
    rule = "Of identical images in one class, one was used; of identical images in several classes, none.\n"
    return "\n".join(("## Duplicates\n", rule, *lines))


def _notes(report: FewShotReport) -> str:
    """How the dataset was read, and the files that were not used."""
    notes = [f"- {as_text(note)}" for note in report.dataset.notes]
    return "\n".join(("## How the dataset was read\n", *notes)) if notes else ""


def _limits(report: FewShotReport) -> str:
    """The limits of the results."""
    trial, untested = report.representative, report.representative.test.untested
    test, fewest = trial.test.count, min(filter(None, map(sum, trial.test.confusion)))
    limits = LIMITS.format(
        test=test,
        fewest=(FEWEST_OF_OTHERS if untested else FEWEST).format(fewest=fewest),
        one_of_all=1 / test,
        one_of_class=1 / fewest,
        untested=UNTESTED.format(classes=_listed(untested)) if untested else "",
    )
    if report.quantization_errors:
        limits += f"\n- {losses_of(report.quantization_errors)} {EXPORT_NOTE}"
    return f"{limits}\n{BUILT_IN_LIMITS}" if report.model == BUILT_IN else limits
