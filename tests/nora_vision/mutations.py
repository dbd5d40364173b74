"""Random damage to an adapter's two files, as by disks, transfers and editors, and worse."""

from __future__ import annotations

import json
import struct
from collections.abc import Callable
from pathlib import Path
from random import Random

WEIGHTS, CONFIG = "adapter_model.safetensors", "adapter_config.json"
Mutation = Callable[[Random, bytes], bytes]
DTYPES = ("F16", "BF16", "F32", "F64", "I32", "F8_E4M3", 3, None)
VALUES = (None, True, False, 0, 1, 2, 4, 7.5, -1, 1e308, "x", "", "svd", "gaussian", "LORA", [], {}, ["x"], [[1]], {"x": 1})


def parts(content: bytes) -> tuple[int, dict, bytes]:
    """Length and content of a safetensors header, and the bytes after it."""
    length = struct.unpack("<Q", content[:8])[0]
    return length, json.loads(content[8 : 8 + length]), content[8 + length :]


def joined(header: dict, data: bytes) -> bytes:
    """A safetensors file of them."""
    text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
    return struct.pack("<Q", len(text)) + text + data


def flipped(random: Random, content: bytes, start: int = 0, stop: int | None = None) -> bytes:
    """The same with one bit, or a few, of the bytes from `start` to `stop` turned."""
    result = bytearray(content)
    for _ in range(random.choice((1, 1, 1, 2, 8))):
        result[random.randrange(start, stop or len(content))] ^= 1 << random.randrange(8)
    return bytes(result)


def flip_payload(random: Random, content: bytes) -> bytes:
    return flipped(random, content, start=8 + parts(content)[0])


def flip_header(random: Random, content: bytes) -> bytes:
    return flipped(random, content, start=8, stop=8 + parts(content)[0])


def flip_metadata(random: Random, content: bytes) -> bytes:
    return flipped(random, content, start=8, stop=content.index(b"}", 8))


def flip_anything(random: Random, content: bytes) -> bytes:
    return flipped(random, content)


def other_length(random: Random, content: bytes) -> bytes:
    length = random.choice((flipped(random, content[:8]), struct.pack("<Q", parts(content)[0] + random.randint(1, 40))))
    return length + content[8:]


def truncate(random: Random, content: bytes) -> bytes:
    return content[: random.randrange(len(content))]


def insert(random: Random, content: bytes) -> bytes:
    start = random.randrange(len(content) + 1)
    return content[:start] + random.randbytes(random.choice((1, 4, 100))) + content[start:]


def remove(random: Random, content: bytes) -> bytes:
    start = random.randrange(len(content))
    return content[:start] + content[start + random.choice((1, 4, 100)) :]


def append(random: Random, content: bytes) -> bytes:
    return content + random.choice((b" ", b"\n", b"\x00", b"{}", random.randbytes(8)))


def swap_bytes(random: Random, content: bytes) -> bytes:
    """Exchange two blocks of the payload."""
    length, _, data = parts(content)
    first, second = sorted(random.sample(range(len(data) // 16), 2))
    blocks = [data[i : i + 16] for i in range(0, len(data), 16)]
    blocks[first], blocks[second] = blocks[second], blocks[first]
    return content[: 8 + length] + b"".join(blocks)


def edited(change: Callable[[Random, dict, list[str]], object]) -> Mutation:
    """A mutation that gives the header's entries, and the tensors' names, to `change`."""

    def mutation(random: Random, content: bytes) -> bytes:
        _, header, data = parts(content)
        change(random, header, [name for name in header if name != "__metadata__"])
        return joined(header, data)

    mutation.__name__ = change.__name__
    return mutation


@edited
def swap_tensors(random: Random, header: dict, names: list[str]) -> None:
    """Exchange the names of two tensors, of equal shape if possible."""
    first = random.choice(names)
    alike = [name for name in names if name != first and header[name]["shape"] == header[first]["shape"]]
    second = random.choice(alike or names)
    header[first], header[second] = header[second], header[first]


@edited
def rename_tensor(random: Random, header: dict, names: list[str]) -> None:
    name = random.choice(names)
    header[random.choice(("x", f"{name}x", name.replace("_A", "_B"), name.removeprefix("base_model.model.")))] = header.pop(name)


@edited
def drop_tensor(random: Random, header: dict, names: list[str]) -> None:
    del header[random.choice(names)]


@edited
def other_dtype(random: Random, header: dict, names: list[str]) -> None:
    header[random.choice(names)]["dtype"] = random.choice(DTYPES)


@edited
def other_shape(random: Random, header: dict, names: list[str]) -> None:
    entry = header[random.choice(names)]
    entry["shape"] = random.choice((entry["shape"][::-1], [*entry["shape"], 1], [], [-1], [1.5], "x", None, [2**63, 2**63]))


@edited
def other_offsets(random: Random, header: dict, names: list[str]) -> None:
    entry = header[random.choice(names)]
    start, stop = entry["data_offsets"]
    entry["data_offsets"] = random.choice(([start + 4, stop + 4], [stop, start], [start], [-0.0, stop], [0, 0], None))


@edited
def other_metadata(random: Random, header: dict, names: list[str]) -> None:
    metadata = header["__metadata__"]
    key = random.choice(list(metadata))
    metadata[random.choice((key, f"{key}x"))] = random.choice(("", "{}", "full", "packed", "steps", "ü", 5, metadata.pop(key)))


def other_spelling(random: Random, content: bytes) -> bytes:
    """Write a part of the header in another spelling, which some JSON readers accept and others refuse."""
    length, _, data = parts(content)
    text = content[8 : 8 + length]
    old, new = random.choice(
        ((b'"F32"', b'"\\u004632"'), (b":[", b": ["), (b'"pt"', b'"\\ud800"'), (b"[0,", b"[-0,"), (b"[0,", b"[0.0,"),
         (b"}", b"},"), (b"{", b"\xef\xbb\xbf{"), (b"nora_", b"n\\u006fra_"), (b'"shape"', b'"shape":[1],"shape"'))
    )  # fmt: skip
    text = text.replace(old, new, 1)
    return struct.pack("<Q", len(text)) + text + data


def other_value(random: Random, content: bytes) -> bytes:
    """Give a field of a JSON object another value."""
    fields = json.loads(content)
    fields[random.choice(list(fields))] = random.choice(VALUES)
    return json.dumps(fields).encode()


def other_digit(random: Random, content: bytes) -> bytes:
    place = random.choice([i for i, byte in enumerate(content) if chr(byte).isdigit()])
    return content[:place] + str(random.randrange(10)).encode() + content[place + 1 :]


def drop_field(random: Random, content: bytes) -> bytes:
    fields = json.loads(content)
    del fields[random.choice(list(fields))]
    return json.dumps(fields).encode()


def add_name(random: Random, content: bytes) -> bytes:
    """Add a name to a list of names, or a pattern to a table of them."""
    fields = json.loads(content)
    field = random.choice([name for name, value in fields.items() if isinstance(value, list | dict)])
    name = random.choice(("x", "^x", "fc2", "(a+)+b", 5))
    fields[field] = {**fields[field], name: 1} if isinstance(fields[field], dict) else [*fields[field], name]
    return json.dumps(fields).encode()


def other_json(random: Random, content: bytes) -> bytes:
    return random.choice((b"", b"null", b"[]", b"{}", b"[" * 100_000, b'{"a":' * 50_000, b"\xff\xfe", b'{"peft_type": "NORA"}'))


def respaced(random: Random, content: bytes) -> bytes:
    return json.dumps(json.loads(content), indent=random.choice((None, 1, 4))).encode()


OF_ANY_FILE: tuple[Mutation, ...] = (flip_anything, truncate, insert, remove, append)
OF_WEIGHTS: tuple[Mutation, ...] = (
    *OF_ANY_FILE, flip_payload, flip_header, flip_metadata, other_length, swap_bytes, swap_tensors, rename_tensor, drop_tensor,
    other_dtype, other_shape, other_offsets, other_metadata, other_spelling,
)  # fmt: skip
OF_CONFIG: tuple[Mutation, ...] = (*OF_ANY_FILE, other_value, other_digit, drop_field, add_name, other_json, respaced)


def mutate(random: Random, folder: Path) -> str:
    """Damage one of the two files in `folder`; returns the mutation's name."""
    file = random.choices((WEIGHTS, CONFIG), (0.7, 0.3))[0]
    mutation = random.choice(OF_WEIGHTS if file == WEIGHTS else OF_CONFIG)
    path = folder / file
    path.write_bytes(mutation(random, path.read_bytes()))
    return mutation.__name__
