"""A trial: one method, fitted to one split. Hyperparameters are chosen on validation images, then tested once."""

from __future__ import annotations

import copy
import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import Protocol

import torch
from accelerate import Accelerator
from accelerate.logging import get_logger
from torch import nn

from pipelines.adapter_method import trained_parameters
from pipelines.clip import Clip
from pipelines.export_error import expected_left_out, left_out_sentence
from pipelines.fewshot import adapters, baselines
from pipelines.fewshot.baselines.predictors import Predictor
from pipelines.fewshot.baselines.vocabulary import with_classes
from pipelines.fewshot.classifier import ClassifierFile, save_classifier
from pipelines.fewshot.data import LabelledImage, LabelledImageDataset
from pipelines.fewshot.features import prompt_features
from pipelines.fewshot.metric_values import ClassificationMetrics
from pipelines.fewshot.metrics import fit_temperature, harmonic_mean, score, top1, wilson_interval
from pipelines.fewshot.prompts import Prompts
from pipelines.fewshot.shots import Shots
from pipelines.methods import DEFAULT
from pipelines.optimizers import OptimizerSettings
from training.engine.dry_run import PeakMemory
from training.engine.loop import Periodic, train, training_losses
from training.fewshot.adapter_training import CalibrationBatches, loop_options, loss_and_batches, to_train
from training.fewshot.experiment import Experiment, SplitImages
from training.fewshot.prediction_file import prediction_file
from training.fewshot.validation import FittingClock, ValidationCallback
from training.options.fewshot import ALL, FewShotOptions
from training.runs.fewshot_files import (
    NewClassesResult,
    PredictionFile,
    TrialResult,
    ValidationResult,
    trials_folder,
)
from training.runs.run import RunDirectory

logger = get_logger(__name__)
# Candidate scales of the adapter, from as trained to the base model.
SCALES = (1.0, 0.75, 0.5, 0.25, 0.0)


@dataclass(frozen=True)
class Trial:
    """A method and the split that it is fitted to."""

    shots: Shots
    seed: int
    method: str

    def folder_in(self, run_path: Path) -> str:
        """The trial's folder, relative to the run's directory `run_path`."""
        return f"{trials_folder(run_path)}/{self.shots}-shots/seed-{self.seed}/{self.method}"

    def __str__(self) -> str:
        return f"{self.method}, {self.shots} shots, seed {self.seed}"


def representative_trial(options: FewShotOptions, methods: Sequence[str] | None = None) -> Trial:
    """The trial that represents the run: most shots, first seed, the default method, else the first adapter, else the last.

    Args:
        methods: those to choose from; None for all.
    """
    methods = options.method.methods() if methods is None else methods
    adapters = [method for method in methods if method in options.method.adapters()] or methods[-1:]
    method = DEFAULT if DEFAULT in adapters else adapters[0]
    shots = max(options.data.all_shots(), key=lambda number: float("inf") if number == ALL else number)
    return Trial(shots, options.data.seeds[0], method)


class FittedMethod(Protocol):
    """A fitted method, with all hyperparameters chosen."""

    num_trainable_parameters: int
    setting: dict[str, float | str]
    scale: float
    scale_reason: str | None

    def logits(self, images: Sequence[LabelledImage]) -> torch.Tensor:
        """(n, classes) float32 on the CPU."""

    def new_logits(self, images: Sequence[LabelledImage]) -> torch.Tensor | None:
        """(n, new classes) for images of the held-out classes; None for methods that cannot add classes."""

    def save(self, folder: Path, metadata: ClassifierFile) -> None:
        """Write the classifier's folder."""


class FittedBaseline:
    """A method on frozen features."""

    scale, scale_reason = 1.0, None

    def __init__(self, split_images: SplitImages, predictor: Predictor) -> None:
        self.split_images, self.predictor = split_images, predictor
        self.num_trainable_parameters, self.setting = predictor.num_trainable_parameters, dict(predictor.setting)

    def logits(self, images: Sequence[LabelledImage]) -> torch.Tensor:
        """See `FittedMethod`."""
        return self.predictor.logits(self.split_images.inputs(images, self.predictor.reads)).cpu()

    def new_logits(self, images: Sequence[LabelledImage]) -> torch.Tensor | None:
        """See `FittedMethod`."""
        if not self.predictor.open_vocabulary:
            return None
        experiment = self.split_images.experiment
        extended = with_classes(self.predictor, experiment.clip, experiment.new_prompts)
        return extended.logits(self.split_images.inputs(images, extended.reads)).cpu()[:, len(experiment.prompts.classes) :]

    def save(self, folder: Path, metadata: ClassifierFile) -> None:
        """See `FittedMethod`."""
        save_classifier(folder, metadata, predictor=self.predictor)


class FittedAdapter:
    """Encoders with a trained adapter, at the scale chosen on the validation images.

    Args:
        clip: a copy of the base model, with the adapter.
        components: its adapted encoders.
    """

    def __init__(
        self,
        split_images: SplitImages,
        clip: Clip,
        components: dict[str, nn.Module],
        setting: dict[str, float | str],
    ) -> None:
        self.split_images, self.clip, self.components, self.setting = split_images, clip, components, setting
        self.num_trainable_parameters = sum(parameter.numel() for parameter in trained_parameters(components))
        self.scale, self.scale_reason = self._choose_scale()

    def _choose_scale(self) -> tuple[float, str | None]:
        """Set the scale chosen on the validation images; returns it and, if it is below 1, the reason.

        Interpolates towards zero-shot, h = W x + scale dW x, as WiSE-FT does [Wortsman et al. 2022, eq. 1]. Takes the largest
        scale whose accuracy is within one standard error of the best [Breiman et al. 1984, section 3.4.3]: smaller
        differences are not significant on a few validation images.
        """
        images = self.split_images.validation
        labels = torch.tensor([image.label for image in images])
        scales = SCALES if adapters.allows_any_scale(self.components) else (SCALES[0], SCALES[-1])
        accuracies = {}
        for scale in scales:
            adapters.set_scale(self.components, scale)
            accuracies[scale] = top1(self.logits(images), labels)
        chosen = largest_within_error(accuracies, len(images))
        adapters.set_scale(self.components, chosen)
        return chosen, None if chosen == SCALES[0] else scale_reason(accuracies, chosen, len(images))

    def logits(self, images: Sequence[LabelledImage], prompts: Prompts | None = None) -> torch.Tensor:
        """See `FittedMethod`.

        Args:
            prompts: of the classes; by default those of the trained ones.
        """
        return adapted_logits(self.split_images.experiment, self.clip, images, prompts)

    def new_logits(self, images: Sequence[LabelledImage]) -> torch.Tensor | None:
        """See `FittedMethod`."""
        return self.logits(images, self.split_images.experiment.new_prompts)

    def save(self, folder: Path, metadata: ClassifierFile) -> None:
        """See `FittedMethod`."""
        save_classifier(folder, metadata, adapter=self.components)


def adapted_logits(
    experiment: Experiment, clip: Clip, images: Sequence[LabelledImage], prompts: Prompts | None = None
) -> torch.Tensor:
    """The logits (n, classes) of `images` by the adapted `clip`, float32 on the CPU.

    Args:
        prompts: of the classes; by default those of the trained ones.
    """
    features, _ = experiment.features(images, clip)
    classes = prompt_features(clip, prompts or experiment.prompts, cache=experiment.cache)
    return float(clip.logit_scale) * features @ classes.T


def largest_within_error(accuracies: Mapping[float, float], count: int) -> float:
    """The largest scale whose accuracy on `count` images is within one binomial standard error of the best accuracy.

    Args:
        accuracies: by scale, in [0, 1].
    """
    best = max(accuracies.values())
    error = math.sqrt(best * (1 - best) / count)
    return max(scale for scale, accuracy in accuracies.items() if accuracy >= best - error)


def scale_reason(accuracies: Mapping[float, float], chosen: float, count: int) -> str:
    """Why the adapter is used at the scale `chosen`, which is below 1."""
    result = "classifies zero-shot, without the adapter" if chosen == 0 else f"uses the adapter at scale {chosen:g}"
    at_chosen = f"{accuracies[chosen]:.0%} at scale {chosen:g} and " if chosen else ""
    return (
        f"Accuracy on {count} validation images: {accuracies[1.0]:.0%} at scale 1, {at_chosen}{accuracies[0.0]:.0%} without the "
        f"adapter. The classifier {result}."
    )


def fit_adapter(
    accelerator: Accelerator, run: RunDirectory, images: SplitImages, trial: Trial, options: FewShotOptions, clock: FittingClock
) -> FittedAdapter:
    """Train an adapter in the trial's directory, resuming from its newest checkpoint if there is one.

    Args:
        clock: of fitting; it is paused during validation.
    """
    experiment, optimisation, adapter = images.experiment, options.optimisation, options.adapter(trial.method)
    clip = replace(experiment.clip, model=copy.deepcopy(experiment.clip.model))
    components = adapters.attach(clip, adapter, options.target_layers, trial.seed)
    calibration = experiment.folder / "calibration" / f"{trial.shots}-shots-seed-{trial.seed}"
    pixels = CalibrationBatches(
        LabelledImageDataset(images.train, clip.preprocess), optimisation.train_batch_size, accelerator.is_main_process
    )
    tokens = clip.tokenizer(experiment.prompts.texts())
    loss, batches = loss_and_batches(images, clip, components, optimisation.train_batch_size, accelerator.num_processes)
    losses = partial(training_losses, loss, batches, accelerator, per_epoch=batches.per_epoch)
    # On all processes: the activation statistics are summed over them.
    adapters.start(clip, adapter, components, pixels, tokens, calibration, trial.seed, losses, experiment.unquantized)
    if trial == representative_trial(options) and "lora" in options.output.export and (share := expected_left_out(components)):
        logger.warning(f"{trial}: {left_out_sentence(share)}")
    steps, rate = optimisation.steps(images.shots), options.learning_rate(trial.method)
    name = options.optimizer(trial.method)
    settings = OptimizerSettings(name, paged=options.model.quantize is not None, weight_decay=optimisation.adam_weight_decay)
    trainable = to_train(loss, batches, components, adapter, settings, steps, rate)
    directory = RunDirectory.create(run.path / trial.folder_in(run.path), options.to_dict(), run.writes, run)
    validate = ValidationCallback(directory, images, partial(adapted_logits, experiment, clip, images.validation), clock)
    every = options.output.validation_steps
    with directory.recording():
        periodic = [Periodic(every, validate)] if every else []
        train(accelerator, directory, trainable, loop_options(options, steps, trial.seed), periodic)
    trainable.method.round_trained()
    trainable.module.eval()
    return FittedAdapter(images, clip, components, {"learning_rate": rate, "steps": steps, "optimizer": name})


@dataclass(frozen=True)
class Evaluation:
    """The metrics of a fitted method, as of `TrialResult`, and its predictions for the test images."""

    temperature: float
    validation: ValidationResult
    test: ClassificationMetrics
    calibrated: ClassificationMetrics
    new_classes: NewClassesResult | None
    zero_shot_top1: float
    predictions: PredictionFile


def evaluate(fitted: FittedMethod, images: SplitImages) -> Evaluation:
    """Fit the temperature on the validation images, then evaluate on the test images."""
    experiment, classes = images.experiment, images.experiment.prompts.classes
    validation_labels, test_labels = (torch.tensor([one.label for one in part]) for part in (images.validation, images.test))
    validation_logits = fitted.logits(images.validation)
    temperature = fit_temperature(validation_logits, validation_labels)
    zero_shot_validation, zero_shot_test = (
        top1(experiment.features(part)[0] @ experiment.class_features.T, labels)
        for part, labels in ((images.validation, validation_labels), (images.test, test_labels))
    )
    logits = fitted.logits(images.test)
    test, calibrated = (score(logits, test_labels, classes, value) for value in (1.0, temperature))
    return Evaluation(
        temperature=temperature,
        validation=ValidationResult(
            top1=top1(validation_logits, validation_labels),
            zero_shot_top1=zero_shot_validation,
            count=len(images.validation),
        ),
        test=test,
        calibrated=calibrated,
        new_classes=evaluate_new_classes(fitted, images, test.top1.value) if experiment.new_prompts else None,
        zero_shot_top1=zero_shot_test,
        predictions=prediction_file(images.test, logits, temperature, classes, experiment.digests(images.test)),
    )


def evaluate_new_classes(fitted: FittedMethod, images: SplitImages, base_top1: float) -> NewClassesResult | None:
    """Accuracy on the held-out classes, among themselves; None if the method cannot add classes."""
    experiment, test = images.experiment, images.new_test
    logits = fitted.new_logits(test)
    if logits is None:
        return None
    labels = torch.tensor([image.label for image in test]) - len(experiment.prompts.classes)
    zero_shot = float(experiment.clip.logit_scale) * experiment.features(test)[0] @ experiment.new_class_features.T
    accuracy = wilson_interval(int((logits.argmax(dim=1) == labels).sum()), len(labels))
    return NewClassesResult(accuracy, top1(zero_shot, labels), harmonic_mean(base_top1, accuracy.value), len(labels))


def stored_bytes(folder: Path) -> int:
    """Bytes of the weights in a classifier's folder: of an adapter's smallest layout, or of a predictor."""
    layouts = [path for path in (folder / "adapter").glob("*") if path.is_dir()] or [folder]
    pattern = "*.safetensors" if layouts == [folder] else "**/*.safetensors"
    return min(sum(file.stat().st_size for file in layout.glob(pattern)) for layout in layouts)


def fit_trial(
    accelerator: Accelerator, run: RunDirectory, images: SplitImages, trial: Trial, options: FewShotOptions
) -> tuple[FittedMethod, TrialResult] | None:
    """Fit a method, evaluate it and save it; processes other than the main one take part in the training and return None.

    The result's seconds and peak memory are those of fitting only, without features of the frozen encoders and validation.
    """
    is_baseline = trial.method in baselines.BASELINES
    if is_baseline and not accelerator.is_main_process:
        return None
    task = images.task_for(trial.method) if is_baseline else None
    clock, memory = FittingClock(), PeakMemory(accelerator.device)
    fitted: FittedMethod
    if task is not None:
        fitted = FittedBaseline(images, baselines.fit(trial.method, task, trial.seed))
    else:
        fitted = fit_adapter(accelerator, run, images, trial, options, clock)
    if not accelerator.is_main_process:
        return None
    cost = {"seconds": round(clock.seconds, 2), "peak_memory": memory.read()}
    evaluation, folder = evaluate(fitted, images), trial.folder_in(run.path)
    fitted.save(run.path / folder, classifier_file(images.experiment, trial, fitted, evaluation.temperature, options))
    evaluation.predictions.write(run.path / folder)
    return fitted, TrialResult(
        **asdict(trial),
        folder=folder,
        split_sha256=images.split.sha256,
        setting=fitted.setting,
        scale=fitted.scale,
        scale_reason=fitted.scale_reason,
        num_trainable_parameters=fitted.num_trainable_parameters,
        stored_bytes=stored_bytes(run.path / folder),
        **cost,
        temperature=evaluation.temperature,
        validation=evaluation.validation,
        test=evaluation.test,
        calibrated=evaluation.calibrated,
        new_classes=evaluation.new_classes,
        zero_shot_top1=evaluation.zero_shot_top1,
    )


def classifier_file(
    experiment: Experiment, trial: Trial, fitted: FittedMethod, temperature: float, options: FewShotOptions
) -> ClassifierFile:
    """The content of the trial's classifier.json."""
    classes = experiment.prompts.classes
    return ClassifierFile(
        method=trial.method,
        model=options.model.model,
        pretrained=options.model.pretrained,
        base_sha256=experiment.base_sha256,
        classes=classes,
        keys=experiment.dataset.keys[: len(classes)],
        templates=experiment.prompts.templates,
        scale=fitted.scale,
        temperature=temperature,
    )
