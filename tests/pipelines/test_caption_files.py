"""Captions in the formats of several programs: which are read, their precedence, and notes on the others."""

import json
from itertools import pairwise
from pathlib import Path

import pytest
from PIL import Image
from shared_cases import case_folder

from pipelines.errors import InputError
from pipelines.subject.caption_files import read_captions
from pipelines.subject.captions import find_captioned
from pipelines.subject.folder_scan import scan_folder


@pytest.fixture
def album(tmp_path):
    """Two images."""
    folder = tmp_path / "album"
    folder.mkdir()
    for name in ("00.jpg", "01.jpg"):
        Image.new("RGB", (8, 8)).save(folder / name)
    return folder


def captions(folder):
    """Captions by file name."""
    return {path.name: caption.text for path, caption in read_captions(scan_folder(folder)).by_image.items()}


def account(folder):
    return read_captions(scan_folder(folder)).account


def notes(folder):
    return {note.kind: note.words for note in account(folder).notes}


def use(folder):
    return {entry.path.name: (entry.use, entry.kind) for entry in account(folder).entries}


def lines(*values):
    return "\n".join(map(json.dumps, values))


@pytest.mark.parametrize("name", ["00.txt", "00.TXT", "00.caption", "00.Caption", "00.jpg.txt", "00.jpg.CAPTION"])
def test_a_text_file_with_the_images_name_is_its_caption(album, name):
    (album / name).write_bytes(b"\xef\xbb\xbfsks toy \r\n")
    assert captions(album) == {"00.jpg": "sks toy"}
    assert use(album)[name] == ("caption", "")
    assert notes(album)["captions"].startswith("Captions of 1 of 2 images: 1 from NAME")
    assert notes(album)["captions"].endswith("Without a caption: '01.jpg'.")


METADATA = {
    "metadata.jsonl": lines({"file_name": "00.jpg", "text": "zero"}, {"file_name": "01.jpg", "text": "one"}),
    "Metadata.CSV": "file_name,text\n00.jpg,zero\n01.jpg,one\n",
    "metadata.csv": '\ufeffimage;caption;source\r\n00.jpg;zero;web\r\n"01.jpg";"one";web\r\n',
    "metadata.json": json.dumps([{"file_name": "00.jpg", "caption": "zero"}, {"file_name": "01.jpg", "text": "one"}]),
    "meta_cap.json": json.dumps({"00": {"caption": "zero"}, "01": {"caption": "one"}}),
    "meta_lat.json": json.dumps({"/of/another/machine/00.jpg": {"caption": "zero"}, "C:\\x\\01.jpg": {"tags": "one"}}),
}


@pytest.mark.parametrize("name", METADATA)
def test_captions_are_read_from_metadata(album, name):
    (album / name).write_text(METADATA[name], encoding="utf-8")
    assert captions(album) == {"00.jpg": "zero", "01.jpg": "one"}
    assert use(album)[name] == ("metadata", "")
    assert notes(album)["captions"] == f"Captions of 2 of 2 images: 2 from {name}."


def test_quoted_captions_in_a_csv_keep_commas_quotes_and_line_breaks(album):
    (album / "metadata.csv").write_text('file_name,text\n00.jpg,"a ""sks"" toy, on\na sofa"\n')
    assert captions(album) == {"00.jpg": 'a "sks" toy, on\na sofa'}


def test_sd_scripts_tags_follow_the_caption(album):
    (album / "metadata.json").write_text(json.dumps({"00": {"caption": "a toy", "tags": "red, small"}, "01": {"tags": "blue"}}))
    assert captions(album) == {"00.jpg": "a toy, red, small", "01.jpg": "blue"}


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("file_name,words\n00.jpg,a\n", r"Line 2 of .*metadata\.csv' must have a 'text'.* The columns are 'file_name', 'words'"),
        ("file_name,text\n00.jpg,\n", "Line 2 .*must have a 'text' that is not empty, got ''"),
        ("file_name,text\n00.jpg,a,b\n", "Line 2 .*more cells than the first line"),
        ("file_name,text\n99.jpg,a\n", r"Line 2 .*names '99\.jpg', which does not exist"),
        ('file_name,text\n00.jpg,"a\n', "is not CSV"),
        (f"file_name,text\n{'0' * 300}.jpg,a\n", "which does not exist"),
    ],
)
def test_an_invalid_row_is_reported_with_its_number(album, text, message):
    (album / "metadata.csv").write_text(text)
    with pytest.raises(InputError, match=message):
        captions(album)


@pytest.mark.parametrize("encoding", ["utf-16", "cp1252"])
def test_metadata_in_another_encoding_is_reported_with_the_remedy(album, encoding):
    (album / "metadata.csv").write_bytes("file_name,text\n00.jpg,café\n".encode(encoding))
    with pytest.raises(InputError, match=r"metadata\.csv' .*Save it as UTF-8"):
        captions(album)


@pytest.mark.parametrize(
    "text",
    [
        "{",
        "[" * 20_000,
        "9" * 5000,
        "3",
        '["00.jpg"]',
        '{"00": {"size": 3}}',
        '{"version": 1}',
        "[]",
        '[{"file_name": "00.jpg"}]',
    ],
)
@pytest.mark.parametrize("name", ["metadata.json", "meta_dd.json"])
def test_unreadable_metadata_of_another_program_is_reported(album, name, text):
    (album / name).write_text(text)
    assert captions(album) == {}
    assert use(album)[name] == ("unused", "foreign_caption")
    assert f"'{name}'" in account(album).warnings()[0]


@pytest.mark.parametrize("spelling", ["absolute", "./", "../album/", "linked folder", "linked image"])
@pytest.mark.parametrize("given", ["absolute", "relative", "link"])
def test_paths_are_compared_resolved(album, tmp_path, monkeypatch, spelling, given):
    (tmp_path / "link").symlink_to(album)
    (album / "alias.jpg").symlink_to(album / "00.jpg")
    name = {
        "absolute": str(album / "00.jpg"),
        "./": "./00.jpg",
        "../album/": "../album/00.jpg",
        "linked folder": str(tmp_path / "link" / "00.jpg"),
        "linked image": "alias.jpg",
    }[spelling]
    (album / "metadata.jsonl").write_text(lines({"file_name": name, "text": "zero"}))
    monkeypatch.chdir(tmp_path)
    folder = {"absolute": album, "relative": Path("album"), "link": tmp_path / "link"}[given]
    by_name = {image.path.name: image.prompt for image in find_captioned(folder, "else")}
    assert by_name["00.jpg"] == "zero"
    assert by_name["01.jpg"] == "else"


def test_two_links_to_one_image_keep_their_own_captions(album):
    for name in ("a.jpg", "b.jpg"):
        (album / name).symlink_to(album / "00.jpg")
    (album / "metadata.jsonl").write_text(lines({"file_name": "a.jpg", "text": "A"}, {"file_name": "b.jpg", "text": "B"}))
    assert captions(album) == {"a.jpg": "A", "b.jpg": "B"}


@pytest.mark.parametrize("separator", ["/", "\\"])
@pytest.mark.parametrize("form", ["metadata.jsonl", "metadata.csv"])
def test_a_metadata_file_in_the_parent_folder_has_captions_of_subjects_images(album, tmp_path, separator, form):
    album.rename(tmp_path / "red_hat")
    rows = {"metadata.jsonl": lines({"file_name": f"red_hat{separator}00.jpg", "text": "zero"})}
    rows["metadata.csv"] = f"file_name,text\nred_hat{separator}00.jpg,zero\n"
    (tmp_path / form).write_text(rows[form])
    assert captions(tmp_path) == {"00.jpg": "zero"}


ORDER = ["metadata.jsonl", "metadata.csv", "metadata.json", "meta_cap.json", "00.txt", "00.caption", "00.jpg.txt"]


@pytest.mark.parametrize(("first", "second"), list(pairwise(ORDER)))
def test_if_two_sources_differ_the_first_is_used_and_the_other_reported(album, first, second):
    texts = {
        ".jsonl": '{"file_name": "00.jpg", "text": "by WHO"}',
        ".csv": "file_name,text\n00.jpg,by WHO\n",
        ".json": '{"00.jpg": "by WHO"}',
    }
    for name in (first, second):
        (album / name).write_text(texts.get(Path(name).suffix, "by WHO").replace("WHO", name))
    assert captions(album) == {"00.jpg": f"by {first}"}
    assert use(album)[second] == ("unused", "other_caption")
    labels = [name.replace("00", "NAME", 1) if name.startswith("00") else name for name in (first, second)]
    assert notes(album)["caption_conflict"] == f"{labels[0]} and {labels[1]} differ; {labels[0]} is used for '00.jpg'."


def test_sources_that_agree_raise_no_warning(album):
    (album / "00.txt").write_text("a toy")
    (album / "00.caption").write_text("a toy\n")
    assert use(album)["00.caption"] == ("unused", "same_caption")
    assert account(album).warnings() == []


def test_captions_of_other_files_and_repeated_captions_are_reported(album):
    Image.new("L", (8, 8)).save(album / "00_mask.png")
    rows = [("00.jpg", "a"), ("00.jpg", "b"), ("00_mask.png", "m")]
    (album / "metadata.jsonl").write_text(lines(*({"file_name": name, "text": text} for name, text in rows)))
    assert captions(album) == {"00.jpg": "b"}
    assert "'00.jpg'" in notes(album)["captions_repeated"]
    assert "'00_mask.png'" in notes(album)["captions_unused"]


@pytest.mark.parametrize(
    ("name", "ending"),
    [("captions_caption_ext", ", view 0"), ("captions_kohya_json", " 0"), ("captions_metadata_csv", " in place 0"),
     ("captions_metadata_json", " in place 0"), ("captions_uppercase_txt", " view 0")],
)  # fmt: skip
def test_the_reported_captions_are_read(name, ending):
    found = find_captioned(case_folder("photos-captions-elsewhere") / name, "the instance prompt")
    assert len(found) >= 3
    assert found[0].prompt == f"a photo of sks toy{ending}"
    assert "the instance prompt" not in {image.prompt for image in found}
