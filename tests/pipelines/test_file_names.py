r"""File names that are not UTF-8: commands print and write them, with such a byte as \udcff like Python."""

import io
import json
import os
import sys

import pytest
import torch
from image_sets import stored_image

from pipelines.errors import InputError
from pipelines.fewshot.data import check_readable
from pipelines.fewshot.loading import load_folder, load_images
from pipelines.file_names import display_path
from pipelines.images import read_image
from pipelines.subject.captions import find_captioned
from pipelines.subject.image_checks import ImageCheckOptions, main
from training.options.data import DataOptions
from training.runs.provenance import file_records, write_provenance
from training.runs.run import RunDirectory
from training.subject.preparing import checked_images, record_report

RAW, SPELLED = b"\xffphoto.png", r"\udcffphoto.png"


@pytest.fixture
def photos(tmp_path):
    """A folder with an intact and a damaged image whose names are not UTF-8, and two others."""
    folder = tmp_path / "photos"
    folder.mkdir()
    files = {RAW: stored_image(0), b"\xfedamaged.png": b"no image", b"b.png": stored_image(1), b"c.png": stored_image(2)}
    for name, content in files.items():
        _write(os.path.join(os.fsencode(folder), name), content)
    return folder


def _write(path, content):
    try:
        with open(path, "wb") as file:
            file.write(content)
    except OSError:
        pytest.skip("This file system takes no name that is not UTF-8.")


def strict_stdout(monkeypatch):
    """Replace stdout by one that accepts only UTF-8; returns a function that gives its content."""
    stdout = io.TextIOWrapper(io.BytesIO(), encoding="utf-8", errors="strict", write_through=True)
    monkeypatch.setattr(sys, "stdout", stdout)
    return lambda: stdout.buffer.getvalue().decode("utf-8")


def test_display_names_can_be_written_as_utf_8_and_stay_different():
    names = [os.fsdecode(name) for name in (b"\xff.jpg", b"\xfe.jpg", "ä b.jpg".encode())]
    assert [display_path(name) for name in names] == [r"\udcff.jpg", r"\udcfe.jpg", "ä b.jpg"]


def test_the_image_checks_print_and_write_such_names(photos, tmp_path, monkeypatch):
    printed = strict_stdout(monkeypatch)
    report = main(ImageCheckOptions(str(photos), json=str(tmp_path / "report.json")))
    assert len(report.usable) == 3
    assert SPELLED in printed()
    assert r"\udcfedamaged.png" in printed()
    written = json.loads((tmp_path / "report.json").read_bytes().decode("utf-8"))
    assert any(image["path"].endswith(SPELLED) for image in written["pictures"])
    json.dumps(written, ensure_ascii=False).encode("utf-8")


def test_training_accepts_such_names_and_its_records_are_utf_8(photos, tmp_path):
    found = checked_images(DataOptions(instance_data_dir=str(photos), instance_prompt="a dog", heldout_image="none"), seed=0)
    assert len(found.train) == 3
    run = RunDirectory.create(tmp_path / "run", {})
    record_report(found.report, 64, run)
    records = file_records(image.path for image in found.train)
    write_provenance(run, {}, {"name": "any"}, torch.device("cpu"), {"images": records}, 0)
    for name in ("photos.json", "provenance.json"):
        text = json.dumps(json.loads((run.path / name).read_bytes().decode("utf-8")), ensure_ascii=False)
        assert json.dumps(SPELLED)[1:-1] in text
        text.encode("utf-8")


def test_a_folder_with_such_a_name_gives_a_prompt_that_can_be_tokenized(photos):
    raw = photos.rename(photos.with_name(os.fsdecode(b"\xffdog")))
    assert find_captioned(raw, "a photo of {subject}")[0].prompt == r"a photo of \udcffdog"


def test_the_few_shot_reader_accepts_such_names_and_reports_damaged_images(photos, tmp_path):
    for name in ("cat", "dog"):
        (tmp_path / "set" / name).mkdir(parents=True)
    for place, path in enumerate(photos.iterdir()):
        path.rename(tmp_path / "set" / ("cat", "dog")[place % 2] / path.name)
    images = load_folder(tmp_path / "set").images
    assert len(images) == 4
    with pytest.raises(InputError, match=r"\\udcfedamaged\.png' of class '.*' cannot be read") as error:
        check_readable(images)
    str(error.value).encode("utf-8")


def test_a_class_folder_with_such_a_name_is_refused_in_a_sentence(photos):
    for name in (b"\xffcat", b"dog"):
        folder = os.path.join(os.fsencode(photos), name)
        os.mkdir(folder)
        _write(os.path.join(folder, b"a.png"), stored_image(0))
    for path in photos.glob("*.png"):
        path.unlink()
    with pytest.raises(InputError, match=r"The name of class '\\udcffcat' must be one line of text"):
        load_images(photos)


def test_errors_can_be_written_whatever_name_is_in_them(photos):
    with pytest.raises(InputError) as error:
        read_image(photos / os.fsdecode(b"\xfedamaged.png"))
    str(error.value).encode("utf-8")
    assert str(InputError(f"no {os.fsdecode(RAW)}")) == f"no {SPELLED}"
