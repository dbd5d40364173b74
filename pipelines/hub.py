"""Models on the Hugging Face hub: looking one up, fetching its files into the cache, and errors that name the remedy."""

from __future__ import annotations

import errno
import json
import logging
import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from enum import Enum, auto
from pathlib import Path
from typing import Any

from huggingface_hub import HfApi, constants, get_token, hf_hub_download, snapshot_download
from huggingface_hub.errors import (
    DisabledRepoError,
    FileMetadataError,
    GatedRepoError,
    HfHubHTTPError,
    HFValidationError,
    LocalEntryNotFoundError,
    OfflineModeIsEnabled,
    RemoteEntryNotFoundError,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)
from huggingface_hub.utils import build_hf_headers, get_session, hf_raise_for_status, httpx, validate_repo_id

from pipelines.errors import InputError

logger = logging.getLogger(__name__)
# Errors of a look-up and of a download; hf_xet raises RuntimeError.
_LOOKUP_ERRORS = (OSError, httpx.HTTPError, json.JSONDecodeError)
_TRANSFER_ERRORS = (OSError, httpx.HTTPError, RuntimeError)


class HubError(InputError):
    """A model cannot be fetched from the hub; the message gives the reason and the remedy."""


class Failure(Enum):
    """Why a request to the hub failed."""

    GATED = auto()
    NO_REPOSITORY = auto()
    NO_REVISION = auto()
    NO_FILE = auto()
    DISABLED = auto()
    UNAUTHORIZED = auto()
    FORBIDDEN = auto()
    RATE_LIMITED = auto()
    SERVER_ERROR = auto()
    OFFLINE = auto()
    UNREACHABLE = auto()
    INTERRUPTED = auto()
    DISK_FULL = auto()
    NOT_WRITABLE = auto()
    NOT_A_HUB = auto()


# The first match counts: GatedRepoError is a subclass of RepositoryNotFoundError.
_BY_CLASS: tuple[tuple[type[BaseException], Failure], ...] = (
    (GatedRepoError, Failure.GATED),
    (RepositoryNotFoundError, Failure.NO_REPOSITORY),
    (RevisionNotFoundError, Failure.NO_REVISION),
    (RemoteEntryNotFoundError, Failure.NO_FILE),
    (DisabledRepoError, Failure.DISABLED),
    (FileMetadataError, Failure.NOT_A_HUB),
    (json.JSONDecodeError, Failure.NOT_A_HUB),
    (OfflineModeIsEnabled, Failure.OFFLINE),
    (httpx.ConnectError, Failure.UNREACHABLE),
    (httpx.TimeoutException, Failure.UNREACHABLE),
    (httpx.ProxyError, Failure.UNREACHABLE),
    (httpx.TransportError, Failure.INTERRUPTED),
)
_BY_STATUS = {401: Failure.UNAUTHORIZED, 403: Failure.FORBIDDEN, 404: Failure.NO_REPOSITORY, 429: Failure.RATE_LIMITED}
_BY_ERRNO = {
    errno.ENOSPC: Failure.DISK_FULL,
    errno.EDQUOT: Failure.DISK_FULL,
    errno.EACCES: Failure.NOT_WRITABLE,
    errno.EPERM: Failure.NOT_WRITABLE,
    errno.EROFS: Failure.NOT_WRITABLE,
}
# After these failures, a copy of the model in the cache is used. A missing revision is not in the cache either.
_USE_CACHE = frozenset(Failure) - {Failure.NO_REVISION, Failure.DISK_FULL, Failure.NOT_WRITABLE}


# Each follows "The model NAME could not be fetched: ".
_TEXTS = {
    Failure.GATED: "it is gated, and {account}. Accept its licence on {page}, then log in with `hf auth login`.",
    Failure.NO_REPOSITORY: "there is no such folder, and no such model on the hub that you have access to. Check the name on "
    "{page}; if the model is private, log in with `hf auth login`.",
    Failure.NO_REVISION: "it has no revision {revision!r}. Give --revision one of the branches, tags and commits on "
    "{page}/tree/main, or leave it out.",
    Failure.NO_FILE: "it has no file {file!r}. See {page}/tree/main, or use another model.",
    Failure.DISABLED: "the hub has disabled it, see {page}. Use another model.",
    Failure.UNAUTHORIZED: "the hub does not accept the access token (401). Log in again with `hf auth login`, or unset HF_TOKEN.",
    Failure.FORBIDDEN: "the access token has no permission to read it (403). Log in with `hf auth login` and a token that has, "
    "or change the permissions on {hub}/settings/tokens.",
    Failure.RATE_LIMITED: "the hub has received too many requests from this address (429). Wait a few minutes, or log in with "
    "`hf auth login` for a higher limit.",
    Failure.SERVER_ERROR: "the hub returned a server error ({status}), and the cache {cache} has no complete copy. Try again "
    "later, or {local}.",
    Failure.OFFLINE: "HF_HUB_OFFLINE is set, and the cache {cache} has no complete copy. {elsewhere}",
    Failure.UNREACHABLE: "the hub {hub} cannot be reached ({cause}), and the cache {cache} has no complete copy. {elsewhere}",
    Failure.INTERRUPTED: "the download was interrupted ({cause}). Run the command again; complete files are not downloaded "
    "again.",
    Failure.DISK_FULL: "the disk with the cache {cache} is full. Free some space, or set HF_HOME to a folder on another disk.",
    Failure.NOT_WRITABLE: "the cache {cache} cannot be written ({cause}). Set HF_HOME to a writable folder.",
    Failure.NOT_A_HUB: "{hub} does not answer like the Hugging Face hub. Check HF_ENDPOINT, and whether a proxy or a login page "
    "of the network intercepts the request.",
}


@dataclass(frozen=True)
class HubModel:
    """A model on the hub.

    Args:
        name: OWNER/NAME.
        revision: branch, tag or commit; None for the main branch.
        variant: of the files, such as "fp16".
        role: its role in messages, such as "model" or "autoencoder".
        local: the alternative without a hub in messages, such as "give --pretrained_vae_model_name_or_path a folder".
    """

    name: str
    revision: str | None = None
    variant: str | None = None
    role: str = "model"
    local: str = "give --pretrained_model_name_or_path a folder"

    @property
    def page(self) -> str:
        """The URL of its page."""
        return f"{constants.ENDPOINT}/{self.name}"

    @property
    def download_command(self) -> str:
        """The command that downloads it into the cache."""
        command = f"hf download {self.name}"
        if self.revision is not None:
            command += f" --revision {self.revision}"
        if self.variant is not None:
            command += f" --include '*.json' '*.txt' '*.{self.variant}*.safetensors'"
        return command


@dataclass(frozen=True)
class Lookup:
    """The files of a model on the hub, or in the cache if the hub failed.

    Args:
        files: names relative to the repository.
        unavailable: if the hub failed, the error to raise if the copy in the cache lacks a file.
    """

    files: frozenset[str]
    unavailable: HubError | None = None

    @property
    def from_cache(self) -> bool:
        """Whether these are the files in the cache."""
        return self.unavailable is not None


def is_hub_name(text: str) -> bool:
    """Whether `text` has the form OWNER/NAME."""
    if text.count("/") != 1 or text.startswith((".", "/", "~")):
        return False
    try:
        validate_repo_id(text)
    except HFValidationError:
        return False
    return True


def failure_of(error: BaseException) -> tuple[Failure, BaseException] | None:
    """The failure of the hub, and the error in the chain of causes that shows it; None if no error is about the hub.

    diffusers, transformers and open_clip wrap the clients' errors into an OSError with a long text.
    """
    seen: list[BaseException] = []
    link: BaseException | None = error
    while link is not None and link not in seen:
        seen.append(link)
        link = link.__cause__ or link.__context__
    for each in seen:
        failure = _own_failure(each)
        if failure is not None:
            return failure, each
    return None


def _own_failure(error: BaseException) -> Failure | None:
    """The failure that an error shows, regardless of its causes."""
    for kind, failure in _BY_CLASS:
        if isinstance(error, kind):
            return failure
    if isinstance(error, HfHubHTTPError):
        return _BY_STATUS.get(error.response.status_code, Failure.SERVER_ERROR)
    return _BY_ERRNO.get(error.errno or 0) if isinstance(error, OSError) else None


def brief(error: BaseException) -> str:
    """The first line of an error's text, or its class."""
    lines = str(error).strip().splitlines()
    return (lines[0].rstrip(".: ") if lines else "") or type(error).__name__


def _sentences(model: HubModel, failure: Failure, error: BaseException) -> str:
    """Why `model` could not be fetched, and the remedy."""
    elsewhere = f"Download it once where there is a network, with `{model.download_command}`, or {model.local}."
    response = error.response if isinstance(error, HfHubHTTPError) else None
    return _TEXTS[failure].format(
        page=model.page,
        revision=model.revision or constants.DEFAULT_REVISION,
        local=model.local,
        elsewhere=elsewhere,
        hub=constants.ENDPOINT,
        cache=constants.HF_HUB_CACHE,
        account="the account that is logged in has no access to it" if get_token() else "you are not logged in",
        file="" if response is None else str(response.url).rsplit("/", 1)[-1],
        status="" if response is None else response.status_code,
        cause=brief(error),
    )


def _hub_error(model: HubModel, error: BaseException) -> HubError:
    """The error for the user. Unknown errors come from downloads, such as a file of the wrong length."""
    failure, cause = failure_of(error) or (Failure.INTERRUPTED, error)
    return HubError(f"The {model.role} {model.name!r} could not be fetched: {_sentences(model, failure, cause)}")


@contextmanager
def fetching(model: HubModel, lookup: Lookup) -> Iterator[None]:
    """A context for downloading files of `model` or reading them from the cache; failures become a `HubError`.

    Raises: HubError with the reason and the remedy.
    """
    try:
        yield
    except _TRANSFER_ERRORS as error:
        raise lookup.unavailable or _hub_error(model, error) from error


def look_up(model: HubModel, index: str) -> Lookup:
    """List the files of `model` on the hub, with its timeout, or in the cache if the hub fails.

    Args:
        index: a file without which a copy in the cache does not count.
    Raises: HubError if neither has the model.
    """
    try:
        info = HfApi().model_info(model.name, revision=model.revision, timeout=constants.HF_HUB_ETAG_TIMEOUT)
        return Lookup(frozenset(sibling.rfilename for sibling in info.siblings or ()))
    except _LOOKUP_ERRORS as error:
        failure, cause = failure_of(error) or (Failure.INTERRUPTED, error)
        folder = _cached_folder(model, index) if failure in _USE_CACHE else None
        unavailable = _hub_error(model, error)
        if folder is None:
            raise unavailable from error
    if failure is not Failure.OFFLINE:
        logger.warning(f"The {model.role} {model.name!r} is loaded from the cache, as the hub failed ({brief(cause)}).")
    return Lookup(files_below(folder), unavailable)


def _cached_folder(model: HubModel, index: str) -> Path | None:
    """The cache's copy of `model`, if it holds the file `index`."""
    try:
        folder = Path(snapshot_download(model.name, revision=model.revision, allow_patterns=[index], local_files_only=True))
    except LocalEntryNotFoundError:
        return None
    return folder if (folder / index).is_file() else None


def files_below(folder: Path) -> frozenset[str]:
    """The names of all files in a folder, relative to it."""
    return frozenset(file.relative_to(folder).as_posix() for file in folder.rglob("*") if file.is_file())


def fetch(model: HubModel, patterns: Sequence[str], lookup: Lookup) -> Path:
    """Download the files of `model` that match `patterns`, if the cache lacks them; returns their folder in the cache.

    Raises: HubError if a file cannot be fetched.
    """
    with fetching(model, lookup):
        folder = snapshot_download(
            model.name, revision=model.revision, allow_patterns=list(patterns), local_files_only=lookup.from_cache
        )
    return Path(folder)


def fetch_file(model: HubModel, file: str, lookup: Lookup) -> Path:
    """Download one file of `model`, if the cache lacks it; returns its path in the cache."""
    with fetching(model, lookup):
        return Path(hf_hub_download(model.name, file, revision=model.revision, local_files_only=lookup.from_cache))


def account(token: str) -> dict[str, Any]:
    """The hub's description of an access token and its owner (`whoami`).

    Raises: OSError or httpx.HTTPError if the token is not valid or the hub fails; see `failure_of`.
    """
    headers, timeout = build_hf_headers(token=token), constants.HF_HUB_ETAG_TIMEOUT
    response = get_session().get(f"{constants.ENDPOINT}/api/whoami-v2", headers=headers, timeout=timeout)
    hf_raise_for_status(response)
    return response.json()


def offline_environment() -> dict[str, str]:
    """Environment variables for a subprocess that must load all models from the cache."""
    return {**os.environ, "HF_HUB_OFFLINE": "1"}
