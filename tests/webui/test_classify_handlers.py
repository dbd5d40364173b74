"""The event listeners of the screen Classify, without a browser."""

from pathlib import Path

import gradio as gr
import pytest
from class_folders import COLOURS, colour_folder, colour_set, colour_zip, coloured, finished_classifier
from listeners import listener

from webui import launching
from webui.datasets import Dataset
from webui.page import build_page
from webui.settings import Settings

DRAFT = {"set": None, "preset": "Fast", "options": {}}
NAMES = {name: name for name in COLOURS}


@pytest.fixture(scope="module")
def settings(tmp_path_factory):
    """The settings of a server with its own folders."""
    home = tmp_path_factory.mktemp("server")
    return Settings(home / "runs", home / "sets")


@pytest.fixture(scope="module")
def page(settings):
    """The whole page."""
    return build_page(settings)


@pytest.fixture
def workspace(settings):
    """The workspace of the only user."""
    return settings.workspace(None)


@pytest.fixture
def record(workspace, tmp_path):
    """A finished run."""
    return finished_classifier(workspace, colour_folder(tmp_path / "pictures", 6), NAMES)


def test_train_starts_the_displayed_command(page, workspace, tmp_path, monkeypatch):
    dataset, started = colour_set(workspace, tmp_path / "given"), []
    monkeypatch.setattr(launching, "start", lambda workspace, task, values: started.append((task, values)) or "run")
    draft = {**DRAFT, "set": dataset.id}
    describe = listener(page, "class_train", "describe")
    assert describe("photos", draft, None) == (gr.skip(),) * 4
    about, preset, _, command = describe("classify", draft, None)
    assert "6 of its 18 images are test images" in about
    assert preset == "Fast"
    listener(page, "class_train", "start")(draft, None)
    ((task, values),) = started
    assert task == "classify"
    assert f"--data_dir {dataset.folder.absolute()}" in command
    assert f"--class_names {' '.join(values['data']['class_names'])}" in command
    assert values["data"]["shots"] == ["all"]


def test_no_run_starts_on_a_dataset_that_is_not_ready(page, workspace, tmp_path):
    dataset = colour_set(workspace, tmp_path / "given", each=2)
    with pytest.raises(gr.Error, match="Training needs at least 3 per class"):
        listener(page, "class_train", "start")({**DRAFT, "set": dataset.id}, None)


def test_a_zip_becomes_a_dataset_and_a_refused_one_leaves_nothing(page, workspace, tmp_path):
    take = listener(page, "class_images", "take_zip")
    before = len(list(workspace.sets.glob("*/set.json"))) if workspace.sets.is_dir() else 0
    draft, said, _ = take(str(colour_zip(tmp_path / "a.zip", 4)), {**DRAFT, "set": "example"}, None)
    assert "12 images added" in said
    assert [one.name for one in Dataset.of(workspace, draft["set"]).content().classes] == sorted(COLOURS)
    (tmp_path / "b.zip").write_text("no zip")
    with pytest.raises(gr.Error, match="not a zip"):
        take(str(tmp_path / "b.zip"), {**DRAFT, "set": "example"}, None)
    assert len(list(workspace.sets.glob("*/set.json"))) == before + 1


def test_the_result_is_shown_and_not_sent_again(page, record):
    refresh = listener(page, "class_result", "refresh")
    *shown, seen = refresh(record.path.name, None, None, None)
    assert any("test images are classified correctly" in str(one) for one in shown)
    again = refresh(record.path.name, None, seen, None)
    assert all(one == gr.skip() for one in again)


def test_a_cell_opens_its_images_and_an_unknown_cell_is_refused(page, record):
    opened = listener(page, "class_result", "open_cell")
    assert opened(record.path.name, None, gr.EventData(None, {"true": 0, "predicted": 1}), None).count("<img") == 2
    for strange in ({}, {"true": 0, "predicted": 7}, {"true": "0", "predicted": 1}, {"true": [0], "predicted": -1}):
        with pytest.raises(gr.Error, match="belongs to another classifier"):
            opened(record.path.name, None, gr.EventData(None, strange), None)


def test_a_missing_run_causes_no_error_on_the_page(page):
    for part, given in (("class_result", (None, None)), ("class_new", (None,)), ("class_train", (None,))):
        listener(page, part, "refresh")("no-such-run", *given, None)


def test_new_images_are_classified_with_a_table_to_download(page, record, tmp_path, monkeypatch):
    from webui import inference_jobs as work

    rows = [{"image": "=1.png", "class": "sea", "probability": 0.7, "top": [["sea", 0.7], ["ruby", 0.2], ["leaf", 0.1]]}]
    monkeypatch.setattr(work, "classify", lambda record, files, member: rows)
    (tmp_path / "new.png").write_bytes(coloured("sea", 5))
    kept, table = listener(page, "class_new", "classify")(record.path.name, None, [str(tmp_path / "new.png")], None)
    assert kept == [{**rows[0], "file": str(tmp_path / "new.png")}]
    path = Path(table.value if isinstance(table.value, str) else table.value["path"])
    assert path.read_text().splitlines()[1].startswith("'=1.png,sea,0.7")


def test_the_list_of_classifiers_follows_the_selected_run(page, record):
    assert listener(page, "classify", "follow")(record.path.name, None, None).value == record.path.name
    titles = listener(page, "classify", "keep")([], None)
    assert len(titles) == len(listener(page, "classify", "renew")(None, None).choices)
    assert listener(page, "classify", "keep")(titles, None) == gr.skip()
