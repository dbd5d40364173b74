"""Uploaded photos: captions, masks and zips have the same meaning as in a folder."""

import json
import zipfile

import pytest
from image_sets import stored_image, write_files
from shared_cases import case_folder

from pipelines.subject.captions import find_captioned
from training.runs.record import RunRecord
from webui.datasets import Dataset
from webui.draft import Draft
from webui.runs import RunView
from webui.screens.photos import _proposal, cards
from webui.screens.train import notes
from webui.uploads import add_photos
from webui.workspace import Workspace


@pytest.fixture
def dataset(tmp_path):
    return Dataset(Workspace(tmp_path / "runs", tmp_path / "sets", is_local=True).new_image_set())


def dropped(tmp_path, files):
    """Write each file to its own folder, as Gradio stores uploads."""
    return [write_files(tmp_path / str(place), {name: content}) / name for place, (name, content) in enumerate(files.items())]


def captions(dataset):
    return {entry.name: entry.caption for entry in dataset.photos()}


def zipped(path, files):
    with zipfile.ZipFile(path, "w") as archive:
        for name, content in files.items():
            archive.writestr(name, content)
    return path


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("dog.txt", b"a sks dog"),
        ("dog.CAPTION", b"\xef\xbb\xbfa sks dog\n"),
        ("dog.png.txt", b"a sks dog"),
        ("metadata.csv", b"file_name,text\ndog.png,a sks dog\n"),
        ("metadata.jsonl", b'{"file_name": "dog.png", "text": "a sks dog"}'),
        ("meta_cap.json", b'{"dog": {"caption": "a sks dog"}}'),
    ],
)
@pytest.mark.parametrize("later", [False, True])
def test_captions_uploaded_with_photos_or_later_reach_the_training(dataset, tmp_path, name, content, later):
    photo, text = dropped(tmp_path, {"dog.png": stored_image(0), name: content})
    for files in [[photo], [text]] if later else [[text, photo]]:
        assert add_photos(dataset, files).refused == []
    assert captions(dataset) == {"dog.png": "a sks dog"}
    assert [image.prompt for image in find_captioned(dataset.folder, "else")] == ["a sks dog"]
    assert ">a sks dog</textarea>" in cards(dataset, Draft())


def test_photos_keep_their_upload_order_and_names(dataset, tmp_path):
    first, second = ({name: stored_image(place) for place, name in enumerate(names)} for names in (["b.png", "a.png"], ["b.png"]))
    add_photos(dataset, [*dropped(tmp_path, first), *dropped(tmp_path / "again", second)])
    assert [entry.name for entry in dataset.photos()] == ["b.png", "a.png", "b (2).png"]


@pytest.mark.parametrize("mask", ["dog-masklabel.png", "dog.mask.png", "dog_mask.png"])
def test_masks_are_reported_and_not_added_as_photos(dataset, tmp_path, mask):
    added = add_photos(dataset, dropped(tmp_path, {"dog.png": stored_image(0), mask: stored_image(1)}))
    assert list(captions(dataset)) == ["dog.png"]
    (sentence,) = added.refused
    assert f"'{mask}'. They are masks" in sentence


def test_unusable_files_are_reported_and_the_others_added(dataset, tmp_path):
    files = {
        "dog.png": stored_image(0),
        "cat.txt": b"no cat",
        "letter.png": b"no image",
        "tool.exe": b"MZ",
        "metadata.jsonl": b"{",
        ".hidden.png": stored_image(1),
        "no suffix": stored_image(2),
    }
    added = add_photos(dataset, [*dropped(tmp_path, files), tmp_path / "gone.png"])
    assert set(captions(dataset)) == {"dog.png", "hidden.png", "no suffix"}
    words = " ".join(added.refused)
    for name in ("cat.txt", "letter.png", "tool.exe", "metadata.jsonl", "gone.png"):
        assert name in words
    assert str(tmp_path) not in words


def test_captions_without_photos_and_too_long_captions_are_refused(dataset, tmp_path):
    image, text = dropped(tmp_path, {"dog.png": stored_image(0), "dog.txt": b"x" * 501})
    assert add_photos(dataset, [text]).refused == ["There is no photo for the captions in 'dog.txt'. Add photos first."]
    assert "at most 500 characters" in add_photos(dataset, [image, text]).refused[0]


def test_a_zip_in_kohya_s_layout_adds_its_subject_and_reports_the_other_files(dataset, tmp_path):
    files = {"10_sks toy/0.png": stored_image(0), "10_sks toy/0.txt": b"a toy", "1_toy/3.png": stored_image(1)}
    added = add_photos(dataset, [zipped(tmp_path / "set.zip", files)])
    assert captions(dataset) == {"0.png": "a toy"}
    assert "Not used: '1_toy'" in added.refused[0]
    assert "Repeats are ignored" in added.notes[0]


@pytest.mark.parametrize(
    ("files", "message"),
    [
        (["red hat/0.png", "blue mug/1.png"], "contains several subjects"),
        (["cover.png", "blue mug/1.png"], "beside folders of images"),
        (["a/b/1.png"], "holds no image"),
        (["../1.png"], "1.png"),
    ],
)
def test_a_zip_without_photos_of_one_subject_is_refused(dataset, tmp_path, files, message):
    path = zipped(tmp_path / "set.zip", {name: stored_image(place) for place, name in enumerate(files)})
    added = add_photos(dataset, [path])
    assert not added.names
    (sentence,) = added.refused
    assert message in sentence
    assert str(tmp_path) not in sentence


def test_the_page_distinguishes_masks_and_captions_as_the_scan_does(dataset):
    added = add_photos(dataset, sorted((case_folder("photos-masks") / "masks_beside").iterdir()))
    assert list(captions(dataset)) == ["00.png", "01.png", "02.png"]
    assert "'00-masklabel.png'" in added.refused[0]


@pytest.mark.parametrize("content", ["", "[]", '{"folder": 3, "long_prompts": [3]}', '{"folder": {"files": []}}'])
def test_a_report_of_another_form_is_ignored(tmp_path, content):
    (tmp_path / "photos.json").write_text(content)
    assert notes(RunView(RunRecord(tmp_path))) == []


def test_the_unused_files_of_a_run_s_folder_are_listed(tmp_path):
    # In the form that training writes.
    entry = {"path": "/x/<b>.mp4", "use": "unused", "kind": "video", "subject": "", "image": None, "detail": "", "reason": ""}
    note = {"kind": "repeats_ignored", "words": "Repeats are ignored.", "is_warning": True}
    report = {"folder": {"folder": "/x", "files": [entry], "notes": [note]}, "long_prompts": [{"summary": "It is cut."}]}
    (tmp_path / "photos.json").write_text(json.dumps(report))
    unused, note, cut = notes(RunView(RunRecord(tmp_path)))
    assert unused.startswith("Not used: '<b>.mp4'. Videos are not read.")
    assert (note, cut) == ("Repeats are ignored.", "It is cut.")


@pytest.mark.parametrize(
    ("name", "caption"),
    [
        ("duck on the beach.jpg", "a photo of sks duck, duck on the beach"),
        ("red_mug-table_2.PNG", "a photo of sks duck, red mug table"),
        ("IMG_20260101_120000.jpg", ""),
        ("WhatsApp Image 2026-01-01 at 12.00.00.jpeg", ""),
        ("pasted 1.png", ""),
        ("PXL_20260101_portrait.jpg", ""),
        ("sks duck.jpg", ""),
    ],
)
def test_a_caption_is_proposed_only_if_the_file_name_says_something(name, caption):
    assert _proposal("a photo of sks duck", name) == caption
