"""Generate images with stock diffusers and the exported files only, as a user without this project does.

    python stock_check.py REQUEST.json

A separate program that is never imported. It blocks the packages of this project, so an adapter that needs them fails here.
`training.subject.certificate` writes the request and reads the images.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

BLOCKED = ("nora_vision", "pipelines", "training")
# None in sys.modules makes every import of the name fail.
sys.modules.update(dict.fromkeys(BLOCKED))

import diffusers  # noqa: E402
import torch  # noqa: E402
from diffusers import AutoencoderKL, StableDiffusionXLPipeline  # noqa: E402
from safetensors.torch import save_file  # noqa: E402


def load(request: dict[str, Any]) -> StableDiffusionXLPipeline:
    """Load the base model of the request with diffusers."""
    model, dtype = request["model"], getattr(torch, request["dtype"])
    arguments = {"add_watermarker": False}
    if model["vae"] is not None:
        arguments["vae"] = AutoencoderKL.from_pretrained(model["vae"], torch_dtype=dtype, use_safetensors=True)
    if Path(model["name"]).is_file():
        arguments |= {} if model["config"] is None else {"config": model["config"]}
        pipeline = StableDiffusionXLPipeline.from_single_file(model["name"], torch_dtype=dtype, **arguments)
    else:
        arguments |= {"use_safetensors": True, "variant": model["variant"], "revision": model["revision"]}
        pipeline = StableDiffusionXLPipeline.from_pretrained(model["name"], torch_dtype=dtype, **arguments)
    if model["scheduler_class"] is not None:
        pipeline.scheduler = getattr(diffusers, model["scheduler_class"])(**model["scheduler"])
    elif model["scheduler"]:
        pipeline.scheduler = type(pipeline.scheduler).from_config(pipeline.scheduler.config, **model["scheduler"])
    pipeline.set_progress_bar_config(disable=True)
    return pipeline.to(request["device"])


def generate(pipeline: StableDiffusionXLPipeline, request: dict[str, Any]) -> torch.Tensor:
    """The images of the request: (prompts, height, width, 3) float32 in [0, 1]."""
    images = []
    for prompt, seed in zip(request["prompts"], request["seeds"], strict=True):
        image = pipeline(prompt, generator=torch.Generator().manual_seed(seed), output_type="np", **request["sampling"])
        images.append(torch.from_numpy(image.images[0]).float())
    return torch.stack(images)


def main(request: dict[str, Any]) -> None:
    """Generate with the base model and with each file; write all images to the file named in the request."""
    pipeline = load(request)
    images = {"base": generate(pipeline, request)}
    for name, file in request["files"].items():
        pipeline.load_lora_weights(str(Path(file).parent), weight_name=Path(file).name)
        images[name] = generate(pipeline, request)
        pipeline.unload_lora_weights()
    save_file(images, request["images"])


if __name__ == "__main__":
    main(json.loads(Path(sys.argv[1]).read_text(encoding="utf-8")))
