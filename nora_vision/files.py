"""Read and write adapter files: safetensors and JSON only, checked before use and replaced atomically.

Nothing is ever unpickled. Suffix, first bytes, header and values of a file are checked, and the error names the file and the
problem. An optional digest in the header detects all other damage; it does not protect against forgery.
"""

import contextlib
import hashlib
import json
import math
import os
import re
import shutil
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import safetensors
import safetensors.torch
import torch

MAX_HEADER_BYTES = 16 * 2**20
MAX_JSON_BYTES = 2**20
PICKLE_SUFFIXES = frozenset({".bin", ".pt", ".pth", ".ckpt", ".pkl", ".pickle"})
# A torch.save archive is a zip file; an older one, or a bare pickle, opens with protocol 2 or later.
PICKLE_MAGIC = (b"PK\x03\x04", b"\x80\x02", b"\x80\x03", b"\x80\x04", b"\x80\x05")
# Names with dots, and the ^ that save_nora writes. PEFT uses names as regular expressions, and untrusted ones could take
# exponential time.
PLAIN_NAME = re.compile(r"\^?[\w.-]+")
# Keys of the header's metadata for the digests of the file's content and of the adapter_config.json beside it.
DIGEST, CONFIGURATION = "nora_digest", "nora_configuration"
DTYPES = {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
# Further dtypes in files of other programs: integer alphas, fp8 weights, counters.
FOREIGN_DTYPES = DTYPES | {
    "F64": torch.float64,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}
EIGHT_BIT_FLOATS = (torch.float8_e4m3fn, torch.float8_e5m2)
LFS_POINTER = b"version https://git-lfs"
WEB_PAGE = (b"<!doctype", b"<html", b"<?xml", b"<head")
AGAIN = "Download it again."


class AdapterFileError(ValueError):
    """An adapter file that must not be used; the message names the file and the problem."""


@dataclass(frozen=True)
class TensorEntry:
    """The entry of one tensor in a safetensors header."""

    dtype: torch.dtype
    shape: tuple[int, ...]


@dataclass(frozen=True)
class SafetensorsHeader:
    """The checked header of a safetensors file: its tensors by name, and its free-form metadata."""

    tensors: dict[str, TensorEntry]
    metadata: dict[str, str]


def read_header(path: str | os.PathLike, dtypes: Mapping[str, torch.dtype] = DTYPES) -> SafetensorsHeader:
    """The header of a safetensors file, checked against the size of the file; no tensor is read.

    Args:
        path: a file whose name ends in `.safetensors`, in any case.
        dtypes: the allowed dtypes, by their names in a header.
    Raises:
        FileNotFoundError: there is no such file.
        AdapterFileError: the file is a pickle, a Git LFS pointer or a web page, empty or truncated, has an oversized or
            malformed header, a tensor of another dtype, or bytes that belong to no tensor.
    """
    path = Path(path)
    _refuse_other_formats(path)
    size = path.stat().st_size
    with path.open("rb") as file:
        length = int.from_bytes(file.read(8), "little")
        if length > MAX_HEADER_BYTES:
            raise AdapterFileError(
                f"{path} has a header of {length} bytes; at most {MAX_HEADER_BYTES} are read. "
                f"It is not a safetensors file, or damaged. {AGAIN}"
            )
        if size < 8 + length:
            raise AdapterFileError(f"{path} is truncated: its header needs {8 + length} bytes, the file has {size}. {AGAIN}")
        header = _parse_json(file.read(length), path)
    metadata = header.pop("__metadata__", {})
    if not isinstance(metadata, dict) or not all(isinstance(value, str) for value in metadata.values()):
        raise AdapterFileError(f"{path} has a malformed header: __metadata__ must map strings to strings.")
    end = _check_layout(header, path, dtypes)
    if end != size - 8 - length:
        state = "truncated" if end > size - 8 - length else "oversized"
        raise AdapterFileError(f"{path} is {state}: its tensors take {end} bytes, the file holds {size - 8 - length}. {AGAIN}")
    tensors = {name: TensorEntry(dtypes[entry["dtype"]], tuple(entry["shape"])) for name, entry in header.items()}
    return SafetensorsHeader(tensors, metadata)


def read_tensors(
    path: str | os.PathLike, device: str | torch.device = "cpu", dtypes: Mapping[str, torch.dtype] = DTYPES
) -> dict[str, torch.Tensor]:
    """All tensors of a safetensors file, checked like `read_header`, against the digest and for finite values.

    Args:
        dtypes: as in `read_header`. 8-bit floats are returned as float32, which is exact.
    Raises:
        AdapterFileError: as `read_header`, or the content does not match the digest in the header (if there is one), or a
            tensor has a value that is not finite.
    """
    header = read_header(path, dtypes)
    try:
        tensors = safetensors.torch.load_file(path, device=str(device))
    except safetensors.SafetensorError as error:
        raise AdapterFileError(f"{path} is not a valid safetensors file: {error}.") from error
    if DIGEST in header.metadata and header.metadata[DIGEST] != content_digest(tensors, header.metadata):
        raise AdapterFileError(
            f"{path} was changed or damaged after it was saved: its content does not match the digest in its header. Copy or "
            "download it again, or save the adapter again."
        )
    tensors = {name: tensor.float() if tensor.dtype in EIGHT_BIT_FLOATS else tensor for name, tensor in tensors.items()}
    check_finite(tensors, str(path))
    return tensors


def check_finite(tensors: Mapping[str, torch.Tensor], where: str) -> None:
    """Raise AdapterFileError naming `where` and the first of the tensors, of any shape, with a value that is not finite."""
    for name, tensor in tensors.items():
        if not torch.isfinite(tensor).all():
            raise AdapterFileError(f"{where}: {name!r} has values that are not finite.")


def write_tensors(
    path: str | os.PathLike,
    tensors: Mapping[str, torch.Tensor],
    metadata: Mapping[str, str] | None = None,
    digest: bool = False,
) -> None:
    """Write a safetensors file beside `path` and rename it into place; folders are made as needed.

    The same tensors and metadata give the same bytes.

    Args:
        tensors: by name, of any shapes.
        digest: add a digest of tensors and metadata to the header, which `read_tensors` checks. Only for files that no other
            program edits, since changed metadata invalidate it.
    Raises:
        AdapterFileError: a tensor has a value that is not finite; nothing is written.
    """
    check_finite(tensors, f"{path} is not written")
    length, body = _serialise(tensors)
    metadata = {"format": "pt", **(metadata or {})}
    if digest:
        metadata[DIGEST] = content_digest(tensors, metadata)
    with replacing(path) as beside, beside.open("wb") as file:
        file.write(_header_bytes(json.loads(body[:length]), metadata))
        file.write(memoryview(body)[length:])


def copy_with_metadata(source: str | os.PathLike, path: str | os.PathLike, changes: Mapping[str, str]) -> None:
    """Copy a safetensors file with `changes` to the metadata in its header; the bytes of the tensors stay the same.

    Raises: AdapterFileError as `read_header`, or the header has a digest, which the changes would make invalid.
    """
    metadata = read_header(source, FOREIGN_DTYPES).metadata
    if DIGEST in metadata:
        raise AdapterFileError(f"{source} has a digest of its metadata, which can therefore not be changed. Save it again.")
    with Path(source).open("rb") as file, replacing(path) as beside, beside.open("wb") as copy:
        entries = json.loads(file.read(int.from_bytes(file.read(8), "little")))
        entries.pop("__metadata__", None)
        copy.write(_header_bytes(entries, {**metadata, **changes}))
        shutil.copyfileobj(file, copy)


def tensor_hash(tensors: Mapping[str, torch.Tensor]) -> str:
    """SHA-256, in hexadecimal, of the bytes after the header of a safetensors file of `tensors`, of any shapes."""
    length, body = _serialise(tensors)
    return hashlib.sha256(memoryview(body)[length:]).hexdigest()


def content_digest(tensors: Mapping[str, torch.Tensor], metadata: Mapping[str, str]) -> str:
    """SHA-256, in hexadecimal, of `tensors` of any shapes, with their names and dtypes, and `metadata` without a digest."""
    entries = {name: [str(tensor.dtype), list(tensor.shape)] for name, tensor in tensors.items()}
    described = [{key: value for key, value in metadata.items() if key != DIGEST}, entries]
    digest = hashlib.sha256(json.dumps(described, sort_keys=True).encode())
    for _, tensor in sorted(tensors.items()):
        digest.update(tensor_bytes(tensor))
    return digest.hexdigest()


def tensor_bytes(tensor: torch.Tensor) -> memoryview:
    """The bytes of a copy of `tensor`, of any shape: FSDP cannot resize the storage of a parameter that numpy refers to."""
    return tensor.detach().to("cpu", copy=True).contiguous().reshape(-1).view(torch.uint8).numpy().data


def configuration_digest(fields: Mapping[str, Any]) -> str:
    """SHA-256, in hexadecimal, of the fields of an adapter_config.json, stored in the metadata of the tensors beside it."""
    return hashlib.sha256(json.dumps(fields, sort_keys=True).encode()).hexdigest()


def check_configuration(metadata: Mapping[str, str], fields: Mapping[str, Any], folder: Path) -> None:
    """Check that the tensors in `folder` were saved with a configuration of these `fields`, if their `metadata` have its digest.

    After a crash between writing the two files, the tensors and the configuration may be of different adapters.

    Raises: AdapterFileError naming the folder.
    """
    if metadata.get(CONFIGURATION) not in (None, configuration_digest(fields)):
        raise AdapterFileError(
            f"{folder}: adapter_config.json is not the one that adapter_model.safetensors was saved with. Save the adapter again."
        )


def read_json(path: str | os.PathLike) -> dict[str, Any]:
    """Read a JSON file with one object.

    Raises:
        FileNotFoundError: there is no such file.
        AdapterFileError: the file is larger than a mebibyte or not one JSON object.
    """
    path = Path(path)
    size = path.stat().st_size
    if size > MAX_JSON_BYTES:
        raise AdapterFileError(f"{path} has {size} bytes; at most {MAX_JSON_BYTES} are read.")
    return _parse_json(path.read_bytes(), path)


def write_json(path: str | os.PathLike, content: Mapping[str, Any]) -> None:
    """Write one JSON object beside `path` and rename it into place; folders are made as needed."""
    with replacing(path) as beside:
        beside.write_text(json.dumps(content, indent=2, sort_keys=True) + "\n", encoding="utf-8")


@contextlib.contextmanager
def replacing(path: str | os.PathLike) -> Iterator[Path]:
    """Yield a temporary path beside `path`, which is renamed to `path` if the block succeeds and removed otherwise."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    beside = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        yield beside
        beside.replace(path)
    finally:
        beside.unlink(missing_ok=True)


def _header_bytes(entries: Mapping[str, Any], metadata: Mapping[str, str]) -> bytes:
    """The bytes of a safetensors file before its tensors: the length of the header, and the header in a fixed order."""
    # Not by safetensors, which orders metadata differently in every process.
    ordered = {"__metadata__": dict(sorted(metadata.items())), **entries}
    header = json.dumps(ordered, separators=(",", ":"), ensure_ascii=False).encode()
    header += b" " * (-len(header) % 8)
    return len(header).to_bytes(8, "little") + header


def _serialise(tensors: Mapping[str, torch.Tensor]) -> tuple[int, bytes]:
    """The length of a safetensors header without metadata, and the bytes of the file from that header on."""
    blob = safetensors.torch.save({name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()})
    return int.from_bytes(blob[:8], "little"), blob[8:]


def _refuse_other_formats(path: Path) -> None:
    if path.suffix.lower() in PICKLE_SUFFIXES:
        raise AdapterFileError(f"{path} is a pickle by its name, which can run code when opened. Only .safetensors is read.")
    if path.suffix.lower() != ".safetensors":
        raise AdapterFileError(f"{path} must have the suffix .safetensors. Other files are not read.")
    with path.open("rb") as file:
        start = file.read(64)
    _refuse_failed_downloads(path, start)
    if start.startswith(PICKLE_MAGIC):
        # A header of 0x..80 bytes also starts like this, but its JSON object starts at the ninth byte.
        with path.open("rb") as file:
            if not file.read(9).endswith(b"{"):
                raise AdapterFileError(f"{path} is a pickle or zip archive under a .safetensors name. It is not opened.")


def _refuse_failed_downloads(path: Path, start: bytes) -> None:
    """Refuse the results of failed downloads by their first bytes."""
    if not start:
        raise AdapterFileError(f"{path} is truncated: the file is empty (0 bytes). {AGAIN}")
    if start.startswith(LFS_POINTER):
        raise AdapterFileError(
            f"{path} is a Git LFS pointer: it only names the file, whose content was not downloaded. Run `git lfs pull` in its "
            "repository, or download the file itself."
        )
    text = start.removeprefix(b"\xef\xbb\xbf").lstrip().lower()
    if text.startswith(WEB_PAGE):
        raise AdapterFileError(
            f"{path} is a web page (HTML) and not the file: the site may have asked for a login or an agreement. Open its "
            "address in a browser and download the file itself."
        )
    # The first eight bytes are the length of the header, which would exceed the limit if they were all letters.
    if len(start) > 8 and start[:8].isascii() and start[:8].decode().isprintable():
        raise AdapterFileError(f"{path} is text and not a safetensors file: it begins with {start[:40]!r}. {AGAIN}")


def _parse_json(content: bytes, path: Path) -> dict[str, Any]:
    try:
        parsed = json.loads(
            content.decode("utf-8"), object_pairs_hook=_without_duplicates, parse_float=_finite, parse_constant=_finite
        )
    except (ValueError, RecursionError) as error:
        raise AdapterFileError(f"{path} is not valid JSON where JSON is expected: {error}.") from error
    if not isinstance(parsed, dict):
        raise AdapterFileError(f"{path} must hold a JSON object, got {type(parsed).__name__}.")
    return parsed


def _without_duplicates(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    names = [name for name, _ in pairs]
    if len(set(names)) != len(names):
        raise ValueError("a name occurs twice")
    return dict(pairs)


def _finite(literal: str) -> float:
    number = float(literal)
    if not math.isfinite(number):
        raise ValueError(f"{literal} is not finite")
    return number


def _check_layout(header: Mapping[str, Any], path: Path, dtypes: Mapping[str, torch.dtype]) -> int:
    """Check that the bytes of all tensors are contiguous, and return their end."""
    spans = [_checked_span(name, entry, path, dtypes) for name, entry in header.items()]
    end = 0
    for start, stop in sorted(spans):
        if start != end:
            raise AdapterFileError(f"{path}: its tensors overlap or leave a gap at byte {min(start, end)}.")
        end = stop
    return end


def _checked_span(name: str, entry: Any, path: Path, dtypes: Mapping[str, torch.dtype]) -> tuple[int, int]:
    """The start and end of a tensor's bytes, after checking its entry in the header."""
    if not isinstance(entry, dict) or set(entry) != {"dtype", "shape", "data_offsets"}:
        raise AdapterFileError(f"{path}: the header entry of {name!r} must have dtype, shape and data_offsets.")
    dtype, shape, offsets = entry["dtype"], entry["shape"], entry["data_offsets"]
    if not isinstance(dtype, str) or dtype not in dtypes:
        raise AdapterFileError(f"{path}: {name!r} has dtype {dtype!r}; allowed are {', '.join(dtypes)}.")
    if not _are_sizes(shape) or not _are_sizes(offsets) or len(offsets) != 2:
        raise AdapterFileError(f"{path}: {name!r} has shape {shape} and data_offsets {offsets}, which are not sizes.")
    if offsets[1] - offsets[0] != math.prod(shape) * dtypes[dtype].itemsize:
        raise AdapterFileError(f"{path}: {name!r} of shape {shape} and {dtype} does not fill its bytes {offsets}.")
    return offsets[0], offsets[1]


def _are_sizes(values: Any) -> bool:
    return isinstance(values, list) and all(type(value) is int and value >= 0 for value in values)
