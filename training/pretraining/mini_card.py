"""The model card of the built-in model, with the figures of the training that it came from."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

CARD = """---
library_name: diffusers
pipeline_tag: text-to-image
license: other
license_name: imagenet-terms
license_link: https://www.image-net.org/download.php
---

# mini-sdxl

A real `StableDiffusionXLPipeline` of 64 x 64 pixel images, trained from nothing, small enough for a CPU: the default model of
NoRA Vision, its tests and its demonstrations. It speaks SDXL's code path (two CLIP text encoders, `text_time` conditioning,
`AutoencoderKL`), so that what works here works with SDXL by another `--pretrained_model_name_or_path`.

| part | parameters |
|---|---|
{parameters}

## What it was trained on

- {scenes:,} rendered scenes (`pipelines/scenes.py`): {shapes}, letters and digits, and toy figures, in {colours} colours,
  {patterns} patterns and three sizes, in {num_backgrounds} backgrounds. Captions such as "a large red striped star in the snow".
- {photos:,} photographs of Tiny ImageNet, 200 classes, captions such as "a photo of a teapot".
  **ImageNet's terms go with these weights: non-commercial research and education only.**

{share:.0%} of each batch are scenes, at most half for the autoencoder. One caption in ten is dropped.
{note}

## How long

- Autoencoder: {vae_steps:,} steps of {vae_batch} images. Its latent space is a closed form, the first 8 principal components
  of 4 x 4 patches (`PatchBasis`); the encoder learns it, the decoder learns to restore images from it.
- UNet and text encoders together: {unet_steps:,} steps of {unet_batch} images ({unet_images:,} images seen), AdamW with a
  peak rate of {rate:g} that falls to zero in the last steps, v-prediction down to zero signal, min-SNR weighting, {precision}.

The command:

```bash
{command}
```

## What it cannot do

- Anything larger than 64 x 64 pixels.
- Photographs: class names of Tiny ImageNet give the right colours and textures, seldom the form. That is enough of a prior to
  learn a photographed subject by, not to draw one unasked.
- Words outside its scenes and classes: they are spelled in pieces it has never seen. Counting, and two things side by side.
- A prompt is cut after {tokens} tokens.
"""


@dataclass(frozen=True)
class CardFacts:
    """The figures that the card of the built-in model states; each field fills the placeholder of its name in `CARD`."""

    parameters: str
    scenes: int
    photos: int
    shapes: str
    colours: int
    patterns: int
    num_backgrounds: int
    share: float
    vae_steps: int
    vae_batch: int
    unet_steps: int
    unet_batch: int
    unet_images: int
    rate: float
    precision: str
    command: str
    note: str
    tokens: int


def write_card(folder: Path, facts: CardFacts) -> None:
    """Write README.md of the model in `folder`."""
    (folder / "README.md").write_text(CARD.format(**vars(facts)), encoding="utf-8")
