"""Pictures from prompts."""

from __future__ import annotations

import torch
from diffusers import StableDiffusionXLPipeline
from diffusers.utils import make_image_grid
from PIL import Image

SHEET_PROMPTS = (
    "a large red star in the snow",
    "a large blue circle on the grass",
    "a yellow crescent at night",
    "a large green heart on the beach",
    "a purple ring in the forest",
    "a large white cross on a brick wall",
    "an orange triangle in the water",
    "a large pink diamond on a wooden floor",
    "a large blue striped square in the snow",
    "a red dotted circle on the grass",
    "a large green checkered diamond",
    "a large orange striped star at night",
    "a large white dotted heart in the forest",
    "a yellow checkered square on the beach",
    "a large purple striped ring on a wooden floor",
    "a large black dotted triangle in the snow",
)


def contact_sheet(pipeline: StableDiffusionXLPipeline, prompts: tuple[str, ...], columns: int = 4, steps: int = 25, guidance_scale: float = 4.0, seed: int = 0) -> Image.Image:
    """One picture a prompt in a grid of `columns`, each from its own generator seeded with `seed` plus its place."""
    pipeline.set_progress_bar_config(disable=True)
    generators = [torch.Generator().manual_seed(seed + place) for place in range(len(prompts))]
    pictures = pipeline(list(prompts), num_inference_steps=steps, guidance_scale=guidance_scale, generator=generators).images
    return make_image_grid(pictures, rows=-(-len(prompts) // columns), cols=columns)
