"""The command of a classifier on the user's own set, started as the page starts it, and the next one with a correction."""

import json
import time

import pytest
from class_folders import colour_set, coloured

from webui import class_files, class_html, class_runs, class_sets, launching
from webui.class_presets import CLASSIFY
from webui.class_results import result_of, source_of
from webui.draft import merged
from webui.picture_sets import rename_class
from webui.presets import preset_named
from webui.views import RunView
from webui.work.classify import classify
from webui.workspace import Workspace

QUICK = {"method": {"method": ["zeroshot", "nora"]}, "optimisation": {"min_train_steps": 2, "iterations_per_shot": 1}}
PATIENCE = 900


def ended(workspace, run_id):
    """The run, once it is at work no longer."""
    end = time.monotonic() + PATIENCE
    while RunView(workspace.run(run_id)).is_active and time.monotonic() < end:
        time.sleep(1)
    view = RunView(workspace.run(run_id))
    assert view.state == "done", launching.log_tail(view.record)
    return view.record


def parts_of(record):
    """The pictures of each part that a run drew."""
    (path,) = (record.path / "splits").glob("*.json")
    split = json.loads(path.read_text())
    return {part: {name for name, *_ in split[part]} for part in ("train", "val", "test")}


@pytest.mark.slow
def test_a_classifier_of_the_users_own_pictures_and_the_next_with_a_correction(tmp_path):
    workspace = Workspace(tmp_path / "runs", tmp_path / "sets", is_local=True)
    folder = colour_set(workspace, tmp_path / "given")
    rename_class(folder, "c01", "green = <leaf>")
    draft = {"set": folder.name, "preset": "Fast", "options": QUICK}
    values = class_runs.complete(workspace, draft, merged(preset_named(CLASSIFY, "Fast").options(), QUICK))
    first = ended(workspace, launching.start(workspace, "classify", values))

    result = result_of(first)
    assert result.classes == ["ruby", "green = <leaf>", "sea"]
    assert len(result.tested()) == result.member["test"]["count"] == 6
    assert all(source_of(first, one) is not None for one in result.tested())
    assert "of 6 pictures that it was not shown" in class_html.in_words(result)
    assert set(class_files.downloads(result)) == set(class_files.TITLES)
    assert parts_of(first)["test"] == class_sets.read_split(folder)["test"]

    new = tmp_path / "new.png"
    new.write_bytes(coloured("sea", 77))
    (row,) = classify(first, [new])
    assert row["class"] in result.classes
    again = ended(workspace, class_runs.train_again(workspace, first, {"sea": [new]})[1])
    before, after = parts_of(first), parts_of(again)
    assert after["test"] == before["test"]
    learned = (after["train"] | after["val"]) - (before["train"] | before["val"])
    assert [name.split("/")[0] for name in learned] == ["c02"]
    assert again.options()["optimisation"]["min_train_steps"] == 2
