"""The compatibility certificate: stock diffusers, in a process without this project, generates the same images."""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from diffusers import StableDiffusionXLPipeline
from safetensors.torch import load_file

from nora_vision import export_lora
from nora_vision.approximation import LeftOut
from nora_vision.files import read_header
from nora_vision.lycoris import PARTS
from pipelines.hub import offline_environment
from pipelines.subject.generate import Sampling
from pipelines.subject.lora_files import load_lora_file
from training.runs.run_files import Certificate
from training.subject.kohya_lint import lint_kohya

STOCK_PROGRAM = Path(__file__).parent / "stock_check.py"
LEVELS = 255
# In float32: the largest difference of 8-bit images, in levels.
LARGEST_DIFFERENCE = 1.0
# In half precision, where both sides round differently: the mean difference as a share of the adapter's mean effect.
LARGEST_SHARE = 0.25

# The name under which an exported file is loaded.
LOADED = "exported_file"


class CertificateError(RuntimeError):
    """The exported files differ from the trained adapter."""


@dataclass(frozen=True)
class StockModel:
    """How stock diffusers loads the base model.

    Args:
        name: a hub name, a folder or a single .safetensors file.
        variant, revision: as in `from_pretrained`.
        vae: name or folder of another VAE.
        config: folder with the configurations of a single file.
        scheduler_class: name of a diffusers scheduler that replaces the model's; None to keep it.
        scheduler: arguments of the scheduler besides its configuration.
    """

    name: str
    variant: str | None = None
    revision: str | None = None
    vae: str | None = None
    config: str | None = None
    scheduler_class: str | None = None
    scheduler: dict[str, Any] = field(default_factory=dict)


def certify(
    pipeline: StableDiffusionXLPipeline,
    folder: Path,
    model: StockModel,
    prompts: Sequence[str],
    sampling: Sampling,
    seed: int = 0,
    exact: bool = True,
) -> Certificate:
    """Compare `pipeline`, with the trained adapter, with a stock pipeline that loads the diffusers and kohya files in `folder`.

    Without `exact`, all exported files are approximations.
    The result is written to certificate.json in `folder` in any case. diffusers ignores `dora_scale` in the kohya file of a DoRA,
    and does not know the forms of LyCORIS, so such a file is first loaded by this project and converted to diffusers' format. A
    file that holds an approximation is compared with itself, as this project loads it, and the certificate says how much its
    images differ from the adapter's.

    Raises: CertificateError naming what failed: images that differ, an adapter without effect, a file that stock diffusers
        cannot load, or a kohya file that A1111 or ComfyUI would misread.
    """
    files = {format: exported_file(folder / format) for format in ("diffusers", "kohya")}
    converted = [name for name, file in files.items() if not _is_read_by_diffusers(file)]
    settings, seeds = _call_arguments(sampling), list(range(seed, seed + len(prompts)))
    native = _generate(pipeline, prompts, seeds, settings)
    approximate = [name for name, file in files.items() if not exact or LeftOut.read(file) is not None]
    references = {name: _generate_with_file(pipeline, files[name], prompts, seeds, settings) for name in approximate}
    with tempfile.TemporaryDirectory() as temporary:
        images = {name: str(file) for name, file in files.items()}
        images |= {name: str(_in_diffusers_form(pipeline, files[name], Path(temporary) / name)) for name in converted}
        stock, dtype, device = _generate_with_stock(pipeline, model, images, prompts, seeds, settings)
    certificate = _compare(native, stock, lint_kohya(files["kohya"]), list(prompts), settings, dtype, device, references)
    certificate = replace(certificate, converted=converted, exact=not approximate, approximate=approximate)
    certificate.write(folder)
    if not certificate.passed:
        raise CertificateError(
            f"The exported files differ from the trained adapter: {'; '.join(certificate.problems)}. "
            f"See {str(folder / Certificate.NAME)!r}."
        )
    return certificate


def _generate_with_stock(
    pipeline: StableDiffusionXLPipeline,
    model: StockModel,
    files: dict[str, str],
    prompts: Sequence[str],
    seeds: Sequence[int],
    settings: dict[str, Any],
) -> tuple[dict[str, torch.Tensor], str, str]:
    """Stock diffusers' images (prompts, height, width, 3) of "base" and each file, and the dtype and device of `pipeline`."""
    dtype, device = str(pipeline.unet.dtype).removeprefix("torch."), str(pipeline.device)
    if pipeline.device.type != "cpu":
        # Few GPUs have memory for two SDXL models, and the trained one is no longer needed.
        pipeline.to("cpu")
        torch.cuda.empty_cache()
    request = {"model": asdict(model), "dtype": dtype, "device": device, "prompts": list(prompts), "seeds": list(seeds)}
    return _stock_images({**request, "sampling": settings, "files": files}), dtype, device


def _in_diffusers_form(pipeline: StableDiffusionXLPipeline, file: Path, folder: Path) -> Path:
    """Convert a kohya file to diffusers' format; the pipeline keeps its active adapters."""
    with _using_file(pipeline, file):
        return export_lora(pipeline, folder, LOADED, format="diffusers")


def _generate_with_file(
    pipeline: StableDiffusionXLPipeline, file: Path, prompts: Sequence[str], seeds: Sequence[int], settings: dict[str, Any]
) -> torch.Tensor:
    """The images, as of `_generate`, with the adapter in `file` in place of the active ones."""
    with _using_file(pipeline, file):
        return _generate(pipeline, prompts, seeds, settings)


@contextmanager
def _using_file(pipeline: StableDiffusionXLPipeline, file: Path) -> Iterator[None]:
    """A context in which the only active adapter of the pipeline is the one in `file`, called `LOADED`."""
    active = pipeline.get_active_adapters()
    load_lora_file(pipeline, file, LOADED)
    try:
        pipeline.set_adapters([LOADED])
        yield
    finally:
        pipeline.set_adapters(active)
        pipeline.delete_adapters([LOADED])


def exported_file(folder: Path) -> Path:
    """The only .safetensors file in `folder`.

    Raises: CertificateError if there is none, or more than one.
    """
    files = sorted(folder.glob("*.safetensors"))
    if len(files) != 1:
        raise CertificateError(
            f"{str(folder)!r} must hold one exported .safetensors file, got {len(files)}. Export the adapter again."
        )
    return files[0]


def _is_read_by_diffusers(file: Path) -> bool:
    """Whether stock diffusers reads all of `file`: it ignores `dora_scale` in kohya's format, and knows no form of LyCORIS."""
    parts = {name.partition(".")[2] for name in read_header(file).tensors}
    return not parts & {"dora_scale", *(part for of_form in PARTS.values() for part in of_form)}


def _call_arguments(sampling: Sampling) -> dict[str, Any]:
    """`sampling` as arguments of a stock pipeline."""
    return {
        "num_inference_steps": sampling.num_inference_steps,
        "guidance_scale": sampling.guidance_scale,
        "negative_prompt": sampling.negative_prompt or None,
        "height": sampling.resolution,
        "width": sampling.resolution,
    }


@torch.no_grad()
def _generate(
    pipeline: StableDiffusionXLPipeline, prompts: Sequence[str], seeds: Sequence[int], settings: dict[str, Any]
) -> torch.Tensor:
    """Images (prompts, height, width, 3) in [0, 1], generated one at a time, as in the stock process."""
    for component in (pipeline.unet, pipeline.text_encoder, pipeline.text_encoder_2):
        component.eval()
    images = [
        pipeline(prompt, generator=torch.Generator().manual_seed(seed), output_type="np", **settings).images[0]
        for prompt, seed in zip(prompts, seeds, strict=True)
    ]
    return torch.stack([torch.from_numpy(image).float() for image in images])


def _stock_images(request: dict[str, Any]) -> dict[str, torch.Tensor]:
    """The images of the stock program for `request`, by "base", "diffusers" and "kohya"."""
    with tempfile.TemporaryDirectory() as folder:
        target, request_file = Path(folder) / "images.safetensors", Path(folder) / "request.json"
        request_file.write_text(json.dumps({**request, "images": str(target)}), encoding="utf-8")
        # Offline, because the base model is in the cache. -P keeps the program's folder off the import path.
        command = [sys.executable, "-P", str(STOCK_PROGRAM), str(request_file)]
        finished = subprocess.run(command, capture_output=True, text=True, check=False, env=offline_environment())
        if finished.returncode:
            last = finished.stderr.strip().splitlines()[-1:] or ["no message"]
            raise CertificateError(f"Stock diffusers, without this package, cannot use the exported files: {last[0]}")
        return load_file(target)


def _compare(
    native: torch.Tensor,
    stock: dict[str, torch.Tensor],
    findings: list[str],
    prompts: list[str],
    settings: dict[str, Any],
    dtype: str,
    device: str,
    references: Mapping[str, torch.Tensor] | None = None,
) -> Certificate:
    """Compare the images of the trained pipeline, (prompts, height, width, 3), with those of the stock one.

    Args:
        references: for files that hold an approximation, the images that they must give instead.
    """
    changes = LEVELS * (stock["diffusers"] - stock["base"]).abs()
    effect, mean_effect = changes.max().item(), changes.mean().item()
    differences = {name: LEVELS * (images - native).abs() for name, images in stock.items() if name != "base"}
    problems = [f"the kohya file: {finding}" for finding in findings]
    if effect == 0:
        problems.append("the adapter changes no image")
    deviations = {name: LEVELS * (stock[name] - images).abs() for name, images in (references or {}).items()}
    for name, difference in (differences | deviations).items():
        problems += _difference_problems(name, difference, mean_effect, dtype)
    return Certificate(
        passed=not problems,
        largest_difference={name: difference.max().item() for name, difference in differences.items()},
        mean_difference={name: difference.mean().item() for name, difference in differences.items()},
        effect=effect,
        mean_effect=mean_effect,
        kohya_findings=findings,
        problems=problems,
        prompts=prompts,
        sampling=settings,
        dtype=dtype,
        device=device,
    )


def _difference_problems(name: str, difference: torch.Tensor, mean_effect: float, dtype: str) -> list[str]:
    """The problem if `difference`, (prompts, height, width, 3), is too large; else empty."""
    largest, share = difference.max().item(), difference.mean().item() / max(mean_effect, 1e-12)
    if dtype == "float32" and not largest <= LARGEST_DIFFERENCE:
        return [f"images from the {name} file differ by up to {largest:.1f} of 255 levels; 1 is allowed"]
    if dtype != "float32" and not share <= LARGEST_SHARE:
        return [f"images from the {name} file differ by {share:.0%} of the adapter's mean effect; 25% is allowed"]
    return []
