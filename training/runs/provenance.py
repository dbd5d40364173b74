"""The provenance of a run: hashes of images, base model and code, versions, seed, command and device."""

from __future__ import annotations

import hashlib
import platform
import shlex
import subprocess
import sys
from collections.abc import Iterable, Mapping, Sequence
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch
from diffusers import StableDiffusionXLPipeline

from pipelines.built_in import is_built_in, model_path
from pipelines.digests import file_digest
from pipelines.file_names import display_path
from pipelines.run_file import Provenance
from training.runs.run import RunDirectory

ROOT = Path(__file__).parents[2]
CONSOLE_COMMAND = "nora-vision"
PACKAGES = ("nora_vision", "pipelines", "training")
LIBRARIES = (
    "torch", "torchvision", "diffusers", "transformers", "accelerate", "peft", "safetensors", "numpy", "pillow", "bitsandbytes",
    "open_clip_torch", "timm", "scikit-learn",
)  # fmt: skip


def files_hash(root: Path, files: Iterable[Path]) -> str:
    """SHA-256 over the names, relative to `root`, and the bytes of `files` in sorted order."""
    digest = hashlib.sha256()
    for path in sorted(files):
        digest.update(f"{path.relative_to(root).as_posix()}\0{file_digest(path)}\n".encode())
    return digest.hexdigest()


def code_identity(root: Path = ROOT) -> dict[str, Any]:
    """The hash of this project's sources; in a git checkout also the commit, and whether tracked files have changed."""
    sources = [path for package in PACKAGES for path in (root / package).rglob("*.py")]
    identity: dict[str, Any] = {"sources_sha256": files_hash(root, sources), "commit": None, "changed": None}
    if (root / ".git").exists():
        identity["commit"] = _git(root, "rev-parse", "HEAD")
        identity["changed"] = bool(_git(root, "status", "--porcelain", "--untracked-files=no", "--", *PACKAGES))
    return identity


def _git(root: Path, *arguments: str) -> str | None:
    """The output of a git command; None if it fails or git is not installed."""
    try:
        finished = subprocess.run(["git", "-C", str(root), *arguments], capture_output=True, text=True, check=False)
    except FileNotFoundError:
        return None
    return finished.stdout.strip() if finished.returncode == 0 else None


def model_identity(name_or_path: str, pipeline: StableDiffusionXLPipeline) -> dict[str, Any]:
    """The base model's name, whether that name is public, the hash of each weight file, and its prediction type.

    For a hub name, these are the files in the hub's cache that the pipeline was loaded from.
    """
    path = Path(model_path(name_or_path))
    config = pipeline.scheduler.config
    predicts = {
        "prediction_type": config.prediction_type,
        "rescale_betas_zero_snr": bool(config.get("rescale_betas_zero_snr")),
    }
    if path.is_file():
        return {"name": path.name, "public": False, "files": {path.name: file_digest(path)}, **predicts}
    folder = path if path.is_dir() else _cached_folder(pipeline)
    files = sorted(folder.rglob("*.safetensors")) if folder is not None else []
    name = path.resolve().name if path.is_dir() else name_or_path
    public = not path.is_dir() or is_built_in(name_or_path)
    hashes = {file.relative_to(folder).as_posix(): file_digest(file) for file in files}
    return {"name": name, "public": public, "files": hashes, **predicts}


def _cached_folder(pipeline: StableDiffusionXLPipeline) -> Path | None:
    """The folder in the hub's cache that the UNet was loaded from; None if there is none."""
    loaded_from = Path(str(pipeline.unet.config.get("_name_or_path", "")))
    return loaded_from.parent if loaded_from.is_dir() else None


def command_line(arguments: Sequence[str]) -> str:
    """The command as a line for a shell, with the hub token hidden."""
    words, hidden = [], False
    for argument in arguments:
        name, given, _ = argument.partition("=")
        is_token = name == "--hub_token"
        words.append("HIDDEN" if hidden else f"{name}=HIDDEN" if is_token and given else argument)
        hidden = is_token and not given
    return shlex.join(words)


def typed_words(launcher: Sequence[str] = ()) -> list[str]:
    """The command that started this process: `nora-vision train` and its flags, or a script and its flags after `launcher`."""
    program, *arguments = sys.argv
    words = program.split()
    if words[:1] == [CONSOLE_COMMAND]:
        return [*words, *arguments]
    return [*launcher, program, *arguments]


def device_identity(device: torch.device) -> dict[str, Any]:
    """The processor of the machine, and the name of the GPU if one is used."""
    identity: dict[str, Any] = {"type": device.type, "processor": platform.processor() or platform.machine(), "name": None}
    identity["threads"] = torch.get_num_threads()
    if device.type == "cuda":
        identity["name"] = torch.cuda.get_device_name(device)
    return identity


def library_versions() -> dict[str, str | None]:
    """The versions of Python and of the libraries that results depend on; None for libraries that are not installed."""
    versions: dict[str, str | None] = {"python": platform.python_version()}
    for library in LIBRARIES:
        try:
            versions[library] = version(library)
        except PackageNotFoundError:
            versions[library] = None
    return versions


def file_records(paths: Iterable[Path]) -> list[dict[str, str]]:
    """The name and hash of each file."""
    return [{"file": display_path(path), "sha256": file_digest(path)} for path in paths]


def write_provenance(
    run: RunDirectory,
    options: dict[str, Any],
    base_model: dict[str, Any],
    device: torch.device,
    images: Mapping[str, list[dict[str, str]]],
    seed: int | list[int],
) -> None:
    """Write provenance.json into the run's directory.

    Args:
        options: resolved, by group.
        base_model: its name and the hashes of its weights.
        images: name and hash of each image, by the field of `Provenance`: "images" are trained on, "heldout" are not.
        seed: of all random choices, or one for each repetition.
    """
    if not run.writes:
        return
    Provenance(
        base_model,
        **images,
        code=code_identity(),
        versions=library_versions(),
        seed=seed,
        command=command_line(typed_words()),
        device=device_identity(device),
        options=options,
    ).write(run.path)
