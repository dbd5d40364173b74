"""An adapter's file in other programs: Python code for diffusers, and a workflow for ComfyUI. Imports no model library."""

from __future__ import annotations

from typing import Any

from pipelines.built_in import is_built_in, portable_name
from pipelines.subject.generation_request import SAMPLERS, GenerationRequest

# ComfyUI's sampler and scheduler for each of `SAMPLERS`.
COMFYUI_SAMPLERS = {
    "Euler": ("euler", "normal"),
    "Euler a": ("euler_ancestral", "normal"),
    "DPM++ 2M": ("dpmpp_2m", "normal"),
    "DPM++ 2M Karras": ("dpmpp_2m", "karras"),
    "DPM++ 2M SDE Karras": ("dpmpp_2m_sde", "karras"),
    "UniPC": ("uni_pc", "normal"),
    "DDIM": ("ddim", "ddim_uniform"),
}
SDXL = "stabilityai/stable-diffusion-xl-base-1.0"
# The names under which models of the hub are usually saved as one file.
CHECKPOINTS = {SDXL: "sd_xl_base_1.0.safetensors"}
SDXL_SIDE = 1024


def python_code(request: GenerationRequest, file: str, is_native: bool) -> str:
    """Code that generates the request's first image with an adapter's file in the working directory.

    Args:
        file: the LoRA file, or for `is_native` the folder of an adapter in this project's own format.
    """
    model, built_in = _model_lines(request)
    weight = request.adapters[0].scale if request.adapters else 1.0
    load = f"load_adapter(pipe, {file!r}, 'subject')"
    if not is_native:
        load = f"pipe.load_lora_weights('.', weight_name={file!r}, adapter_name='subject')"
    imports = ["from pipelines.built_in import BUILT_IN_MODEL"] * built_in
    imports += ["from pipelines.subject.adapters import load_adapter"] * is_native
    lines = ["import torch", "import diffusers", *imports, "", *model]
    lines += [load, f"pipe.set_adapters('subject', {weight:g})", *_scheduler_lines(request), *_call_lines(request)]
    return "\n".join([*lines, "image.save('image.png')", ""])


def _model_lines(request: GenerationRequest) -> tuple[list[str], bool]:
    source = request.source
    name = source.pretrained_model_name_or_path
    if is_built_in(name):
        # The built-in weights are stored in half precision, and the adapter in single precision.
        return ["pipe = diffusers.StableDiffusionXLPipeline.from_pretrained(BUILT_IN_MODEL, torch_dtype=torch.float32)"], True
    loader = "from_single_file" if name.endswith(".safetensors") else "from_pretrained"
    given = {"revision": source.revision, "variant": source.variant}
    more = "".join(f", {key}={value!r}" for key, value in given.items() if value is not None)
    arguments = f"{portable_name(name)!r}, torch_dtype=torch.float16{more}"
    return [f"pipe = diffusers.StableDiffusionXLPipeline.{loader}({arguments}).to('cuda')"], False


def _scheduler_lines(request: GenerationRequest) -> list[str]:
    source = request.source
    kind, changes = SAMPLERS.get(request.sampler or "", ("", {}))
    trained = {"prediction_type": source.prediction_type, "rescale_betas_zero_snr": source.rescale_betas_zero_snr}
    changes = {**{name: value for name, value in trained.items() if value is not None}, **changes}
    if not kind and not changes:
        return []
    arguments = "".join(f", {name}={value!r}" for name, value in changes.items())
    sampler = f"diffusers.{kind}" if kind else "type(pipe.scheduler)"
    return [f"pipe.scheduler = {sampler}.from_config(pipe.scheduler.config{arguments})"]


def _call_lines(request: GenerationRequest) -> list[str]:
    width, height = request.size or (None, None)
    given = {
        "negative_prompt": request.negative_prompt or None,
        "num_inference_steps": request.steps,
        "guidance_scale": request.guidance_scale,
        "width": width,
        "height": height,
    }
    arguments = [f"    {name}={value!r}," for name, value in given.items() if value is not None]
    generator = f"    generator=torch.Generator().manual_seed({request.seed}),"
    return ["image = pipe(", f"    {request.prompt!r},", *arguments, generator, ").images[0]"]


def comfyui_workflow(request: GenerationRequest, file: str) -> dict[str, Any]:
    """A workflow in ComfyUI's API format, which its window opens, that generates with a LoRA file in `models/loras`."""
    model = request.source.pretrained_model_name_or_path
    name = CHECKPOINTS.get(model, f"{portable_name(model).rpartition('/')[2].removesuffix('.safetensors')}.safetensors")
    sampler, scheduler = COMFYUI_SAMPLERS[request.sampler or "Euler"]
    width, height = request.size or (SDXL_SIDE, SDXL_SIDE)
    weight = request.adapters[0].scale if request.adapters else 1.0
    lora = {"lora_name": file, "strength_model": weight, "strength_clip": weight}
    sampling = {"seed": request.seed, "steps": request.steps, "cfg": request.guidance_scale, "denoise": 1.0}
    inputs = {"model": ["2", 0], "positive": ["3", 0], "negative": ["4", 0], "latent_image": ["5", 0]}
    nodes: list[tuple[str, dict[str, Any]]] = [
        ("CheckpointLoaderSimple", {"ckpt_name": name}),
        ("LoraLoader", {"model": ["1", 0], "clip": ["1", 1], **lora}),
        ("CLIPTextEncode", {"clip": ["2", 1], "text": request.prompt}),
        ("CLIPTextEncode", {"clip": ["2", 1], "text": request.negative_prompt}),
        ("EmptyLatentImage", {"width": width, "height": height, "batch_size": 1}),
        ("KSampler", {**inputs, **sampling, "sampler_name": sampler, "scheduler": scheduler}),
        ("VAEDecode", {"samples": ["6", 0], "vae": ["1", 2]}),
        ("SaveImage", {"images": ["7", 0], "filename_prefix": file.removesuffix(".safetensors")}),
    ]
    return {str(number): {"class_type": kind, "inputs": values} for number, (kind, values) in enumerate(nodes, 1)}
