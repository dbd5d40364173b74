"""The model card of a run: what was trained, on what, with what result, and how to use it."""

from __future__ import annotations

from pathlib import Path

from training.options import SubjectOptions
from training.run import RunDirectory, write_text_atomically

GRID = "before_after.png"

CARD = """---
base_model: {model}
tags: [stable-diffusion-xl, text-to-image, diffusers, lora, {method}, dreambooth]
instance_prompt: "{prompt}"
---
# {prompt}

A {method} adapter of `{model}`: {steps} steps of {batch} pictures on {pictures} pictures of the subject, learning rate {rate},
{trained:,} trained numbers, {seconds:.0f} seconds. The resolved options are in options.json.

![the subject, the base model's pictures and the adapted model's, for the same prompts and seeds]({grid})
{heldout}
| files | bytes |
|---|---|
{files}

```python
from diffusers import StableDiffusionXLPipeline

pipe = StableDiffusionXLPipeline.from_pretrained("{model}")
pipe.load_lora_weights("diffusers")
pipe("{prompt} in the snow").images[0]
```
"""


def write_model_card(run: RunDirectory, options: SubjectOptions, pictures: int) -> None:
    """Write README.md into the directory of a finished run that trained on `pictures` pictures."""
    status = run.status()
    losses = [line["heldout_loss"] for line in run.metrics() if "heldout_loss" in line]
    heldout = (
        f"\nMean denoising loss on the held-out picture: {losses[0]:.4f} before, {losses[-1]:.4f} after.\n" if losses else ""
    )
    files = sorted(path for folder in ("adapter", "diffusers", "kohya") for path in (run.path / folder).rglob("*.safetensors"))
    text = CARD.format(
        model=_portable_name(options.model.pretrained_model_name_or_path),
        method=options.adapter.method,
        prompt=options.data.instance_prompt,
        steps=options.optimisation.max_train_steps,
        batch=options.optimisation.train_batch_size * options.optimisation.gradient_accumulation_steps,
        pictures=pictures,
        rate=options.optimisation.learning_rate,
        trained=status["trained_numbers"],
        seconds=status["seconds"],
        grid=GRID,
        heldout=heldout,
        files="\n".join(f"| {path.relative_to(run.path)} | {path.stat().st_size:,} |" for path in files),
    )
    write_text_atomically(run.path / "README.md", text)


def _portable_name(model: str) -> str:
    """A folder's own name, without where it lies; a hub name as it is."""
    return Path(model).name if Path(model).is_dir() else model
