import hashlib
import json
import pickle
import struct
from pathlib import Path

import pytest
import safetensors.torch
import torch

from nora_vision.files import (
    DIGEST,
    MAX_HEADER_BYTES,
    MAX_JSON_BYTES,
    AdapterFileError,
    TensorEntry,
    content_digest,
    copy_with_metadata,
    read_header,
    read_json,
    read_tensors,
    replacing,
    tensor_hash,
    write_json,
    write_tensors,
)


def raw_file(path: Path, header: object, data: bytes = b"", header_length: int | None = None) -> Path:
    """A file in the safetensors layout with any header, valid or not."""
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    path.write_bytes(struct.pack("<Q", len(text) if header_length is None else header_length) + text + data)
    return path


def entry(**changes: object) -> dict[str, object]:
    return {"dtype": "F32", "shape": [2], "data_offsets": [0, 8], **changes}


class RunsCode:
    """Raises on unpickling, which proves that it was not unpickled."""

    def __reduce__(self) -> tuple:
        return (pytest.fail, ("a pickle was opened",))


def test_tensors_and_metadata_survive_the_round_trip(tmp_path):
    tensors = {"a": torch.randn(3, 4), "b": torch.randn(2).half(), "c": torch.randn(0, 5).bfloat16(), "d": torch.randn(6, 4).t()}
    write_tensors(tmp_path / "new" / "x.safetensors", tensors, {"key": "value"})
    loaded, header = read_tensors(tmp_path / "new" / "x.safetensors"), read_header(tmp_path / "new" / "x.safetensors")
    assert loaded.keys() == tensors.keys() == header.tensors.keys()
    for name, tensor in tensors.items():
        torch.testing.assert_close(loaded[name], tensor, rtol=0, atol=0)
        assert header.tensors[name] == TensorEntry(tensor.dtype, tuple(tensor.shape))
    assert header.metadata == {"format": "pt", "key": "value"}


def test_a_copy_with_other_metadata_has_the_bytes_of_the_same_tensors(tmp_path):
    tensors, (first, second) = {"b": torch.randn(3, 4), "a": torch.randn(2).half()}, (tmp_path / f"{n}.safetensors" for n in "xy")
    write_tensors(first, tensors, {"title": "duck", "kept": "same"})
    copy_with_metadata(first, second, {"title": "Ente 🦆", "added": "new"})
    assert read_header(second).metadata == {"format": "pt", "title": "Ente 🦆", "kept": "same", "added": "new"}
    bodies = [content[8 + int.from_bytes(content[:8], "little") :] for content in (first.read_bytes(), second.read_bytes())]
    assert bodies[0] == bodies[1]
    assert read_header(first).tensors == read_header(second).tensors
    write_tensors(first, tensors, digest=True)
    with pytest.raises(AdapterFileError, match="has a digest of its metadata"):
        copy_with_metadata(first, second, {})


def test_same_tensors_same_bytes(tmp_path):
    metadata = {letter: letter for letter in "vkaxbq"}
    for name in ("x", "y"):
        write_tensors(tmp_path / f"{name}.safetensors", {"b": torch.ones(2), "a": torch.zeros(3)}, metadata)
    assert (tmp_path / "x.safetensors").read_bytes() == (tmp_path / "y.safetensors").read_bytes()


def test_the_hash_covers_the_bytes_after_the_header(tmp_path):
    path, tensors = tmp_path / "x.safetensors", {"b": torch.ones(2), "a": torch.zeros(3).half()}
    write_tensors(path, tensors, {"k": "v"})
    content = path.read_bytes()
    assert tensor_hash(tensors) == hashlib.sha256(content[8 + struct.unpack("<Q", content[:8])[0] :]).hexdigest()


def test_the_digest_covers_names_dtypes_shapes_bytes_and_metadata():
    tensors, metadata = {"a": torch.tensor([[1.0, 2.0]]), "b": torch.zeros(2).half()}, {"key": "value"}
    digest = content_digest(tensors, metadata)
    assert content_digest(dict(reversed(tensors.items())), metadata | {DIGEST: "any"}) == digest
    assert content_digest(tensors | {"a": torch.tensor([[1.0], [2.0]]).T}, metadata) == digest
    others = (
        (tensors | {"a": torch.tensor([[1.0, 2.5]])}, metadata),
        (tensors | {"a": tensors["a"].T}, metadata),
        (tensors | {"b": torch.zeros(2).bfloat16()}, metadata),
        ({"c": tensors["a"], "b": tensors["b"]}, metadata),
        ({"a": tensors["a"]}, metadata),
        (tensors, metadata | {"key": "other"}),
        (tensors, {}),
    )
    assert len({content_digest(*other) for other in others} | {digest}) == len(others) + 1


def test_a_file_is_checked_against_its_digest_if_it_has_one(tmp_path):
    path, tensors = tmp_path / "x.safetensors", {"a": torch.ones(3), "scalar": torch.tensor(2.0), "none": torch.zeros(0, 2)}
    write_tensors(path, tensors, {"key": "value"}, digest=True)
    assert read_header(path).metadata == {
        "format": "pt",
        "key": "value",
        DIGEST: content_digest(tensors, {"format": "pt", "key": "value"}),
    }
    assert read_tensors(path).keys() == tensors.keys()
    safetensors.torch.save_file({**tensors, "a": torch.zeros(3)}, path, read_header(path).metadata)
    with pytest.raises(AdapterFileError, match=r"x\.safetensors was changed or damaged after it was saved: .* Copy or download"):
        read_tensors(path)
    write_tensors(path, tensors, {"key": "value"})
    assert DIGEST not in read_header(path).metadata


def test_a_header_that_safetensors_does_not_parse_is_refused(tmp_path):
    header = json.dumps({"a": entry()}).replace("[0, 8]", "[-0, 8]").encode()
    with pytest.raises(AdapterFileError, match=r"x\.safetensors is not a valid safetensors file"):
        read_tensors(raw_file(tmp_path / "x.safetensors", header, data=bytes(8)))


@pytest.mark.parametrize("suffix", [".bin", ".pt", ".pth", ".ckpt", ".pkl"])
def test_a_pickle_is_refused_by_its_name(tmp_path, suffix):
    path = tmp_path / f"adapter{suffix}"
    torch.save(RunsCode(), path)
    with pytest.raises(AdapterFileError, match=f"adapter{suffix} is a pickle by its name"):
        read_tensors(path)


@pytest.mark.parametrize("protocol", ["zip", 2, 3, 4, 5])
def test_a_pickle_is_refused_by_its_content(tmp_path, protocol):
    path = tmp_path / "adapter.safetensors"
    if protocol == "zip":
        torch.save(RunsCode(), path)
    else:
        path.write_bytes(pickle.dumps(RunsCode(), protocol=protocol))
    with pytest.raises(AdapterFileError, match=r"adapter\.safetensors is a pickle or zip archive"):
        read_tensors(path)


def test_another_suffix_is_refused(tmp_path):
    with pytest.raises(AdapterFileError, match=r"must have the suffix \.safetensors"):
        read_tensors(raw_file(tmp_path / "x.json", {}))


def test_a_header_that_starts_like_a_pickle_is_still_read(tmp_path):
    text = json.dumps({"__metadata__": {"note": "n" * 700}}).encode()
    path = raw_file(tmp_path / "x.safetensors", text.ljust(0x0380))
    assert path.read_bytes()[:2] == b"\x80\x03"
    assert read_header(path).metadata == {"note": "n" * 700}


@pytest.mark.parametrize("kept", [0, 5, 8, 40, -1])
def test_a_truncated_file_is_refused(tmp_path, kept):
    path = tmp_path / "x.safetensors"
    write_tensors(path, {"a": torch.ones(4)})
    path.write_bytes(path.read_bytes()[:kept])
    with pytest.raises(AdapterFileError, match=r"x\.safetensors is truncated"):
        read_tensors(path)


def test_bytes_that_belong_to_no_tensor_are_refused(tmp_path):
    path = tmp_path / "x.safetensors"
    write_tensors(path, {"a": torch.ones(4)})
    path.write_bytes(path.read_bytes() + b"more")
    with pytest.raises(AdapterFileError, match=r"x\.safetensors is oversized"):
        read_tensors(path)


@pytest.mark.parametrize("length", [MAX_HEADER_BYTES + 1, 2**63])
def test_an_oversized_header_is_refused_unread(tmp_path, length):
    with pytest.raises(AdapterFileError, match=f"has a header of {length} bytes"):
        read_header(raw_file(tmp_path / "x.safetensors", {}, header_length=length))


@pytest.mark.parametrize(
    ("header", "message"),
    [
        (b"{not json}", "not valid JSON"),
        (b"\xff\xfe{}", "not valid JSON"),
        (b"[" * 200_000, "not valid JSON"),
        (b'{"a": 1, "a": 1}', "a name occurs twice"),
        ([1, 2], "must hold a JSON object, got list"),
        ({"__metadata__": {"a": 1}}, "__metadata__ must map strings to strings"),
        ({"a": 1}, "'a' must have dtype, shape and data_offsets"),
        ({"a": entry(extra=1)}, "'a' must have dtype, shape and data_offsets"),
        ({"a": entry(dtype="I64", shape=[1])}, "'a' has dtype 'I64'"),
        ({"a": entry(dtype=["F32"])}, "'a' has dtype"),
        ({"a": entry(shape=[-2])}, "which are not sizes"),
        ({"a": entry(shape=[True, 2])}, "which are not sizes"),
        ({"a": entry(data_offsets=[0])}, "which are not sizes"),
        ({"a": entry(shape=[2**40, 2**40])}, "'a' of shape .* does not fill its bytes"),
        ({"a": entry(), "b": entry()}, "overlap or leave a gap"),
        ({"a": entry(data_offsets=[8, 16])}, "overlap or leave a gap"),
        ({"a": entry(shape=[2**20], data_offsets=[0, 2**22])}, "is truncated"),
    ],
)
def test_a_malformed_header_is_refused(tmp_path, header, message):
    with pytest.raises(AdapterFileError, match=message) as caught:
        read_tensors(raw_file(tmp_path / "x.safetensors", header, data=bytes(8)))
    assert "x.safetensors" in str(caught.value)


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
def test_values_that_are_not_finite_are_neither_read_nor_written(tmp_path, value):
    path = tmp_path / "x.safetensors"
    tensors = {"good": torch.ones(2), "bad": torch.tensor([1.0, value])}
    with pytest.raises(AdapterFileError, match="'bad' has values that are not finite"):
        write_tensors(path, tensors)
    assert list(tmp_path.iterdir()) == []
    safetensors.torch.save_file(tensors, path)
    with pytest.raises(AdapterFileError, match=r"x\.safetensors: 'bad' has values that are not finite"):
        read_tensors(path)


def test_a_failed_write_leaves_the_old_file_and_nothing_beside_it(tmp_path):
    path = tmp_path / "x.json"
    write_json(path, {"old": 1})

    def fail_midway() -> None:
        with replacing(path) as beside:
            beside.write_text("half of the new")
            raise RuntimeError("interrupted")

    with pytest.raises(RuntimeError, match="interrupted"):
        fail_midway()
    assert read_json(path) == {"old": 1}
    assert list(tmp_path.iterdir()) == [path]


def test_json_that_is_too_large_or_not_an_object_is_refused(tmp_path):
    path = tmp_path / "x.json"
    path.write_text('"' + "a" * MAX_JSON_BYTES + '"')
    with pytest.raises(AdapterFileError, match=r"x\.json has \d+ bytes"):
        read_json(path)
    path.write_text("[1]")
    with pytest.raises(AdapterFileError, match="must hold a JSON object, got list"):
        read_json(path)


def test_a_tensor_that_was_written_with_a_digest_can_still_be_resized_as_fsdp_does_to_parameters(tmp_path):
    weight = torch.ones(3, 2)
    write_tensors(tmp_path / "a.safetensors", {"weight": weight}, digest=True)
    weight.untyped_storage().resize_(0)
