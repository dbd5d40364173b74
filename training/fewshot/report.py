"""The report of a few-shot run: every trial, and a summary of the methods with confidence intervals."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from operator import attrgetter
from statistics import fmean

from pipelines.fewshot.baselines import BASELINES
from pipelines.fewshot.metric_values import Interval
from pipelines.fewshot.metrics import interval_over_seeds
from pipelines.fewshot.shots import Shots
from training.fewshot.experiment import Experiment, split_keys
from training.fewshot.trials import Trial, representative_trial
from training.options.fewshot import FewShotOptions
from training.runs.fewshot_files import DatasetSummary, FewShotReport, MethodSummary, TrialResult, ValidationResult
from training.runs.progress import PlannedPhase
from training.runs.run_files import FITTING, REPORTING

REPORT_SECONDS = 3.0
# The fields of a summary that are means over seeds, as attributes of a result.
MEANS = {
    "calibration_error": "test.calibration_error",
    "calibrated_calibration_error": "calibrated.calibration_error",
    "num_trainable_parameters": "num_trainable_parameters",
    "stored_bytes": "stored_bytes",
    "seconds": "seconds",
    "peak_memory": "peak_memory",
}


def trials_of(options: FewShotOptions) -> list[Trial]:
    """All trials of a run, split by split."""
    return [Trial(*key, method) for key in split_keys(options.data) for method in options.method.methods()]


def phases(results: Sequence[TrialResult], trials: Sequence[Trial]) -> list[PlannedPhase]:
    """The phases of a run, each trial with the mean duration of the finished `results` of its method, None without any."""
    durations: dict[tuple[str, Shots], list[float]] = {}
    for result in results:
        durations.setdefault((result.method, result.shots), []).append(result.seconds)
    of_trials = [durations.get((trial.method, trial.shots)) for trial in trials]
    fitting = [PlannedPhase(FITTING, seconds and fmean(seconds), index + 1) for index, seconds in enumerate(of_trials)]
    return [*fitting, PlannedPhase(REPORTING, REPORT_SECONDS)]


def report_of(
    experiment: Experiment,
    options: FewShotOptions,
    duplicates: Sequence[str],
    results: Sequence[TrialResult],
    failed: Mapping[str, str],
) -> FewShotReport:
    """The report.

    Args:
        duplicates: a sentence for each group of identical images.
        results: of all trials of the methods that did not fail.
        failed: the reasons of the other methods.
    """
    methods = [method for method in options.method.methods() if method not in failed]
    accuracies = validation_accuracies(results) if options.method.is_automatic else {}
    trial = representative_trial(options, [max(accuracies, key=accuracies.__getitem__)] if accuracies else methods)
    (classifier,) = (
        one.folder for one in results if (one.shots, one.seed, one.method) == (trial.shots, trial.seed, trial.method)
    )
    return FewShotReport(
        dataset=_dataset_summary(experiment, duplicates),
        model=options.model.model,
        pretrained=options.model.pretrained,
        templates=list(experiment.prompts.templates),
        shots=options.data.all_shots(),
        seeds=options.data.seeds,
        methods=methods,
        trials=list(results),
        summary=[
            summary_of([result for result in results if (result.shots, result.method) == (shots, method)])
            for shots in options.data.all_shots()
            for method in methods
        ],
        classifier=classifier,
        quantization_errors=dict(experiment.clip.quantization_errors),
        failed=dict(failed),
        validation_accuracies=accuracies,
    )


def validation_accuracies(results: Sequence[TrialResult]) -> dict[str, float]:
    """The accuracy of each method on the validation images of all splits, adapters first, so that they win ties."""
    images: dict[str, list[ValidationResult]] = {}
    for result in sorted(results, key=lambda one: one.method in BASELINES):
        images.setdefault(result.method, []).append(result.validation)
    return {name: sum(one.top1 * one.count for one in each) / sum(one.count for one in each) for name, each in images.items()}


def _dataset_summary(experiment: Experiment, duplicates: Sequence[str]) -> DatasetSummary:
    dataset, new = experiment.dataset, experiment.new_prompts
    return DatasetSummary(
        name=dataset.name,
        classes=list(experiment.prompts.classes),
        new_classes=[] if new is None else list(new.classes),
        images=len(dataset.images),
        duplicates=list(duplicates),
        notes=list(dataset.notes),
    )


def summary_of(results: Sequence[TrialResult]) -> MethodSummary:
    """The means over `results`: one method at one number of shots, all its seeds."""
    new = [result.new_classes for result in results if result.new_classes is not None]
    return MethodSummary(
        shots=results[0].shots,
        method=results[0].method,
        num_seeds=len(results),
        top1=over_seeds([result.test.top1 for result in results]),
        **{name: fmean(map(attrgetter(attribute), results)) for name, attribute in MEANS.items()},
        new_classes=over_seeds([one.top1 for one in new]) if new else None,
        harmonic_mean=fmean(one.harmonic_mean for one in new) if new else None,
        below_zero_shot=below_zero_shot(results),
    )


def below_zero_shot(results: Sequence[TrialResult]) -> int | None:
    """The number of `results` that are worse on the test images than the base model; None if one does not hold its accuracy."""
    if any(result.zero_shot_top1 is None for result in results):
        return None
    return sum(result.test.top1.value < result.zero_shot_top1 for result in results)


def over_seeds(intervals: Sequence[Interval]) -> Interval:
    """Student's interval over seeds; a single interval is returned unchanged."""
    return intervals[0] if len(intervals) == 1 else interval_over_seeds([interval.value for interval in intervals])


def table(report: FewShotReport) -> str:
    """The summary as a table for a terminal."""
    lines = [
        f"{'shots':>5}  {'method':<14}{'top-1, 95% interval':>24}{'ECE':>8}{'calibrated':>12}{'params':>10}{'bytes':>10}{'s':>8}"
    ]
    for row in report.summary:
        lines.append(
            f"{row.shots!s:>5}  {row.method:<14}{row.top1.as_share():>24}{row.calibration_error:>8.3f}"
            f"{row.calibrated_calibration_error:>12.3f}{row.num_trainable_parameters:>10,.0f}{row.stored_bytes:>10,.0f}"
            f"{row.seconds:>8.1f}"
        )
    return "\n".join(lines)
