"""Dangerous zips are refused, and what a zip states about its members is checked."""

import stat
import struct
import zipfile
from multiprocessing import get_context

import numpy as np
import pytest
from image_sets import class_files, stored_image, write_zip

from pipelines.errors import InputError
from pipelines.fewshot import archives
from pipelines.fewshot.archives import ZipLimits, read_zip
from pipelines.fewshot.loading import load_images

GOOD = class_files({"cats": 2, "dogs": 2})


def named(name, mode=stat.S_IFREG | 0o644):
    """A member with this unsafe name."""
    member = zipfile.ZipInfo("x")
    member.filename, member.external_attr = name, mode << 16
    return member


def refused(path, message, limits=None):
    with pytest.raises(InputError, match=message):
        read_zip(path, limits or ZipLimits())


@pytest.mark.parametrize(
    "name",
    [
        "/etc/cats/0.png",
        "//host/cats/0.png",
        "../cats/0.png",
        "cats/../../0.png",
        "cats/..",
        "./cats/0.png",
        "cats//0.png",
        "C:/cats/0.png",
        "C:cats/0.png",
        "..\\cats\\0.png",
        "\\cats\\0.png",
        "cats/a\nb.png",
        "cats/a\x1b[2J.png",
    ],
)
def test_names_that_leave_the_zip_or_are_not_plain_paths_are_refused(tmp_path, name):
    refused(write_zip(tmp_path / "a.zip", GOOD | {named(name): b"x"}), "must be a plain path within the zip")


def test_a_name_with_a_null_byte_is_refused_although_python_truncates_it(tmp_path):
    path = write_zip(tmp_path / "a.zip", GOOD | {"cats/safe.pngQ..": b"x"})
    path.write_bytes(path.read_bytes().replace(b"safe.pngQ", b"safe.png\0"))
    assert "cats/safe.png" in zipfile.ZipFile(path).namelist()
    refused(path, "must be a plain path within the zip")


@pytest.mark.parametrize("kind", [stat.S_IFLNK, stat.S_IFCHR, stat.S_IFBLK, stat.S_IFIFO, stat.S_IFSOCK])
def test_links_and_devices_are_refused(tmp_path, kind):
    refused(write_zip(tmp_path / "a.zip", GOOD | {named("cats/9.png", kind | 0o777): b"/etc/passwd"}), "a link or a device")


def test_a_duplicate_name_is_refused(tmp_path):
    path = write_zip(tmp_path / "a.zip", GOOD | {"cats/8.png": b"another"})
    path.write_bytes(path.read_bytes().replace(b"cats/8.png", b"cats/0.png"))
    refused(path, r"contains 'cats/0\.png' 2 times")


@pytest.mark.parametrize("method", [zipfile.ZIP_BZIP2, zipfile.ZIP_LZMA])
def test_compression_methods_with_unbounded_memory_are_refused(tmp_path, method):
    refused(write_zip(tmp_path / "a.zip", GOOD, method), "must be stored or deflated")


def test_an_encrypted_member_is_refused(tmp_path):
    path = write_zip(tmp_path / "a.zip", GOOD)
    content = bytearray(path.read_bytes())
    content[content.index(archives.DIRECTORY_SIGNATURE) + 8] |= 1
    path.write_bytes(content)
    refused(path, "is encrypted")


@pytest.mark.parametrize("method", [zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED])
def test_limits_refuse_larger_values_and_allow_equal_ones(tmp_path, method):
    path = write_zip(tmp_path / "a.zip", GOOD, method)
    sizes = [len(content) for content in GOOD.values()]
    read_zip(path, ZipLimits(len(sizes), max(sizes), sum(sizes), 1.0 if method == zipfile.ZIP_STORED else 2.0))
    refused(path, "at most 3 files", ZipLimits(members=3))
    refused(path, rf"must have at most {max(sizes) - 1:,} bytes, got {max(sizes):,}", ZipLimits(member_bytes=max(sizes) - 1))
    refused(path, rf"must unpack to at most {sum(sizes) - 1:,} bytes, got {sum(sizes):,}", ZipLimits(total_bytes=sum(sizes) - 1))


def test_a_file_that_unpacks_to_a_hundred_times_its_size_is_refused(tmp_path):
    path = write_zip(tmp_path / "a.zip", GOOD | {"cats/9.png": bytes(10**6)})
    refused(path, r"'cats/9\.png' .* must unpack to at most 100 times its packed size, got 1,000,000 bytes from")


def test_more_pixels_than_allowed_are_refused_when_the_image_is_read(tmp_path):
    found = load_images(write_zip(tmp_path / "a.zip", GOOD), limits=ZipLimits(pixels=63))
    assert found.images[0].source.max_pixels == 63


def with_size(path, size):
    """The zip at `path`, whose first member states `size` bytes in both headers."""
    content = bytearray(path.read_bytes())
    struct.pack_into("<I", content, 22, size)
    struct.pack_into("<I", content, content.index(archives.DIRECTORY_SIGNATURE) + 24, size)
    path.write_bytes(content)
    return path


@pytest.mark.parametrize(
    ("says", "method"), [(10, zipfile.ZIP_DEFLATED), (10**6, zipfile.ZIP_DEFLATED), (10**6, zipfile.ZIP_STORED)]
)
def test_a_member_with_a_wrong_size_is_named_and_not_unpacked_further(tmp_path, says, method):
    files = {"a/0.png": bytes(range(256)) * 2000, "b/0.png": b"x"}
    path = with_size(write_zip(tmp_path / "a.zip", files, method), says)
    found = read_zip(path, ZipLimits(ratio=1000)).files[0]
    assert found.size() == says
    with pytest.raises(InputError, match=r"'a/0\.png' in .*a\.zip"):
        found.content()


def test_members_that_share_their_bytes_are_refused(tmp_path):
    """A zip bomb without nesting: many members share one block of bytes. [Fifield 2019]"""
    path = write_zip(tmp_path / "a.zip", {f"a/{place}.png": stored_image(0) for place in range(3)}, zipfile.ZIP_STORED)
    content = bytearray(path.read_bytes())
    places = [place for place in range(len(content)) if content[place : place + 4] == archives.DIRECTORY_SIGNATURE]
    content[places[2] + 42 : places[2] + 46] = content[places[1] + 42 : places[1] + 46]
    path.write_bytes(content)
    refused(path, "overlaps the data that follows it")


def test_too_many_records_are_refused_before_objects_are_created(tmp_path, monkeypatch):
    path = write_zip(tmp_path / "a.zip", {f"a/{place}": b"" for place in range(50)})
    content = path.read_bytes()
    end = content.index(b"PK\x05\x06")
    path.write_bytes(content[: end + 8] + struct.pack("<HH", 1, 1) + content[end + 12 :])
    monkeypatch.setattr(zipfile, "ZipFile", None)
    refused(path, "at most 49 files", ZipLimits(members=49))


@pytest.mark.parametrize("chunk", [4, 5, 7, 64])
def test_records_across_chunk_boundaries_are_counted(tmp_path, monkeypatch, chunk):
    path = write_zip(tmp_path / "a.zip", {f"a/{place}": b"" for place in range(50)})
    monkeypatch.setattr(archives, "CHUNK", chunk)
    assert archives._directory_records(path) == 50


@pytest.mark.parametrize("content", [b"", b"no zip at all", b"PK\x05\x06" + bytes(17), bytes(10**5)])
def test_a_file_that_is_not_a_zip_is_named(tmp_path, content):
    (tmp_path / "a.zip").write_bytes(content)
    refused(tmp_path / "a.zip", r"a\.zip.* cannot be read as a zip")


def test_damaged_zips_are_read_or_raise_an_input_error(tmp_path):
    rng = np.random.default_rng(0)
    whole = write_zip(tmp_path / "whole.zip", class_files({"a": 2, "b": 1})).read_bytes()
    directory = whole.index(archives.DIRECTORY_SIGNATURE)
    outcomes = set()
    for turn in range(1500):
        damaged = bytearray(whole)
        for place in rng.integers(directory if turn % 2 else 0, len(damaged), size=2):
            damaged[place] = rng.integers(256)
        path = tmp_path / f"{turn}.zip"
        path.write_bytes(damaged)
        try:
            for file in read_zip(path, ZipLimits()).files:
                file.content()
            outcomes.add("read")
        except InputError as error:
            outcomes.add("unpacked" if "cannot be unpacked" in str(error) else "refused")
        path.unlink()
    assert outcomes == {"read", "unpacked", "refused"}


def test_reading_a_zip_writes_nothing(tmp_path, monkeypatch):
    path = write_zip(tmp_path / "a.zip", GOOD)
    inner = tmp_path / "empty"
    inner.mkdir()
    monkeypatch.chdir(inner)
    for file in read_zip(path, ZipLimits()).files:
        assert file.content() == GOOD[file.name]
    assert not list(inner.iterdir())
    assert [entry.name for entry in tmp_path.iterdir() if entry != inner] == ["a.zip"]


def test_a_changed_zip_is_read_again_and_a_missing_member_is_named(tmp_path):
    path = write_zip(tmp_path / "a.zip", GOOD)
    first = read_zip(path, ZipLimits()).files[0]
    write_zip(path, {"cats/0.png": b"other", "x": b""})
    assert first.content() == b"other"
    write_zip(path, {"x": b""})
    with pytest.raises(InputError, match=r"a\.zip.* no longer contains 'cats/0\.png'"):
        first.content()


OPENED = []


def _contents_and_whether_reopened(files):
    contents = [file.content() for file in files]
    return contents, archives._opened(files[0].archive) is not OPENED[0]


def test_forked_processes_do_not_share_a_file_position(tmp_path, monkeypatch):
    files = read_zip(write_zip(tmp_path / "a.zip", class_files({"a": 20})), ZipLimits()).files
    monkeypatch.setitem(globals(), "OPENED", [archives._opened(tmp_path / "a.zip")])
    contents, reopened = _contents_and_whether_reopened(files)
    assert not reopened
    with get_context("fork").Pool(2) as pool:
        assert pool.map(_contents_and_whether_reopened, [files] * 8) == [(contents, True)] * 8
