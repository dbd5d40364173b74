"""Reading of text files that a user gives."""

import os
from unittest.mock import Mock

import pytest
from PIL import Image
from shared_cases import case_folder

from pipelines.errors import InputError
from pipelines.images import save_png
from pipelines.text_files import read_text

TEXT = "a café at night\na red star\n"


@pytest.mark.parametrize(
    "content",
    [TEXT.encode(), TEXT.encode("utf-8-sig"), TEXT.replace("\n", "\r\n").encode(), TEXT.replace("\n", "\r").encode("utf-8-sig")],
)
def test_utf8_is_read_with_any_line_endings_with_and_without_a_byte_order_mark(tmp_path, content):
    (tmp_path / "file.txt").write_bytes(content)

    assert read_text(tmp_path / "file.txt") == TEXT


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (TEXT.encode("utf-16"), "is UTF-16 text and must be UTF-8. Save it as UTF-8"),
        (b"\xfe\xff" + TEXT.encode("utf-16-be"), "is UTF-16 text"),
        (TEXT.encode("utf-32"), "is UTF-32 text"),
        ("a red star".encode("utf-16-le"), "NUL byte in line 1; it may be UTF-16.* Save it as UTF-8"),
        (TEXT.encode("cp1252"), "byte 0xE9 in line 1; it may be in a Windows encoding such as cp1252. Save it as UTF-8"),
        ("a red star\n“star”".encode("cp1252"), "byte 0x93 in line 2"),
        ("赤い星".encode("shift_jis"), "must be UTF-8 text"),
        ("é".encode()[:1], "must be UTF-8 text"),
    ],
)
def test_another_encoding_is_refused_with_the_remedy(tmp_path, content, message):
    (tmp_path / "file.txt").write_bytes(content)

    with pytest.raises(InputError, match=message) as refused:
        read_text(tmp_path / "file.txt")
    assert str(tmp_path / "file.txt") in str(refused.value)


@pytest.mark.parametrize(("name", "message"), [("none.txt", "There is no file"), (".", "cannot be read: Is a directory")])
def test_a_file_that_cannot_be_read_is_named(tmp_path, name, message):
    with pytest.raises(InputError, match=message):
        read_text(tmp_path / name)


def test_prompt_files_as_editors_write_them():
    folder = case_folder("prompts-file-encodings")

    assert not read_text(folder / "bom.txt").startswith("\ufeff")
    with pytest.raises(InputError, match="cp1252"):
        read_text(folder / "ansi.txt")
    with pytest.raises(InputError, match="is UTF-16 text"):
        read_text(folder / "utf16.txt")


def test_a_failed_write_leaves_the_old_file_and_nothing_else(tmp_path, monkeypatch):
    path = tmp_path / "image.png"
    save_png(Image.new("RGB", (2, 2)), path)
    before = path.read_bytes()
    monkeypatch.setattr(os, "replace", Mock(side_effect=OSError("the disk is full")))
    with pytest.raises(OSError, match="disk is full"):
        save_png(Image.new("RGB", (4, 4)), path)
    assert path.read_bytes() == before
    assert list(tmp_path.iterdir()) == [path]
