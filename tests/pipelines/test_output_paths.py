"""Output paths are checked before work starts, and the check leaves no files."""

import os

import pytest

from pipelines.errors import InputError
from pipelines.output_paths import OUTPUT_SUFFIXES, check_output_file, check_output_folder


def test_writable_paths_pass_and_no_file_is_left(tmp_path):
    check_output_folder(tmp_path / "a" / "b", "--output_dir")
    check_output_folder(tmp_path, "--output_dir")
    check_output_file(tmp_path / "c" / "GRID.PNG", "--grid", OUTPUT_SUFFIXES)
    assert not list(tmp_path.iterdir())
    (tmp_path / "old.csv").write_text("x")
    check_output_file(tmp_path / "old.csv", "--output", (".csv",))
    assert (tmp_path / "old.csv").read_text() == "x"


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("file", r"--output_dir must be a folder, but '.*file' is a file\. Name another folder"),
        ("file/below/it", r"--output_dir must be a folder, but '.*file' is a file"),
        ("a" * 300, r"(?s)Nothing can be written to --output_dir 'a.*: File name too long"),
    ],
)
def test_a_path_that_cannot_be_a_folder_is_refused(tmp_path, monkeypatch, name, message):
    (tmp_path / "file").write_text("")
    monkeypatch.chdir(tmp_path)
    with pytest.raises(InputError, match=message):
        check_output_folder(name, "--output_dir")


def test_a_read_only_folder_is_refused(tmp_path):
    locked = tmp_path / "locked"
    locked.mkdir(mode=0o555)
    target = locked if os.geteuid() else "/proc/self"
    with pytest.raises(InputError, match=r"Nothing can be written to --cache_dir '.*Name another folder"):
        check_output_folder(f"{target}/cache", "--cache_dir")


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("x.foo", r"--grid must be a \.png, .* or \.tiff file, got '.*x\.foo'\. Give a name with this suffix"),
        ("x", r"--grid must be a \.png"),
        ("folder.png", r"--grid must be a file, but '.*folder\.png' is a folder"),
        ("file/x.png", r"the folder of --grid must be a folder, but '.*file' is a file"),
    ],
)
def test_a_file_that_cannot_be_written_is_refused(tmp_path, name, message):
    (tmp_path / "file").write_text("")
    (tmp_path / "folder.png").mkdir()
    with pytest.raises(InputError, match=message):
        check_output_file(tmp_path / name, "--grid", OUTPUT_SUFFIXES)
