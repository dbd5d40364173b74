"""Train classifiers of images from a few labelled ones, on a CLIP model, and judge them side by side.

    accelerate launch training/fewshot_nora.py
    accelerate launch training/fewshot_nora.py --data_dir PICTURES --model ViT-B-16 --pretrained openai

Everything goes into one run directory: the split of the images, every method's classifier and figures, the report and its
card.
"""

from __future__ import annotations

# First: it leaves out warnings that libraries give while they are imported.
import pipelines  # noqa: F401

# isort: split
from training.engine.console import speaking
from training.engine.stopping import exit_codes
from training.options.fewshot import FewShotOptions, parse_fewshot_options

if __name__ == "__main__":
    # Before the model libraries are imported, which takes seconds: --help and wrong flags are answered at once.
    with speaking(), exit_codes():
        given_options = parse_fewshot_options(description=__doc__)

# isort: split
import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from accelerate import Accelerator
from accelerate.logging import get_logger

from nora_vision.files import write_json
from pipelines.clip import load_clip
from pipelines.fewshot.classifier import REPORT
from pipelines.fewshot.data import LabelledImage
from pipelines.fewshot.export import save_exported, save_lora, save_merged
from training.engine.opening import check_outputs, open_run
from training.engine.sharding import check_can_shard
from training.fewshot.card import write_card
from training.fewshot.experiment import Experiment, SplitImages, check_drawable, labelled_set
from training.fewshot.report import RESULT, members_of, report_of, seconds_left, shown_member, table
from training.fewshot.trials import FittedAdapter, Trial, fit_member
from training.runs.provenance import write_provenance
from training.runs.run import RunDirectory

EXPORTED = "export"
# Its own name where it is run is __main__.
logger = get_logger("training.fewshot_nora")


def main(options: FewShotOptions) -> RunDirectory:
    """Fit every method to every draw, and report; returns the run's directory.

    Raises: InputError where something given cannot be used, before any long work starts.
    """
    accelerator = Accelerator(mixed_precision=options.model.mixed_precision)
    check_can_shard(accelerator, "AdamW", False, [options.method.adapter(name).create() for name in options.method.adapters()])
    check_outputs(options)
    for sentence in options.method.unused():
        logger.warning(sentence)
    labelled, copies = labelled_set(options.data)
    check_drawable(labelled, options.data)
    clip = load_clip(options.model.model, options.model.pretrained, accelerator.device)
    run = open_run(options, options.title(), accelerator)
    with run.recording():
        study = Experiment.of(clip, labelled, options.data, run.path)
        results = fit_all(accelerator, run, study, options)
        if run.writes:
            run.update_status(phase="writing the report", member=None, step=len(results), seconds_left=None)
            report = report_of(study, options, list(map(str, copies)), results)
            write_json(run.path / REPORT, report)
            write_card(run.path, report, options.to_dict())
            logger.info(table(report))
            logger.info(
                f"The report is {run.path / 'README.md'}; the classifier that it shows is in {run.path / report['classifier']}."
            )
        accelerator.wait_for_everyone()
    return run


def fit_all(accelerator: Accelerator, run: RunDirectory, study: Experiment, options: FewShotOptions) -> list[dict[str, Any]]:
    """The results of all members, those that are there already read; none on other processes than the main one."""
    members, results = members_of(options), []
    drawn: SplitImages | None = None
    learned: dict[str, LabelledImage] = {}
    for place, member in enumerate(members):
        key = (member.shots, member.seed)
        if drawn is None or drawn.key != key:
            with accelerator.main_process_first():
                drawn = study.drawn(key)
            learned |= {image.name: image for image in (*drawn.train, *drawn.validation)}
        path = run.path / member.folder / RESULT
        if not path.exists():
            left = seconds_left(results, members[place:])
            run.update_status(
                phase=f"fitting {member}", member=member.folder.as_posix(), step=place, total=len(members), seconds_left=left
            )
            found = fit_member(accelerator, run, drawn, member, options)
            if found is not None:
                fitted, result = found
                if member == shown_member(options) and isinstance(fitted, FittedAdapter):
                    export(fitted, run.path / EXPORTED, options.output.export)
                write_json(path, result)
                logger.info(told_of(member, result))
        accelerator.wait_for_everyone()
        results += [json.loads(path.read_text(encoding="utf-8"))] if run.writes else []
    record_provenance(run, study, options, learned.values())
    return results


def told_of(member: Trial, result: dict[str, Any]) -> str:
    """A line for the terminal."""
    guard = f" {result['guard']}" if result["guard"] else ""
    return f"{member}: {result['test']['top1']['value']:.1%} of {result['test']['count']} test images.{guard}"


def export(fitted: FittedAdapter, folder: Path, formats: list[str]) -> None:
    """Write the adapted model, at the strength chosen, in files that need none of this code."""
    tokens = fitted.clip.tokenizer(fitted.drawn.study.prompts.texts())
    if "lora" in formats:
        save_lora(fitted.components, folder / "lora", fitted.strength)
    if "merged" in formats:
        save_merged(fitted.clip, folder / "open_clip_model.safetensors")
    for format in ("torch", "onnx"):
        if format in formats:
            save_exported(fitted.clip, folder / format, tokens, format)


def record_provenance(run: RunDirectory, study: Experiment, options: FewShotOptions, images: Iterable[LabelledImage]) -> None:
    """Write down what the run is made of; see `write_provenance`."""
    if not run.writes:
        return
    model = {"name": study.clip.name, "weights_sha256": study.base_sha256}
    records = [{"file": name, "sha256": digest} for name, digest in study.digests(list(images)).items()]
    write_provenance(run, options.to_dict(), model, study.clip.device, {"pictures": records}, options.data.seeds)


if __name__ == "__main__":
    with speaking(), exit_codes():
        main(given_options)
