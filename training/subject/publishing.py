"""What of a run is meant to be published, in a folder of its own, and its upload to the hub."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path
from typing import Any

from accelerate.logging import get_logger
from huggingface_hub import HfApi
from huggingface_hub.errors import HfHubHTTPError, LocalTokenNotFoundError
from PIL import Image

from pipelines.errors import InputError
from training.options import SubjectOptions
from training.options.judging import JudgingOptions
from training.runs.card_text import CARD
from training.runs.durable import write_text_atomically
from training.runs.provenance import PROVENANCE, without_secrets
from training.runs.run import RunDirectory
from training.subject.certificate import CERTIFICATE
from training.subject.judging import SUGGESTION
from training.subject.model_card import EXPORTED, GRID, model_card

PUBLISHED = "published"
logger = get_logger(__name__)


def assemble(run: RunDirectory, options: SubjectOptions, pictures: int, grid: Image.Image) -> Path:
    """Make the folder `published/`: weights, model card, pictures, certificate and provenance, and nothing else.

    With `--private` neither captions nor paths nor names are in any of its files.

    Args:
        pictures: how many were trained on.
        grid: the pictures that the card shows.
    """
    private, folder = options.judging.private, run.path / PUBLISHED
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir()
    for name in EXPORTED:
        if (run.path / name).is_dir():
            shutil.copytree(run.path / name, folder / name, copy_function=_link_or_copy)
    grid.save(folder / GRID)
    write_text_atomically(folder / CARD, model_card(run, options, pictures, private))
    for name, strip in ((CERTIFICATE, _without_prompts), (PROVENANCE, without_secrets), (SUGGESTION, dict)):
        if (run.path / name).exists():
            record = json.loads((run.path / name).read_text(encoding="utf-8"))
            write_text_atomically(folder / name, json.dumps(strip(record) if private else record, indent=2) + "\n")
    return folder


def _link_or_copy(source: str, target: str) -> None:
    """A hard link, which takes no room, or a copy where the file system has none."""
    try:
        os.link(source, target)
    except OSError:
        shutil.copy2(source, target)


def _without_prompts(certificate: dict[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in certificate.items() if name != "prompts"}


def push_to_hub(folder: Path, judging: JudgingOptions, fallback_name: str) -> str:
    """Upload `folder` to the repository asked for, made where there is none; returns its address.

    Args:
        fallback_name: of the repository, where none is named.
    Raises: InputError, with what to do, if the hub refuses; the folder stays as it is.
    """
    api = HfApi(token=judging.hub_token)
    try:
        repository = api.create_repo(judging.hub_model_id or fallback_name, exist_ok=True, private=judging.private)
        api.upload_folder(repo_id=repository.repo_id, folder_path=folder, commit_message="Adapter, model card and certificate")
    except (HfHubHTTPError, LocalTokenNotFoundError, OSError) as error:
        raise InputError(
            f"The hub took no upload: {error}. Everything lies in {str(folder)!r}; log in with `hf auth login` or give "
            f"--hub_token, then `hf upload {judging.hub_model_id or 'OWNER/NAME'} {folder}`."
        ) from error
    logger.info(f"Uploaded to {repository}")
    return str(repository)
