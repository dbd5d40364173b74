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

A real `StableDiffusionXLPipeline` for images of 64 x 64 pixels, trained from scratch and small enough for a CPU. It is
the default model of NoRA Vision, its tests and its demonstrations. It has SDXL's parts (two CLIP text encoders,
`text_time` conditioning, `AutoencoderKL`) and uses the same code, so a command for it works with SDXL after changing
`--pretrained_model_name_or_path`.

| part | parameters |
|---|---|
{parameters}

## What it was trained on

- {scenes:,} rendered scenes (`pipelines/scenes.py`): {shapes}, letters and digits, and toy figures, in {colours} colours,
  {patterns} patterns and three sizes, in {num_backgrounds} backgrounds. Captions such as "a large red striped star in the snow".
- {photos:,} photographs of Tiny ImageNet, 200 classes, captions such as "a photo of a teapot".
  **ImageNet's terms apply to these weights: non-commercial research and education only.**

{share:.0%} of each batch are scenes, at most half for the autoencoder. One caption in ten is dropped.
{note}

## How long

- Autoencoder: {vae_steps:,} steps of {vae_batch} images. Its latent space is fixed: the first 8 principal components of
  4 x 4 patches (`PatchBasis`). The encoder learns to compute them, and the decoder to restore images from them.
- UNet and text encoders together: {unet_steps:,} steps of {unet_batch} images ({unet_images:,} images seen), AdamW with
  a peak learning rate of {rate:g} that falls to zero in the last steps, v-prediction down to zero signal, min-SNR
  weighting, {precision}.

The command:

```bash
{command}
```

## What it cannot do

- Anything larger than 64 x 64 pixels.
- Photographs: class names of Tiny ImageNet give the right colours and textures, but seldom the right shape. This is
  enough to learn a photographed subject, but not to generate one without an adapter.
- Words outside its scenes and classes: they are split into tokens that it was not trained on.
- Counting, and two objects side by side.
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
