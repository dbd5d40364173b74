"""The model card of a few-shot run: the methods side by side, how far each can be trusted, and how to use the classifier."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from statistics import fmean
from typing import Any

from huggingface_hub import ModelCardData

from pipelines.clip import BUILT_IN
from pipelines.fewshot.metrics import Interval
from pipelines.fewshot.plots import save_figure
from pipelines.fewshot.target_layers import TargetLayers
from pipelines.methods import method_names
from training.fewshot.figures import ZERO_SHOT, Report, card_figures, loaded_member, shots_in_words
from training.runs.card_text import CARD, as_text, portable_name
from training.runs.durable import write_text_atomically

CONTROL = "pixels"
FIGURES, MOST_LISTED, MEBIBYTE = "figures", 20, 2**20
TAGS = ("open_clip", "clip", "few-shot")
ACCURACY = "top-1 (95% interval)"
CAPTIONS = {
    "confusion": "How often each true class is taken for each class",
    "reliability": "How often predictions of each confidence are right",
    "per_class": "Accuracy by class, zero-shot and of the classifier",
    "comparison": "Accuracy of all methods by the images of each class",
}

OPENING = """# A classifier of {count} classes from a few images of each

The CLIP model {base} on {set_name}, {images:,} images. Classes: {classes}. Learned from {shots} of each class, with the
seeds {seeds}, each of which draws other images. Prompts: {templates}

Loading this run gives **{method}**, {own_shots}, seed {seed}: {trained:,} trained numbers, {stored:,} bytes, {seconds:.0f}
seconds.{target_layers} Its settings were chosen on {validation:,} other images; {test:,} more were tested on, once, at the end.
Accuracy: {top1}.{untested}"""

TABLE_NOTES = """{interval} ECE is the expected calibration error, as trained and with the temperature that validation chose;
seconds and MiB, the peak of memory, are of fitting alone."""
SEVERAL_SEEDS = "Means over {count} seeds; Student's interval speaks of other draws of the images that are learned from."
ONE_SEED = "One seed; Wilson's interval speaks of other test images, not of other draws to learn from."

NO_CONTROL = f"""The control `{CONTROL}`, a logistic regression on raw pixels, was not run: nothing here says whether these
images need CLIP at all. Add it with `--method {CONTROL}`."""
ABOVE_CONTROL = "With {shots}, above the control `{control}`, {value}, with the whole interval: {methods}."
NOT_ABOVE_CONTROL = """> **With {shots} no adapted method's interval lies above that of the control.** A logistic regression on
> raw pixels has {value}; {methods}. Nothing here shows that CLIP helps with these images."""

USE = """## Use

From the root of a checkout of NoRA Vision, with RUN for the directory of this card:

```python
from pipelines.fewshot.classifier import FewShotClassifier

classifier = FewShotClassifier.from_run("RUN")
predictions = classifier.predict(["one.jpg", "two.jpg"])
print(predictions.labels, predictions.probabilities)
```

```bash
python -m pipelines.fewshot.classify RUN PICTURE_OR_FOLDER --output predictions.csv
```

Where the base model lies elsewhere, `from_run` takes `model` and `pretrained`, the command `--model` and `--pretrained`."""
USE_OPEN = """Classes that were never shown can be added, by `classifier.with_classes("a class of your own")` or `--add_class`:
they are known by their prompts alone, and the logits of the others stay as they are."""

LIMITS = """## Limits

- {test:,} test images, {fewest}: one more that is right is {one_of_all:.1%} of all, and
  {one_of_class:.0%} of that class. Smaller differences say nothing.{untested}
- The test images come from where the training images come from. Others may be harder.
- An image of none of the classes is given one of them all the same."""
FEWEST = "{fewest:,} of the class that has fewest"
FEWEST_OF_OTHERS = "0 of the class that has fewest, and {fewest:,} of the class that has fewest of the others"
UNTESTED = """
- **Without test images: {classes}.** Nothing here says how well such a class is recognised: its row of the confusion matrix
  is empty, it has no accuracy of its own, and the accuracy of all speaks of the other classes alone."""
BUILT_IN_LIMITS = """- The built-in model sees 64 x 64 pixels. **ImageNet's terms go with its weights: non-commercial research
  and education only.**"""


def write_card(run_path: Path, report: Report, options: Mapping[str, Any] | None = None) -> None:
    """Write README.md and its figures into the directory of a finished run.

    Args:
        report: what report.json says.
        options: the run's resolved options by group, which say where adapters were put.
    """
    figures = card_figures(report)
    for name, figure in figures.items():
        save_figure(figure, run_path / FIGURES / f"{name}.png")
    write_text_atomically(run_path / CARD, card(report, options, list(figures)))


def card(report: Report, options: Mapping[str, Any] | None, figures: Sequence[str]) -> str:
    """The card as Markdown behind a YAML header.

    Args:
        figures: the names of those in `figures/`.
    """
    sections = (
        f"---\n{card_header(report).to_yaml().strip()}\n---",
        _opening(report, options),
        _side_by_side(report),
        *_against_control(report),
        _guards(report),
        _classifier(report, figures),
        _held_out_classes(report),
        _copies(report),
        _notes(report),
        _use(report),
        _limits(report),
    )
    return "\n\n".join(section for section in sections if section) + "\n"


def card_header(report: Report) -> ModelCardData:
    """What the hub reads of a card."""
    task = "zero-shot-image-classification" if _is_open(report) else "image-classification"
    return ModelCardData(library_name="open_clip", pipeline_tag=task, tags=[*TAGS, *report["methods"]])


def _is_open(report: Report) -> bool:
    """Whether the classifier compares images with the prompts of any classes."""
    return loaded_member(report)["method"] in (ZERO_SHOT, *method_names())


def _opening(report: Report, options: Mapping[str, Any] | None) -> str:
    """What was learned, from what, and what loading it gives."""
    own, labelled = loaded_member(report), report["set"]
    weights = f" ({portable_name(report['pretrained'])})" if report["pretrained"] else ""
    return OPENING.format(
        count=len(labelled["classes"]),
        base=as_text(portable_name(report["model"]) + weights),
        set_name=_set_name(labelled["name"]),
        images=labelled["pictures"],
        classes=_listed(labelled["classes"]),
        shots=" and ".join(map(shots_in_words, report["shots"])),
        seeds=", ".join(map(str, report["seeds"])),
        templates=_listed(report["templates"]),
        method=own["method"],
        own_shots=shots_in_words(own["shots"]),
        seed=own["seed"],
        trained=own["trained_numbers"],
        stored=own["stored_bytes"],
        seconds=own["seconds"],
        target_layers=_target_layers(options, own["method"]) if own["method"] in method_names() else "",
        validation=own["validation"]["count"],
        test=own["test"]["count"],
        top1=Interval(**own["test"]["top1"]).as_share(),
        untested=f" Classes without test images: {_listed(without)}." if (without := _untested(report)) else "",
    )


def _target_layers(options: Mapping[str, Any] | None, method: str) -> str:
    """A sentence that names the adapted layers."""
    if options is None:
        return ""
    targets = TargetLayers(**options["target_layers"])
    encoders = "both encoders" if targets.encoders == "both" else f"the {targets.encoders} encoder"
    return f" It adapts {', '.join(targets.projections_of(method))} of {encoders}, layers: {targets.layers}."


def _set_name(name: str) -> str:
    """The set's name; of images of one's own, which errors call by a quoted path, without where they lie."""
    return as_text(Path(name[1:-1]).resolve().name if name[:1] in ("'", '"') else name)


def _listed(words: Sequence[str]) -> str:
    more = f" and {len(words) - MOST_LISTED} more" if len(words) > MOST_LISTED else ""
    return ", ".join(map(as_text, words[:MOST_LISTED])) + more


def _table(columns: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    lines = (columns, ["---"] * len(columns), *rows)
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def _side_by_side(report: Report) -> str:
    """All methods by shots, and what their intervals are of."""
    columns = ("shots", "method", ACCURACY, "ECE", "ECE with temperature", "trained numbers", "bytes", "seconds", "MiB")
    rows = [
        (
            str(row["shots"]),
            row["method"],
            Interval(**row["top1"]).as_share(),
            f"{row['calibration_error']:.3f}",
            f"{row['calibrated_calibration_error']:.3f}",
            f"{row['trained_numbers']:,.0f}",
            f"{row['stored_bytes']:,.0f}",
            f"{row['seconds']:.1f}",
            f"{row['peak_memory'] / MEBIBYTE:,.0f}",
        )
        for row in report["summary"]
    ]
    count = len(report["seeds"])
    notes = TABLE_NOTES.format(interval=SEVERAL_SEEDS.format(count=count) if count > 1 else ONE_SEED)
    return f"## Side by side\n\n{_table(columns, rows)}\n\n{notes}"


def _against_control(report: Report) -> Iterator[str]:
    """For each number of shots whether an adapted method lies above raw pixels, in plain words."""
    adapted = [method for method in report["methods"] if method in method_names()]
    if not adapted:
        return
    if CONTROL not in report["methods"]:
        yield NO_CONTROL
        return
    for shots in report["shots"]:
        found = {row["method"]: Interval(**row["top1"]) for row in report["summary"] if row["shots"] == shots}
        above = [method for method in adapted if found[method].low > found[CONTROL].high]
        yield (ABOVE_CONTROL if above else NOT_ABOVE_CONTROL).format(
            shots=shots_in_words(shots),
            control=CONTROL,
            value=found[CONTROL].as_share(),
            methods=", ".join(f"{method} {found[method].as_share()}" for method in above or adapted),
        )


def _guards(report: Report) -> str:
    """Where validation said that adaptation hurts."""
    lines = [
        f"- {member['method']}, {shots_in_words(member['shots'])}, seed {member['seed']}: {as_text(member['guard'])}"
        for member in report["members"]
        if member["guard"]
    ]
    return "\n".join(("## Where the adapter is not used in full\n", *lines)) if lines else ""


def _classifier(report: Report, figures: Sequence[str]) -> str:
    """What the temperature does to the classifier that is loaded, and the figures."""
    own = loaded_member(report)
    before, after = (own[part]["calibration_error"] for part in ("test", "calibrated"))
    told = (
        f"Its logits are divided by {own['temperature']:.3g}, which validation chose. That changes no class, but the "
        f"probabilities: the calibration error was {before:.3f} and is {after:.3f}."
    )
    return "\n\n".join(("## The classifier", told, *(f"![{CAPTIONS[name]}]({FIGURES}/{name}.png)" for name in figures)))


def _held_out_classes(report: Report) -> str:
    """How well classes are told apart that were never shown."""
    new = report["set"]["new_classes"]
    if not new:
        return ""
    rows = []
    for row in report["summary"]:
        own = [one for one in report["members"] if (one["shots"], one["method"]) == (row["shots"], row["method"])]
        if row["new_classes"] is not None:
            zero_shot = fmean(one["new_classes"]["zero_shot_top1"] for one in own)
            accuracy = Interval(**row["new_classes"]).as_share()
            rows.append((str(row["shots"]), row["method"], accuracy, f"{zero_shot:.1%}", f"{row['harmonic_mean']:.1%}"))
    columns = ("shots", "method", ACCURACY, "zero-shot", "harmonic mean with the accuracy on classes learned")
    told = _table(columns, rows) if rows else "No method of this run can tell classes apart that it was not shown."
    heading = f"## Classes held out of training\n\n{len(new)} classes, told apart among themselves by their names alone:"
    return f"{heading} {_listed(new)}.\n\n{told}"


def _copies(report: Report) -> str:
    """Images that the set held more than once."""
    copies = report["set"]["copies"]
    if not copies:
        return ""
    lines = [f"- {as_text(one)}" for one in copies[:MOST_LISTED]]
    lines += [f"- And {len(copies) - MOST_LISTED} more."] if len(copies) > MOST_LISTED else []
    return "\n".join(("## Copies\n", "One of each was used; none of those that are in two classes.\n", *lines))


def _notes(report: Report) -> str:
    """How the set was read, and what of it was not used; runs from before these were written down have none."""
    notes = report["set"].get("notes")
    return "\n".join(("## What was read, and what was not\n", *(f"- {as_text(note)}" for note in notes))) if notes else ""


def _use(report: Report) -> str:
    return f"{USE}\n\n{USE_OPEN}" if _is_open(report) else USE


def _untested(report: Report) -> list[str]:
    """The classes without test images."""
    counts = map(sum, loaded_member(report)["test"]["confusion"])
    return [name for name, count in zip(report["set"]["classes"], counts, strict=True) if not count]


def _limits(report: Report) -> str:
    """What the figures do not say."""
    own, without = loaded_member(report)["test"], _untested(report)
    test, fewest = own["count"], min(filter(None, map(sum, own["confusion"])))
    limits = LIMITS.format(
        test=test,
        fewest=(FEWEST_OF_OTHERS if without else FEWEST).format(fewest=fewest),
        one_of_all=1 / test,
        one_of_class=1 / fewest,
        untested=UNTESTED.format(classes=_listed(without)) if without else "",
    )
    return f"{limits}\n{BUILT_IN_LIMITS}" if report["model"] == BUILT_IN else limits
