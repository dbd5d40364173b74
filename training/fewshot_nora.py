"""Train few-shot image classifiers on a CLIP model and compare them.

    accelerate launch training/fewshot_nora.py
    accelerate launch training/fewshot_nora.py --data_dir IMAGES --model ViT-B-16 --pretrained openai

One run directory receives the splits, the classifier of every trial, the report, and the model card with its figures.
"""

from __future__ import annotations

import gc

# First: it filters the warnings of libraries that are imported later.
import pipelines  # noqa: F401

# isort: split
from training.engine.console import configure_logging
from training.engine.stopping import exit_codes
from training.options.fewshot import FewShotOptions, parse_fewshot_options

if __name__ == "__main__":
    # Imports make a million objects that live to the end. Searching them for garbage takes a fifth of the start.
    gc.disable()
    # Before the slow imports below, so that --help and errors in flags appear at once.
    with configure_logging(), exit_codes():
        given_options = parse_fewshot_options(description=__doc__)

# isort: split
import shutil
from collections.abc import Collection, Iterator
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path

from accelerate import Accelerator
from accelerate.logging import get_logger

from pipelines.adapter_files import can_be_exported
from pipelines.adapter_method import ADAPTER_NAME
from pipelines.clip import Clip, load_clip
from pipelines.fewshot.data import LabelledImage
from pipelines.fewshot.export import save_exported, save_lora, save_merged
from pipelines.fewshot.quantization import quantized
from pipelines.quantization import CALIBRATION, UNQUANTIZED, compute_dtype, summary
from training.engine.opening import check_outputs, open_run
from training.engine.sharding import check_can_shard
from training.fewshot.card import write_card
from training.fewshot.experiment import Experiment, SplitImages, check_can_split, labelled_set, split_keys
from training.fewshot.report import phases, report_of, table, trials_of
from training.fewshot.trials import FittedAdapter, Trial, fit_trial, representative_trial
from training.runs.fewshot_files import TrialResult
from training.runs.provenance import write_provenance
from training.runs.run import RunDirectory
from training.runs.run_files import FITTING, REPORTING

EXPORTED = "export"
# By its full name: as a script, __name__ is "__main__".
logger = get_logger("training.fewshot_nora")
# The status fields of the current trial, once there is none.
NO_TRIAL = {"trial": None, "method": None, "shots": None, "seed": None}


def main(options: FewShotOptions) -> RunDirectory:
    """Fit every method to every split and write the report; returns the run's directory.

    Raises: InputError for options or images that cannot be used, before any long work starts.
    """
    accelerator = Accelerator(mixed_precision=options.model.mixed_precision)
    for name in options.method.adapters():
        check_can_shard(accelerator, options.optimizer(name), False, [options.adapter(name).create()])
    check_outputs(options)
    for sentence in options.method.unused():
        logger.warning(sentence)
    dataset, duplicates = labelled_set(options.data)
    check_can_split(dataset, options.data)
    clip = load_clip(options.model.model, options.model.pretrained, accelerator.device)
    run = open_run(options, options.title(), accelerator)
    with run.recording():
        with quantized_model(clip, accelerator, run, options) as clip:
            experiment = Experiment.create(clip, dataset, options.data, run.path)
            results, failed = fit_all(accelerator, run, experiment, options)
        record_provenance(run, experiment, options)
        if run.writes:
            run.begin(REPORTING, **NO_TRIAL, step=len(results))
            report = report_of(experiment, options, list(map(str, duplicates)), results, failed)
            report.write(run.path)
            write_card(run.path, report, options.target_layers)
            logger.info(table(report))
            if report.choice:
                logger.info(report.choice)
            logger.info(f"Report: {run.path / 'README.md'}. Classifier: {run.path / report.classifier}.")
        accelerator.wait_for_everyone()
    return run


@contextmanager
def quantized_model(clip: Clip, accelerator: Accelerator, run: RunDirectory, options: FewShotOptions) -> Iterator[Clip]:
    """`clip`, quantised if the options say so; the weights before quantisation are on disk within the context."""
    kind, folder = options.model.quantize, run.path / CALIBRATION / UNQUANTIZED
    if kind is None:
        yield clip
        return
    uses_weights = any(options.adapter(name).create().uses_unquantized_weights for name in options.method.adapters())
    # The other processes only quantise: all of them read what the main process writes.
    writes = uses_weights and accelerator.is_main_process
    clip = quantized(clip, kind, folder if writes else None)
    logger.info(summary(kind, compute_dtype(clip.dtype, clip.device), clip.quantization_errors))
    accelerator.wait_for_everyone()
    try:
        yield clip
    finally:
        if writes:
            shutil.rmtree(folder)


def fit_all(
    accelerator: Accelerator, run: RunDirectory, experiment: Experiment, options: FewShotOptions
) -> tuple[list[TrialResult], dict[str, str]]:
    """Fit all trials, or read the results of earlier sessions. On one process, a method that cannot be fitted is left out.

    Returns: the results, empty on processes other than the main one, and the reasons of the methods that failed.
    Raises: ValueError if every method fails.
    """
    trials, results, failed = trials_of(options), [], {}
    images: SplitImages | None = None
    for index, trial in enumerate(trials):
        if trial.method in failed:
            continue
        if images is None or images.key != (trial.shots, trial.seed):
            with accelerator.main_process_first():
                images = experiment.split_images((trial.shots, trial.seed))
        folder = trial.folder_in(run.path)
        if not (run.path / folder / TrialResult.NAME).exists():
            run.plan(phases(results, trials))
            run.begin(FITTING, index + 1, trial=folder, **asdict(trial), step=index, total=len(trials))
            try:
                run_trial(accelerator, run, images, trial, options)
            except ValueError as error:
                failed[trial.method] = str(error)
                if accelerator.num_processes > 1 or len(failed) == len(options.method.methods()):
                    raise
                logger.warning(f"{trial} failed and is left out: {error}")
                continue
        accelerator.wait_for_everyone()
        results += [TrialResult.read(run.path / folder)] if run.writes else []
    return without_methods(results, failed), failed


def without_methods(results: list[TrialResult], methods: Collection[str]) -> list[TrialResult]:
    """The results of all other methods."""
    return [result for result in results if result.method not in methods]


def run_trial(accelerator: Accelerator, run: RunDirectory, images: SplitImages, trial: Trial, options: FewShotOptions) -> None:
    """Fit a trial and write its files, result.json last."""
    fitted_and_result = fit_trial(accelerator, run, images, trial, options)
    if fitted_and_result is None:
        return
    fitted, result = fitted_and_result
    if trial == representative_trial(options) and isinstance(fitted, FittedAdapter):
        export(fitted, run.path / EXPORTED, options.output.export)
    result.write(run.path / result.folder)
    logger.info(log_line(trial, result))


def log_line(trial: Trial, result: TrialResult) -> str:
    """The accuracy of a trial, in one line."""
    reason = f" {result.scale_reason}" if result.scale_reason else ""
    return f"{trial}: accuracy {result.test.top1.value:.1%} on {result.test.count} test images.{reason}"


def export(fitted: FittedAdapter, folder: Path, formats: list[str]) -> None:
    """Write the adapted model, at the chosen scale, to files that do not need this project, if it is a change of weights."""
    if not can_be_exported(fitted.components, ADAPTER_NAME):
        return
    tokens = fitted.clip.tokenizer(fitted.split_images.experiment.prompts.texts())
    if "lora" in formats:
        save_lora(fitted.components, folder / "lora", fitted.scale)
    if "merged" in formats:
        save_merged(fitted.clip, folder / "open_clip_model.safetensors")
    for format in ("torch", "onnx"):
        if format in formats:
            save_exported(fitted.clip, folder / format, tokens, format)


def record_provenance(run: RunDirectory, experiment: Experiment, options: FewShotOptions) -> None:
    """Record options, model, images and versions; see `write_provenance`."""
    if not run.writes:
        return
    used: dict[str, LabelledImage] = {}
    for key in split_keys(options.data):
        images = experiment.split_images(key)
        used |= {image.name: image for image in (*images.train, *images.validation)}
    model = {"name": experiment.clip.name, "weights_sha256": experiment.base_sha256}
    records = [{"file": name, "sha256": digest} for name, digest in experiment.digests(list(used.values())).items()]
    write_provenance(run, options.to_dict(), model, experiment.clip.device, {"images": records}, options.data.seeds)


if __name__ == "__main__":
    gc.freeze()
    gc.enable()
    with configure_logging(), exit_codes():
        main(given_options)
