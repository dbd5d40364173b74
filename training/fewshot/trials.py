"""One method, fitted to one draw of images: everything is chosen on validation, then the test is looked at once."""

from __future__ import annotations

import copy
import math
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any, Protocol

import torch
from accelerate import Accelerator
from diffusers.optimization import get_scheduler
from torch import nn
from tqdm.auto import tqdm

from pipelines.adapter_method import trained_parameters
from pipelines.adapter_options import AdapterOptions
from pipelines.clip import Clip
from pipelines.fewshot import adapters, baselines
from pipelines.fewshot.baselines.predictors import Predictor
from pipelines.fewshot.baselines.vocabulary import with_classes
from pipelines.fewshot.batches import DrawnViews, LabelledBatches
from pipelines.fewshot.classifier import ClassifierFile, save_classifier
from pipelines.fewshot.data import LabelledImage, LabelledImageDataset
from pipelines.fewshot.features import prompt_features
from pipelines.fewshot.loss import ClassificationLoss
from pipelines.fewshot.metrics import fit_temperature, harmonic_mean, score, top1, wilson_interval
from pipelines.fewshot.prompts import Prompts
from pipelines.fewshot.shots import Shots
from pipelines.optimizers import Adam, Rates, parameter_groups
from training.engine.dry_run import PeakMemory
from training.engine.loop import LoopOptions, Trainable, train, training_losses
from training.fewshot.experiment import Experiment, SplitImages
from training.fewshot.tested import told_of_test, write_tested
from training.options.fewshot import FewShotOptimisationOptions, FewShotOptions
from training.runs.run import RunDirectory

# From as trained to the base model.
STRENGTHS = (1.0, 0.75, 0.5, 0.25, 0.0)
WARMUP_SHARE = 0.05
# Of images at once, where the batches of the training are no smaller.
CALIBRATION_BATCH = 64


@dataclass(frozen=True)
class Trial:
    """A method and the draw it is fitted to."""

    shots: Shots
    seed: int
    method: str

    @property
    def folder(self) -> Path:
        """Below the run's directory."""
        return Path("members") / f"{self.shots}-shots" / f"seed-{self.seed}" / self.method

    def __str__(self) -> str:
        return f"{self.method}, {self.shots} shots, seed {self.seed}"


class Fitted(Protocol):
    """A method that has learned and chosen all it will."""

    trained_numbers: int
    setting: dict[str, float]
    strength: float
    guard: str | None

    def logits(self, images: Sequence[LabelledImage]) -> torch.Tensor:
        """(n, classes) float32 on the CPU."""

    def new_logits(self, images: Sequence[LabelledImage]) -> torch.Tensor | None:
        """(n, new classes) of images of the classes held out; None for methods that know only what they were shown."""

    def save(self, folder: Path, told: ClassifierFile) -> None:
        """Write the classifier's files."""


class FittedBaseline:
    """A method on frozen features."""

    strength, guard = 1.0, None

    def __init__(self, drawn: SplitImages, predictor: Predictor) -> None:
        self.drawn, self.predictor = drawn, predictor
        self.trained_numbers, self.setting = predictor.trained_numbers, dict(predictor.setting)

    def logits(self, images: Sequence[LabelledImage]) -> torch.Tensor:
        """See `Fitted`."""
        return self.predictor.logits(self.drawn.inputs(images, self.predictor.reads)).cpu()

    def new_logits(self, images: Sequence[LabelledImage]) -> torch.Tensor | None:
        """See `Fitted`."""
        if not self.predictor.open_vocabulary:
            return None
        study = self.drawn.study
        wider = with_classes(self.predictor, study.clip, study.new_prompts)
        return wider.logits(self.drawn.inputs(images, wider.reads)).cpu()[:, len(study.prompts.classes) :]

    def save(self, folder: Path, told: ClassifierFile) -> None:
        """See `Fitted`."""
        save_classifier(folder, told, predictor=self.predictor)


class FittedAdapter:
    """Towers that an adapter was trained on, at the strength that validation chose.

    Args:
        clip: a copy of the base model, with the adapter.
        components: its adapted encoders.
    """

    def __init__(
        self,
        drawn: SplitImages,
        clip: Clip,
        components: dict[str, nn.Module],
        setting: dict[str, float],
    ) -> None:
        self.drawn, self.clip, self.components, self.setting = drawn, clip, components, setting
        self.trained_numbers = sum(parameter.numel() for parameter in trained_parameters(components))
        self.strength, self.guard = self._guarded()

    def _guarded(self) -> tuple[float, str | None]:
        """The strength that validation allows, set; and, where it is not the full one, what there was to choose from.

        Interpolates towards zero-shot, h = W x + strength dW x, as WiSE-FT does [Wortsman et al. 2022, eq. 1]. The largest
        strength whose accuracy is within one standard error of the best is taken [Breiman et al. 1984, section 3.4.3]: a few
        validation images alone tell no smaller difference.
        """
        images = self.drawn.validation
        labels = torch.tensor([image.label for image in images])
        allowed = STRENGTHS if adapters.allows_any_strength(self.components) else (STRENGTHS[0], STRENGTHS[-1])
        right = {}
        for strength in allowed:
            adapters.set_strength(self.components, strength)
            right[strength] = top1(self.logits(images), labels)
        chosen = largest_within_error(right, len(images))
        adapters.set_strength(self.components, chosen)
        return chosen, None if chosen == STRENGTHS[0] else told_of_guard(right, chosen, len(images))

    def logits(self, images: Sequence[LabelledImage], prompts: Prompts | None = None) -> torch.Tensor:
        """See `Fitted`; of the classes of `prompts`, those that were learned unless said."""
        study = self.drawn.study
        features, _ = study.features(images, self.clip)
        classes = prompt_features(self.clip, prompts or study.prompts, cache=study.cache)
        return float(self.clip.logit_scale) * features @ classes.T

    def new_logits(self, images: Sequence[LabelledImage]) -> torch.Tensor | None:
        """See `Fitted`."""
        return self.logits(images, self.drawn.study.new_prompts)

    def save(self, folder: Path, told: ClassifierFile) -> None:
        """See `Fitted`."""
        save_classifier(folder, told, adapter=self.components)


def largest_within_error(accuracies: Mapping[float, float], count: int) -> float:
    """The largest strength whose accuracy on `count` images is within one binomial standard error of the best one's.

    Args:
        accuracies: by strength, in [0, 1].
    """
    best = max(accuracies.values())
    error = math.sqrt(best * (1 - best) / count)
    return max(strength for strength, accuracy in accuracies.items() if accuracy >= best - error)


def told_of_guard(accuracies: Mapping[float, float], chosen: float, count: int) -> str:
    """One sentence on why the strength `chosen`, which is not the full one, is used."""
    result = "falls back to zero-shot" if chosen == 0 else f"uses {chosen:g} of the adapter's strength"
    return (
        f"On {count} validation images {accuracies[1.0]:.0%} are right at full strength, {accuracies[chosen]:.0%} at "
        f"{chosen:g}, {accuracies[0.0]:.0%} without the adapter: the result {result}."
    )


def calibration_batches(inputs: LabelledImageDataset, train_batch_size: int, has_bar: bool) -> Iterator[torch.Tensor]:
    """All images as a model takes them, in batches (n, 3, h, w).

    None is larger than those of the training, so that calibration takes less memory than a step.
    """
    loader = torch.utils.data.DataLoader(inputs, min(CALIBRATION_BATCH, train_batch_size))
    for pixels, _ in tqdm(loader, desc="calibrating", leave=False, delay=5, disable=not has_bar):
        yield pixels


def fit_adapter(
    accelerator: Accelerator, run: RunDirectory, drawn: SplitImages, member: Trial, options: FewShotOptions
) -> FittedAdapter:
    """Train an adapter in the member's own directory, going on from its newest checkpoint where there is one."""
    study, how, adapter = drawn.study, options.optimisation, options.method.adapter(member.method)
    clip = replace(study.clip, model=copy.deepcopy(study.clip.model))
    components = adapters.attach(clip, adapter, options.target_layers)
    calibration = study.folder / "calibration" / f"{member.shots}-shots-seed-{member.seed}"
    pixels = calibration_batches(
        LabelledImageDataset(drawn.train, clip.preprocess), how.train_batch_size, accelerator.is_main_process
    )
    tokens = clip.tokenizer(study.prompts.texts())
    loss, batches = learned_from(drawn, clip, components, how.train_batch_size, accelerator.num_processes)
    losses = partial(training_losses, loss, batches, accelerator)
    # All processes at once: the statistics of activations are summed over them.
    adapters.start(clip, adapter, components, pixels, tokens, calibration, member.seed, losses)
    steps, rate = how.steps(drawn.shots), options.learning_rate(member.method)
    trainable = to_train(loss, batches, components, adapter, how, steps, rate)
    own = RunDirectory.create(run.path / member.folder, options.to_dict(), run.writes)
    with own.recording():
        train(accelerator, own, trainable, loop_options(options, steps, member.seed))
    trainable.module.eval()
    return FittedAdapter(drawn, clip, components, {"learning_rate": rate, "steps": steps})


def loop_options(options: FewShotOptions, steps: int, seed: int) -> LoopOptions:
    """What of the options the loop needs, to train for `steps`."""
    return LoopOptions(
        steps,
        seed=seed,
        gradient_accumulation_steps=options.optimisation.gradient_accumulation_steps,
        max_grad_norm=options.optimisation.max_grad_norm,
        checkpointing_steps=options.output.checkpointing_steps,
        checkpoints_total_limit=options.output.checkpoints_total_limit,
        dataloader_num_workers=options.data.dataloader_num_workers,
    )


def learned_from(
    drawn: SplitImages, clip: Clip, components: dict[str, nn.Module], train_batch_size: int, processes: int
) -> tuple[ClassificationLoss, LabelledBatches]:
    """The loss and its batches.

    Where one tower alone is adapted, what the other makes of images or prompts is computed once.
    """
    study = drawn.study
    reads_features = adapters.IMAGE not in components
    class_features = None if adapters.TEXT in components else study.class_features
    loss = ClassificationLoss(clip, study.prompts, class_features, reads_features)
    labels = torch.tensor([image.label for image in drawn.train])
    size = processes * min(train_batch_size, math.ceil(len(labels) / processes))
    images = DrawnViews(drawn.training_examples.all_views()) if reads_features else drawn.altered()
    return loss, LabelledBatches(images, labels, size, drawn.split.seed)


def to_train(
    loss: ClassificationLoss,
    batches: LabelledBatches,
    components: dict[str, nn.Module],
    adapter: AdapterOptions,
    how: FewShotOptimisationOptions,
    steps: int,
    learning_rate: float,
) -> Trainable:
    """AdamW over the adapter's parameters, a cosine that falls to zero, and what the method does within the training."""
    method = adapter.create()
    optimizer = Adam(weight_decay=how.adam_weight_decay).optimizer(
        parameter_groups(loss, Rates(learning_rate, factor=method.learning_rate_factor))
    )
    schedule = get_scheduler("cosine", optimizer, num_warmup_steps=round(WARMUP_SHARE * steps), num_training_steps=steps)
    return Trainable(loss, batches, optimizer, schedule, method=method.training(list(components.values()), steps))


def judged(fitted: Fitted, drawn: SplitImages) -> tuple[dict[str, Any], dict[str, Any]]:
    """What a report says of a method, and what it made of each test image: first its temperature, on validation, then the
    test.
    """
    study = drawn.study
    labels = {part: torch.tensor([one.label for one in getattr(drawn, part)]) for part in ("validation", "test")}
    chosen_on = fitted.logits(drawn.validation)
    temperature = fit_temperature(chosen_on, labels["validation"])
    zero_shot = float(study.clip.logit_scale) * study.features(drawn.validation)[0] @ study.class_features.T
    tested = fitted.logits(drawn.test)
    classes = study.prompts.classes
    plain, calibrated = (score(tested, labels["test"], classes, value) for value in (1.0, temperature))
    found = {
        "temperature": temperature,
        "validation": {
            "top1": top1(chosen_on, labels["validation"]),
            "zero_shot_top1": top1(zero_shot, labels["validation"]),
            "count": len(drawn.validation),
        },
        "test": plain.as_dict(),
        "calibrated": calibrated.as_dict(),
        "new_classes": judged_on_new(fitted, drawn, plain.top1.value) if study.new_prompts else None,
    }
    return found, told_of_test(drawn.test, tested, temperature, classes, study.digests(drawn.test))


def judged_on_new(fitted: Fitted, drawn: SplitImages, base_top1: float) -> dict[str, Any] | None:
    """How well a method names classes that it was never shown, among themselves; None where it cannot."""
    study, images = drawn.study, drawn.new_test
    logits = fitted.new_logits(images)
    if logits is None:
        return None
    labels = torch.tensor([image.label for image in images]) - len(study.prompts.classes)
    zero_shot = float(study.clip.logit_scale) * study.features(images)[0] @ study.new_class_features.T
    found = wilson_interval(int((logits.argmax(dim=1) == labels).sum()), len(labels))
    return {
        "top1": asdict(found),
        "zero_shot_top1": top1(zero_shot, labels),
        "harmonic_mean": harmonic_mean(base_top1, found.value),
        "count": len(labels),
    }


def stored_bytes(folder: Path) -> int:
    """Bytes of the weights in a classifier's folder: of an adapter's smallest layout, or of a predictor."""
    layouts = [path for path in (folder / "adapter").glob("*") if path.is_dir()] or [folder]
    pattern = "*.safetensors" if layouts == [folder] else "**/*.safetensors"
    return min(sum(file.stat().st_size for file in layout.glob(pattern)) for layout in layouts)


def fit_member(
    accelerator: Accelerator, run: RunDirectory, drawn: SplitImages, member: Trial, options: FewShotOptions
) -> tuple[Fitted, dict[str, Any]] | None:
    """Fit a method, judge it and save it; on other processes than the main one, train along and return None.

    Returns: what was fitted, and the member's entry of the report. Its seconds and its peak memory are those of fitting; what
    frozen towers make of the images is there by then.
    """
    if member.method in baselines.BASELINES:
        if not accelerator.is_main_process:
            return None
        task = drawn.task
        began, memory = time.monotonic(), PeakMemory(accelerator.device)
        fitted: Fitted = FittedBaseline(drawn, baselines.fit(member.method, task, member.seed))
    else:
        began, memory = time.monotonic(), PeakMemory(accelerator.device)
        fitted = fit_adapter(accelerator, run, drawn, member, options)
        if not accelerator.is_main_process:
            return None
    cost = {"seconds": round(time.monotonic() - began, 2), "peak_memory": memory.read()}
    (found, tested), folder = judged(fitted, drawn), run.path / member.folder
    fitted.save(folder, classifier_file(drawn.study, member, fitted, found["temperature"], options))
    write_tested(folder, tested)
    return fitted, {
        "shots": member.shots,
        "seed": member.seed,
        "method": member.method,
        "folder": member.folder.as_posix(),
        "split_sha256": drawn.split.sha256,
        "setting": fitted.setting,
        "strength": fitted.strength,
        "guard": fitted.guard,
        "trained_numbers": fitted.trained_numbers,
        "stored_bytes": stored_bytes(folder),
        **cost,
        **found,
    }


def classifier_file(
    study: Experiment, member: Trial, fitted: Fitted, temperature: float, options: FewShotOptions
) -> ClassifierFile:
    """What the classifier's folder says of it."""
    classes = study.prompts.classes
    return ClassifierFile(
        method=member.method,
        model=options.model.model,
        pretrained=options.model.pretrained,
        base_sha256=study.base_sha256,
        classes=classes,
        keys=study.labelled.keys[: len(classes)],
        templates=study.prompts.templates,
        strength=fitted.strength,
        temperature=temperature,
    )
