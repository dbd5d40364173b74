"""The folder with the files of a run to publish, and its upload to the hub."""

from __future__ import annotations

import os
import shlex
import shutil
from dataclasses import replace
from pathlib import Path

from accelerate.logging import get_logger
from huggingface_hub import HfApi, constants, get_token
from huggingface_hub.errors import HFValidationError
from huggingface_hub.utils import httpx, validate_repo_id
from PIL import Image

from pipelines.errors import InputError
from pipelines.hub import Failure, account, brief, failure_of
from pipelines.run_file import Provenance, RunFile
from pipelines.text_files import write_text_atomically
from training.options import SubjectOptions
from training.options.validation import ValidationOptions
from training.runs.card_text import CARD
from training.runs.run import RunDirectory
from training.runs.run_files import Certificate, Suggestion
from training.subject.model_card import EXPORTED, GRID, model_card

PUBLISHED = "published"
# The hub client raises ValueError for invalid cards and files.
UPLOAD_ERRORS = (OSError, httpx.HTTPError, RuntimeError, ValueError)
_REASONS = {
    Failure.UNAUTHORIZED: "the access token was not accepted (401)",
    Failure.NO_REPOSITORY: "the repository does not exist, or the access token may not see it",
    Failure.FORBIDDEN: "the access token has no write permission for the repository (403)",
    Failure.OFFLINE: "HF_HUB_OFFLINE is set",
}
_OF_THE_TOKEN = (Failure.UNAUTHORIZED, Failure.NO_REPOSITORY, Failure.FORBIDDEN)
_NEW_TOKEN = "Log in with `hf auth login` and a token with write permission, or give --hub_token"
logger = get_logger(__name__)


def assemble(run: RunDirectory, options: SubjectOptions, images: int, grid: Image.Image | None) -> Path:
    """Make the folder `published/` with weights, model card, image grid, certificate, provenance and recommendation.

    With `--private`, its files contain no captions, paths or names.

    Args:
        images: the number of training images.
        grid: the images of the card; None for a card without images.
    """
    private, folder = options.validation.private, run.path / PUBLISHED
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir()
    for name in EXPORTED:
        if (run.path / name).is_dir():
            shutil.copytree(run.path / name, folder / name, copy_function=_link_or_copy)
    if grid is not None:
        grid.save(folder / GRID)
    write_text_atomically(folder / CARD, model_card(run, options, images, private))
    for kind in (Certificate, Provenance, Suggestion):
        file = kind.read(run.path)
        if file is not None:
            (_without_names(file) if private else file).write(folder)
    return folder


def _link_or_copy(source: str, target: str) -> None:
    """Make a hard link, which needs no disk space, or a copy if the file system has no links."""
    try:
        os.link(source, target)
    except OSError:
        shutil.copy2(source, target)


def _without_names(file: RunFile) -> RunFile:
    """The file without captions, paths and names."""
    if isinstance(file, Certificate):
        return replace(file, prompts=[])
    return file.without_names() if isinstance(file, Provenance) else file


def check_can_push(options: ValidationOptions) -> None:
    """Check before the training, as far as the hub can be reached, that the upload afterwards is allowed.

    Raises: InputError if there is no access token, or it has no write permission.
    """
    if not options.push_to_hub:
        return
    if constants.is_offline_mode():
        raise InputError("push_to_hub needs the hub, but HF_HUB_OFFLINE is set. Unset it, or leave --push_to_hub out.")
    token = options.hub_token or get_token()
    if token is None:
        raise InputError("push_to_hub needs an access token. Log in with `hf auth login`, or give --hub_token.")
    if options.hub_model_id is not None:
        _check_name(options.hub_model_id)
    if _role_of(token) == "read":
        raise InputError(f"push_to_hub needs an access token with write permission, but this one can only read. {_NEW_TOKEN}.")


def _check_name(name: str) -> None:
    try:
        validate_repo_id(name)
    except HFValidationError as error:
        raise InputError(f"hub_model_id must have the form OWNER/NAME, got {name!r}: {brief(error)}.") from error


def _role_of(token: str) -> str | None:
    """The role of `token` on the hub; None, with a warning, if the hub cannot be reached."""
    try:
        return account(token).get("auth", {}).get("accessToken", {}).get("role")
    except UPLOAD_ERRORS as error:
        failure, cause = failure_of(error) or (None, error)
        if failure is Failure.UNAUTHORIZED:
            raise InputError(f"push_to_hub is not possible: {_REASONS[failure]}. {_NEW_TOKEN}.") from error
        logger.warning(f"The hub cannot be reached ({brief(cause)}), so permission for the upload is checked after the training.")
        return None


def push_to_hub(folder: Path, options: ValidationOptions, fallback_name: str) -> str:
    """Upload `folder` to the repository, which is created if it does not exist; returns its address.

    Args:
        fallback_name: of the repository, without `hub_model_id`.
    Raises: InputError if the upload fails; the folder remains.
    """
    api, name = HfApi(token=options.hub_token), options.hub_model_id or fallback_name
    try:
        repository = api.create_repo(name, exist_ok=True, private=options.private)
        api.upload_folder(repo_id=repository.repo_id, folder_path=folder, commit_message="Adapter, model card and certificate")
    except UPLOAD_ERRORS as error:
        failure, cause = failure_of(error) or (None, error)
        reason = _REASONS.get(failure, brief(cause))
        remedy = "Log in with `hf auth login` and a token with write permission, then" if failure in _OF_THE_TOKEN else "Later,"
        command = f"hf upload {name} {shlex.quote(str(folder))}" + (" --private" if options.private else "")
        raise InputError(
            f"The upload to the hub failed: {reason}. The run is complete, and the files to publish are in {str(folder)!r}. "
            f"{remedy} upload them with `{command}`."
        ) from error
    logger.info(f"Uploaded to {repository}")
    return str(repository)
