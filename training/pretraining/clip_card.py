"""The model card of the built-in CLIP, with the figures of the training that it came from."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from pipelines.mini_clip_scores import ZeroShotScores

CARD = """---
library_name: open_clip
pipeline_tag: zero-shot-image-classification
license: other
license_name: imagenet-terms
license_link: https://www.image-net.org/download.php
---

# mini-clip

A real open_clip model for images of 64 x 64 pixels, trained from scratch and small enough for a CPU. It is the default
model of NoRA Vision's classifier, its tests and its demonstrations. It has {parameters:,} parameters,
{image_parameters:,} of them in the image tower: timm's MaxViT with convolutions down to 8 x 8 positions and three
attention layers. The tokenizer is CLIP's, reduced to {vocabulary:,} tokens, and can still encode any word.

Plain open_clip loads it, from the root of a checkout:

```python
model, _, preprocess = open_clip.create_model_and_transforms("local-dir:assets/mini-clip")
tokenizer = open_clip.get_tokenizer("local-dir:assets/mini-clip")
```

## What it was trained on

- {photos:,} photographs of {classes} classes of Tiny ImageNet, contrasted with the names of all classes in several templates.
  **ImageNet's terms apply to these weights: non-commercial research and education only.**
- {scenes:,} rendered scenes (`pipelines/scenes.py`), contrasted with captions that describe a part of them, such as "a red star"
  or "a thing in the snow", and with captions in which one word is wrong. {share:.0%} of each batch are scenes.
{note}
## How long

{steps:,} steps of {batch} images ({images:,} images seen), AdamW with a peak learning rate of {rate:g} that falls to zero over
the last {decay:.0%} of the steps, label smoothing 0.1, {precision}. Images are shifted, and photographs also zoomed, rotated and
changed in brightness and colour. CutMix joins photographs of two classes in {cutmix:.0%} of the batches.

The command also trains it on other images: `IMAGES` is a folder with zips of `<class id>/<image>` and a `classes.json`
that names the classes.

```bash
{command}
```

## How well

Measured on the weights in this folder, in half precision.

| what | accuracy | chance |
|---|---|---|
| class of {held_out_photos:,} held-out photographs, a tenth of every class | {held_out:.1%} | {held_out_chance:.1%} |
{zero_shot}

## What it cannot do

- Anything that needs more than 64 x 64 pixels.
- Words other than its class names and those of its scenes: they are split into tokens that it was hardly trained on.
  Your own classes need training images; their names are not enough.
"""

ASKED = {"kind": "object in a rendered scene", "colour": "colour of the object", "background": "background of the scene"}


@dataclass(frozen=True)
class ClipFacts:
    """The figures that the card of the built-in CLIP states; most fill the placeholder of their name in `CARD`."""

    parameters: int
    image_parameters: int
    vocabulary: int
    photos: int
    held_out_photos: int
    classes: int
    scenes: int
    share: float
    steps: int
    batch: int
    images: int
    rate: float
    decay: float
    cutmix: float
    precision: str
    held_out: float
    zero_shot: dict[str, ZeroShotScores]
    note: str

    def placeholders(self) -> dict[str, object]:
        """What fills `CARD`."""
        rows = [
            f"| {ASKED[part]}, in scenes not trained on | {one.accuracy:.1%} | {one.chance:.1%} |"
            for part, one in self.zero_shot.items()
        ]
        command = (
            "accelerate launch training/pretrain_mini.py --images_dir IMAGES --output_dir OUT \\\n"
            f"  --stages clip export_clip --clip_steps {self.steps} --mixed_precision {self.precision} \\\n"
            f"  --clip_decay_share {self.decay:g} --clip_cutmix {self.cutmix:g}"
        )
        return vars(self) | {
            "precision": f"mixed precision {self.precision}" if self.precision != "no" else "single precision",
            "zero_shot": "\n".join(rows),
            "held_out_chance": 1 / self.classes,
            "command": command,
            "note": f"\n{self.note}\n" if self.note else "",
        }


def write_clip_card(folder: Path, facts: ClipFacts) -> None:
    """Write README.md of the model in `folder`."""
    (folder / "README.md").write_text(CARD.format(**facts.placeholders()), encoding="utf-8")
