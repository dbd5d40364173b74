"""Classification on the command line: prints and writes the predictions of the classifier."""

import csv
import io
import os
import re
import sys

import pytest
import torch
from command_line import exit_status
from image_sets import stored_image, write_files
from tiny_clip import base_sha256

from pipelines import mini_clip
from pipelines.fewshot.baselines.predictors import LinearHead, Predictor
from pipelines.fewshot.classifier import ClassifierFile, FewShotClassifier, save_classifier
from pipelines.fewshot.classify import main

CLASSES = ("red star", "cat", "grey dog")


@pytest.fixture(autouse=True)
def _here(tmp_path, monkeypatch):
    """Run in a temporary folder, which names are relative to."""
    monkeypatch.chdir(tmp_path)


@pytest.fixture
def run(random_clip, tmp_path):
    told = ClassifierFile("zeroshot", str(random_clip), None, base_sha256(random_clip), CLASSES, CLASSES, ("a {}.",))
    save_classifier(tmp_path / "run", told)
    return "run"


@pytest.fixture
def images(tmp_path):
    """Three images, two of them in folders, beside other files."""
    names = ["photos/b.png", "photos/a/c.png", "photos/a/d.JPG"]
    files = {name: stored_image(place, side=64) for place, name in enumerate(names)}
    write_files(tmp_path, files | {"photos/notes.txt": b"no image", "photos/.hidden/e.png": b"no image"})
    return ["photos/a/c.png", "photos/a/d.JPG", "photos/b.png"]


def rows_of(path):
    with path.open(encoding="utf-8", newline="") as file:
        return list(csv.reader(file))


@pytest.mark.parametrize("batch_size", ["1", "2", "64"])
def test_predictions_are_printed_and_written(run, images, tmp_path, capsys, batch_size):
    assert main([run, "photos", "--output", "out/all.csv", "--top", "2", "--batch_size", batch_size]) == 0
    expected = FewShotClassifier.from_run(run).predict(images)
    header, *rows = rows_of(tmp_path / "out" / "all.csv")
    assert header == ["image", "class", "probability", *CLASSES]
    assert [row[:2] for row in rows] == [list(pair) for pair in zip(images, expected.labels, strict=True)]
    found = torch.tensor([list(map(float, row[3:])) for row in rows])
    torch.testing.assert_close(found, expected.probabilities, atol=1e-5, rtol=0)
    printed = capsys.readouterr().out.splitlines()
    assert re.split("  +", printed[0]) == ["image", "class", "probability", "alternatives"]
    for line, name, (best, other) in zip(printed[1:], images, expected.top(2), strict=True):
        assert re.split("  +", line) == [name, best[0], f"{best[1]:.1%}", f"{other[0]} {other[1]:.1%}"]


def test_a_file_given_twice_is_classified_once(run, images, tmp_path, capsys):
    (tmp_path / "picture").write_bytes(stored_image(9, side=64))
    assert main([run, "picture", "photos/b.png", "photos", "--top", "1"]) == 0
    names = [line.split()[0] for line in capsys.readouterr().out.splitlines()[1:]]
    assert names == ["picture", "photos/b.png", "photos/a/c.png", "photos/a/d.JPG"]


@pytest.mark.parametrize("batch_size", ["1", "2", "64"])
def test_unreadable_images_are_named_and_the_others_classified(run, images, tmp_path, capsys, batch_size):
    (tmp_path / "photos" / "a" / "d.JPG").write_bytes(stored_image(1, side=64)[:-500])
    assert main([run, *images, "--output", "all.csv", "--batch_size", batch_size]) == 1
    expected = FewShotClassifier.from_run(run).predict([images[0], images[2]])
    rows = rows_of(tmp_path / "all.csv")[1:]
    assert [row[:2] for row in rows] == [[images[0], expected.labels[0]], [images[2], expected.labels[1]]]
    said = [line for line in capsys.readouterr().err.splitlines() if "cannot be read" in line]
    assert len(said) == 1
    assert said[0].startswith("'photos/a/d.JPG' cannot be read as an image")


def test_without_readable_images_nothing_is_written(run, tmp_path, capsys):
    write_files(tmp_path, {"bad/a.png": b"no image", "bad/b.png": b"no image either"})
    assert main([run, "bad", "--output", "all.csv"]) == 1
    assert not (tmp_path / "all.csv").exists()
    told = capsys.readouterr()
    assert told.out == ""
    assert "bad/a.png" in told.err
    assert "bad/b.png" in told.err


def test_no_cell_of_the_csv_is_a_formula(run, tmp_path):
    names = ["=1+1.png", "+1.png", "-1.png", "@a.png", "plain, with a comma.png"]
    write_files(tmp_path, {name: stored_image(place, side=64) for place, name in enumerate(names)})
    classes = ["=SUM(A1)", "@boat"]
    arguments = [run, "--add_class", *classes, "--output", "all.csv", "--", *names]
    assert main(arguments) == 0
    header, *rows = rows_of(tmp_path / "all.csv")
    assert not [cell for row in (header, *rows) for cell in row if cell[0] in "=+-@\t\r"]
    assert header[-2:] == ["'=SUM(A1)", "'@boat"]
    assert [row[0] for row in rows] == [f"'{name}" for name in names[:4]] + names[4:]


def test_classes_can_be_added_by_name(run, images, tmp_path, capsys):
    assert main([run, "photos", "--add_class", "teapot", "boat", "--output", "all.csv", "--top", "99"]) == 0
    expected = FewShotClassifier.from_run(run).with_classes("teapot", "boat").predict(images)
    header, *rows = rows_of(tmp_path / "all.csv")
    assert header[3:] == [*CLASSES, "teapot", "boat"]
    torch.testing.assert_close(torch.tensor([list(map(float, row[3:])) for row in rows]), expected.probabilities)
    for line in capsys.readouterr().out.splitlines()[1:]:
        assert all(name in line for name in expected.classes)


def test_another_path_of_the_base_model_can_be_given(random_clip, images, tmp_path):
    save_classifier(
        tmp_path / "moved", ClassifierFile("zeroshot", "gone", None, base_sha256(random_clip), CLASSES, CLASSES, ("a {}.",))
    )
    assert main(["moved", "photos", "--model", str(random_clip)]) == 0


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["nowhere", "photos"], "There is no classifier at 'nowhere'"),
        (["run", "nowhere.png"], "There is no file or folder 'nowhere.png'"),
        (["run", "photos", "empty"], "There is no image in the folder 'empty'"),
        (["run", "photos", "--top", "0"], "top must be at least 1, got 0"),
        (["run", "photos", "--batch_size", "-1"], "batch_size must be at least 1, got -1"),
        (["run", "photos", "--device", "gpu"], "device must be available to PyTorch on this machine"),
        (["run", "photos", "--model", "ViT-Q"], "model must be 'mini'"),
        (["run", "photos", "--add_class", "cat"], "The name of a new class must not be empty or in use, got 'cat'"),
        (["probe", "photos", "--add_class", "boat"], "'boat' cannot be added"),
        (["run", "photos", "--output", "empty.csv"], "--output must be a file, but 'empty.csv' is a folder"),
        (["run", "photos", "--output", "all.xlsx"], "--output must be a .csv file, got 'all.xlsx'"),
        (["subject", "photos"], "is a subject run, not a few-shot run: generate images with"),
        (["moved", "photos"], "was fitted on the model '/gone/clip', which no longer exists. Give --model"),
        (["relative", "photos"], "If it has moved, give --model"),
        (["broken", "photos"], "is a pickle or zip archive"),
    ],
)
def test_bad_input_ends_with_a_message_and_exit_code_2(run, random_clip, images, tmp_path, capsys, arguments, message):
    for name in ("empty", "empty.csv", "subject"):
        (tmp_path / name).mkdir()
    (tmp_path / "subject" / "options.json").write_text('{"model": {"pretrained_model_name_or_path": "owner/model"}}')
    for name, model in (("moved", "/gone/clip"), ("relative", "gone")):
        of_gone = ClassifierFile("zeroshot", model, None, base_sha256(random_clip), CLASSES, CLASSES, ("a {}.",))
        save_classifier(tmp_path / name, of_gone)
    probe = ClassifierFile("gda", str(random_clip), None, base_sha256(random_clip), CLASSES, CLASSES, ("a {}.",))
    save_classifier(tmp_path / "probe", probe, predictor=Predictor(LinearHead.unbiased(torch.ones(3, mini_clip.EMBED_DIM)), 1))
    probe.write(tmp_path / "broken" / "classifier.json")
    torch.save({}, tmp_path / "broken" / "predictor.safetensors")
    with pytest.raises(SystemExit) as ended:
        main(arguments)
    assert ended.value.code == 2
    (line,) = (line for line in capsys.readouterr().err.splitlines() if line.startswith("error: "))
    assert message in line


def test_an_unknown_flag_ends_with_exit_code_2(run, images, capsys):
    with pytest.raises(SystemExit) as ended:
        main([run, "photos", "--topp", "3"])
    assert ended.value.code == 2
    assert "unrecognized arguments: --topp 3" in capsys.readouterr().err


def test_the_module_is_a_command(run, images, capsys):
    assert exit_status("pipelines.fewshot.classify", run, "photos") == 0
    assert "photos/b.png" in capsys.readouterr().out


def test_names_that_are_not_utf_8_are_printed_and_written(run, tmp_path, monkeypatch):
    (tmp_path / "photos").mkdir()
    for name, content in ((b"\xff.png", stored_image(0, side=64)), (b"\xfe.png", b"damaged")):
        try:
            (tmp_path / "photos" / os.fsdecode(name)).write_bytes(content)
        except OSError:
            pytest.skip("This file system takes no name that is not UTF-8.")
    streams = {name: io.TextIOWrapper(io.BytesIO(), encoding="utf-8", write_through=True) for name in ("stdout", "stderr")}
    for name, stream in streams.items():
        monkeypatch.setattr(sys, name, stream)
    assert main([run, "photos", "--output", "all.csv"]) == 1
    assert rows_of(tmp_path / "all.csv")[1][0] == r"photos/\udcff.png"
    assert r"photos/\udcff.png" in streams["stdout"].buffer.getvalue().decode("utf-8")
    assert r"photos/\udcfe.png" in streams["stderr"].buffer.getvalue().decode("utf-8")
