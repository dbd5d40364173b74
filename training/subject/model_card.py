"""The model card of a run: the training, its results, and how to use the adapter."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from huggingface_hub import ModelCardData

from nora_vision.approximation import LeftOut
from pipelines.built_in import BASE_SCORER, BUILT_IN_CLIP_NAME, is_built_in, portable_name
from pipelines.methods import method_named, title_of
from pipelines.quantization import EXPORT_NOTE, losses_of
from pipelines.subject.embedders import OPEN_CLIP
from pipelines.subject.prediction import Prediction
from pipelines.text_files import write_text_atomically
from training.options import NEW_SCENES, SubjectOptions
from training.runs.card_text import CARD, as_text
from training.runs.run import RunDirectory
from training.runs.run_files import COPY_THRESHOLD, Certificate, Suggestion
from training.runs.subject_files import SubjectEvaluation

GRID = "before_after.png"
EXPORTED = ("adapter", "diffusers", "kohya", "suggested")
TAGS = ("stable-diffusion-xl", "stable-diffusion-xl-diffusers", "text-to-image", "diffusers", "lora", "dreambooth")
SCORES = """Scores of the samples by {scorer}: the mean similarity to the training images and to the prompts, the highest
similarity to a single training image (a copy from {limit:.3f} on), and the highest correlation of a thumbnail with one (a copy
from {threshold:.2f} on). They can be compared within this table only.

| step | subject | prompt | nearest image | thumbnail | validation loss |
|---|---|---|---|---|---|
{rows}"""
IMPORTS = "from diffusers import StableDiffusionXLPipeline"
BUILT_IN_IMPORTS = f"import torch\n{IMPORTS}\n\nfrom pipelines.built_in import model_path"
NATIVE_IMPORTS = "from pipelines.subject.adapters import load_adapter"
NATIVE_LOAD = """load_adapter(pipe, "adapter/full", "subject")
pipe.set_adapters("subject")"""
BODY = """---
{header}
---
# {title}

{method} adapter of `{model}`: {steps} steps of {batch} images on {images} images of the subject, learning rate {rate},
{trained:,} trainable parameters, {seconds:.0f} seconds.{options}

{grid}{findings}
| files | bytes |
|---|---|
{files}

```python
{imports}

pipe = StableDiffusionXLPipeline.{loader}({arguments})
{scheduler}{load}
pipe({prompt_literal}).images[0]
```
"""


def write_model_card(run: RunDirectory, options: SubjectOptions, images: int) -> None:
    """Write README.md into the directory of a finished run that trained on `images` images."""
    write_text_atomically(run.path / CARD, model_card(run, options, images))


def model_card(run: RunDirectory, options: SubjectOptions, images: int, private: bool = False) -> str:
    """The card as Markdown with a YAML header.

    Args:
        private: without prompts and names of local files.
    """
    status, optimisation = run.status(), options.optimisation
    findings = _findings(run, scorer_name(options.validation.image_scorer, private))
    findings += _precision(status.quantization_errors) + _compatibility(options)
    model = portable_name(options.model.pretrained_model_name_or_path, private)
    prompt = "the subject" if private else options.data.subject_prompts()[0]
    subject_note = "" if private else ", the subject above them"
    alt = f"images from the base model and from the adapted model, for the same prompts and seeds{subject_note}"
    return BODY.format(
        header=card_header(options, private).to_yaml().strip(),
        title="An adapter for one subject" if private else as_text(prompt),
        method=title_of(options.adapter.method),
        model=as_text(model) if "`" in model else model,
        steps=optimisation.max_train_steps,
        batch=optimisation.train_batch_size * optimisation.gradient_accumulation_steps,
        images=images,
        rate=f"{optimisation.learning_rate:g}",
        trained=status.num_trainable_parameters,
        seconds=status.seconds,
        options="" if private else " The resolved options are in options.json.",
        grid=f"![{alt}]({GRID})\n" if options.output.validation_images else "",
        findings="".join(f"\n{finding}\n" for finding in findings),
        files="\n".join(f"| {as_text(name)} | {size:,} |" for name, size in _exported_files(run)),
        **_loading_code(options, model, has_exports(run)),
        prompt_literal=json.dumps(f"{prompt} {NEW_SCENES[0]}", ensure_ascii=False),
    )


def has_exports(run: RunDirectory) -> bool:
    """Whether the adapter was exported as LoRA, which it can be if it is a change of weights."""
    return (run.path / "diffusers").is_dir()


def _loading_code(options: SubjectOptions, model: str, exported: bool) -> dict[str, str]:
    """The parts of the card's code that load the base model, called `model` in the card, and the adapter, if not `exported`
    from its native files."""
    built_in = is_built_in(options.model.pretrained_model_name_or_path)
    imports, load = BUILT_IN_IMPORTS if built_in else IMPORTS, 'pipe.load_lora_weights("diffusers")'
    if not exported:
        imports, load = f"{imports}\n\n{NATIVE_IMPORTS}", NATIVE_LOAD
    return {
        "load": load,
        "loader": "from_single_file" if model.endswith(".safetensors") else "from_pretrained",
        "imports": imports,
        # The built-in weights are stored in half precision, and the adapter in single precision.
        "arguments": f"model_path({json.dumps(model)}), torch_dtype=torch.float32" if built_in else json.dumps(model),
        "scheduler": _scheduler_lines(options.model.prediction()),
    }


def _scheduler_lines(prediction: Prediction) -> str:
    """The code that sets the scheduler for `prediction`; empty if diffusers' loader sets it."""
    given = prediction.scheduler_arguments()
    written = {name: json.dumps(value) if isinstance(value, str) else value for name, value in given.items()}
    arguments = ", ".join(f"{name}={value}" for name, value in written.items())
    if not arguments:
        return ""
    if (kind := prediction.scheduler_class) is not None:
        return f"from diffusers import {kind}\n\npipe.scheduler = {kind}({arguments})\n"
    return f"pipe.scheduler = type(pipe.scheduler).from_config(pipe.scheduler.config, {arguments})\n"


def card_header(options: SubjectOptions, private: bool = False) -> ModelCardData:
    """The metadata of the card for the hub; huggingface_hub escapes prompts."""
    fields: dict[str, Any] = {"tags": [*TAGS, options.adapter.method], "library_name": "diffusers"}
    fields |= {"pipeline_tag": "text-to-image"}
    model = options.model.pretrained_model_name_or_path
    if not Path(model).exists() and not is_built_in(model):
        fields["base_model"] = model
    if not private:
        prompt = options.data.subject_prompts()[0]
        fields["instance_prompt"] = prompt
        if options.output.validation_images:
            fields["widget"] = [{"text": prompt, "output": {"url": GRID}}]
    return ModelCardData(**fields)


def scorer_name(name: str, private: bool = False) -> str:
    """The image scorer, without its path and, if `private`, without its name."""
    if name in (BASE_SCORER, BUILT_IN_CLIP_NAME):
        return "the base model itself" if name == BASE_SCORER else "the built-in CLIP"
    if private:
        return "a CLIP or DINOv2 model"
    library, _, weights = name.partition("/") if name.startswith(OPEN_CLIP) else ("", "", name)
    return as_text("/".join(part for part in (library, portable_name(weights)) if part))


def _findings(run: RunDirectory, scorer: str) -> list[str]:
    """The results of the run: validation losses, recommended step, warnings, scores by `scorer`, certificate."""
    lines = []
    losses = [logged.values["heldout_loss"] for logged in run.metrics() if "heldout_loss" in logged.values]
    if losses:
        before, after = losses[0], losses[-1]
        lines.append(f"Mean denoising loss in the middle of the held-out image: {before:.4f} before training, {after:.4f} after.")
    if suggestion := Suggestion.read(run.path):
        lines += _recommendation(suggestion, scorer)
    if evaluation := SubjectEvaluation.read(run.path):
        lines.append(f"Images of the last step in new scenes, scored by {scorer}. {evaluation.summary}")
    lines += _left_out(run)
    if certificate := Certificate.read(run.path):
        lines.append(_certified(certificate))
    return lines


def _left_out(run: RunDirectory) -> list[str]:
    """A sentence for each exported file that does not hold the whole weight change."""
    return [
        f"> **{as_text(name)} is not exact:** {left_out}. `adapter/` holds the whole adapter."
        for name, _ in _exported_files(run)
        if not name.startswith("adapter/") and (left_out := LeftOut.read(run.path / name)) is not None
    ]


def _recommendation(suggestion: Suggestion, scorer: str) -> list[str]:
    """The recommended step, warnings and scores."""
    lines = []
    if suggestion.curve or suggestion.scores:
        lines.append(f"**Recommended: step {suggestion.step} of {suggestion.last}.** {suggestion.why}")
        lines += [f"> **Warning.** {warning}" for warning in suggestion.warnings]
    if suggestion.scores:
        lines.append(_scores_table(suggestion, scorer))
    return lines


def _certified(certificate: Certificate) -> str:
    """The result of the certificate as a sentence."""
    converted = " The kohya file was converted to diffusers' format first." if certificate.converted else ""
    largest = max(certificate.largest_difference.values())
    if not certificate.exact:
        return _certified_approximation(certificate) + converted
    return (
        "Certified: stock diffusers, without this project, generates the same images from the diffusers and the kohya file, with "
        f"differences of at most {largest:.2f} of 255 levels. The adapter changes images by up to {certificate.effect:.0f}."
        f"{converted}"
    )


def _certified_approximation(certificate: Certificate) -> str:
    """The same if some files hold an approximation."""
    names = certificate.approximate or list(certificate.mean_difference)
    differences = " and ".join(f"by {certificate.mean_difference[name]:.1f} of 255 levels ({name})" for name in names)
    return (
        "Stock diffusers, without this project, reads the diffusers and the kohya file as this project does. Approximations: "
        f"{' and '.join(names)}. On average, their images differ {differences} from those of the native file, and by "
        f"{certificate.mean_effect:.1f} from those of the base model."
    )


def _precision(errors: dict[str, float] | None) -> list[str]:
    """What training on a quantised model means for the exports."""
    return [] if not errors else [f"{losses_of(errors)} {EXPORT_NOTE}"]


def _compatibility(options: SubjectOptions) -> list[str]:
    """The method's note on how other programs read the exported files."""
    note = method_named(options.adapter.method).export_note
    return [] if note is None else [note]


def _scores_table(suggestion: Suggestion, scorer: str) -> str:
    """The scores of the samples and the validation loss by step, as a Markdown table."""
    scores = suggestion.scores
    heldout = {point.step: f"{point.heldout:.4f}" for point in suggestion.curve}
    names = {0: "base model", suggestion.step: f"**{suggestion.step}, recommended**"}
    rows = [
        f"| {names.get(step, step)} | {each.subject:.3f} | {each.prompt:.3f} | {each.nearest:.3f} | {each.copy:.2f} "
        f"| {heldout.get(step, '')} |"
        for step, each in sorted(scores.items())
    ]
    limit = next(iter(scores.values())).nearest_limit
    return SCORES.format(scorer=scorer, limit=limit, threshold=COPY_THRESHOLD, rows="\n".join(rows))


def _exported_files(run: RunDirectory) -> list[tuple[str, int]]:
    """Name and bytes of every exported file of weights."""
    paths = sorted(path for folder in EXPORTED for path in (run.path / folder).rglob("*.safetensors"))
    return [(path.relative_to(run.path).as_posix(), path.stat().st_size) for path in paths]
