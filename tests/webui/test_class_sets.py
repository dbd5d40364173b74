"""The user's classes: which pictures are tested on for good, what is warned of, and what the presets make of them."""

import json
import subprocess
from pathlib import Path

import psutil
import pytest
from class_folders import COLOURS, colour_folder, colour_set, coloured

from pipelines.errors import InputError
from pipelines.fewshot.loading import load_folder
from pipelines.fewshot.shots import sample_split
from webui import class_presets, class_runs, class_sets, panel
from webui.class_presets import CLASSIFY
from webui.draft import merged
from webui.picture_sets import add_class, move_picture, read_set, remove_picture, rename_class
from webui.presets import preset_named
from webui.uploads import add_pictures
from webui.workspace import Workspace


@pytest.fixture
def workspace(tmp_path):
    """An empty one."""
    return Workspace(tmp_path / "runs", tmp_path / "sets", is_local=True)


@pytest.fixture
def folder(workspace, tmp_path):
    """A set of three classes of six pictures."""
    return colour_set(workspace, tmp_path / "given")


def more(folder, key, name, places, scratch):
    """Add further pictures to a class; returns what they are called."""
    scratch.mkdir()
    for place in places:
        (scratch / f"{place}.png").write_bytes(coloured(name, place))
    return add_pictures(folder, sorted(scratch.iterdir()), key).names


def test_the_recipe_tests_on_the_pictures_that_the_set_keeps_for_it(folder):
    split = sample_split(load_folder(folder), "all", 0)
    kept = class_sets.read_split(folder)
    assert {name for name, _ in split.names["test"]} == kept["test"]
    assert {name for part in ("train", "val") for name, _ in split.names[part]} == kept["train"]
    assert [sum(name.startswith(key) for name in kept["test"]) for key in ("c00", "c01", "c02")] == [2, 2, 2]


def test_pictures_added_later_fill_up_the_test_and_move_none_out_of_it(folder, tmp_path):
    before = class_sets.read_split(folder)
    added = more(folder, "c00", "ruby", range(20, 30), tmp_path / "more")
    class_sets.settle(folder)
    after = class_sets.read_split(folder)
    assert before["test"] < after["test"]
    assert before["train"] < after["train"]
    # Three in ten of sixteen are five, of which two were there.
    assert len(set(added) & after["test"]) == 3


def test_corrections_are_learned_from_and_never_tested_on(folder, tmp_path):
    before = class_sets.read_split(folder)
    (tmp_path / "new").mkdir()
    files = [tmp_path / "new" / f"{place}.png" for place in range(10)]
    for place, file in enumerate(files):
        file.write_bytes(coloured("ruby", 100 + place))
    added = class_sets.add_corrections(folder, {"c00": files})
    assert len(added.names) == 10
    assert class_sets.read_split(folder)["test"] == before["test"]
    class_sets.settle(folder)
    assert not set(added.names) & class_sets.read_split(folder)["test"]


def test_after_pictures_are_removed_or_moved_the_recipe_still_reads_the_set(folder):
    tested = sorted(class_sets.read_split(folder)["test"])[0]
    remove_picture(folder, tested)
    moved = move_picture(folder, read_set(folder).classes[1].pictures[0].file, "c02")
    class_sets.settle(folder)
    parts = load_folder(folder).parts
    assert tested not in parts
    assert moved in parts


def test_names_go_to_the_recipe_by_the_folders(folder, workspace):
    rename_class(folder, "c01", "green leaf")
    options = class_sets.find(workspace, folder.name).data_options()
    assert options["data_dir"] == str(folder.absolute())
    assert options["class_names"] == ["c00=ruby", "c01=green leaf", "c02=sea"]


def test_what_stands_in_the_way_is_said_in_words(workspace, tmp_path):
    folder = workspace.new_picture_set()
    assert "no classes yet" in class_sets.warnings(class_sets.own_set(folder))[0]
    more(folder, add_class(folder, "ruby"), "ruby", range(20), tmp_path / "a")
    assert "one class only" in class_sets.warnings(class_sets.own_set(folder))[0]
    more(folder, add_class(folder, "leaf"), "leaf", range(2), tmp_path / "b")
    found = class_sets.own_set(folder)
    assert "leaf has 2 pictures. Training needs 3" in class_sets.warnings(found)[0]
    assert not class_sets.is_ready(found)
    more(folder, "c01", "leaf", range(2, 4), tmp_path / "c")
    found = class_sets.own_set(folder)
    assert class_sets.is_ready(found)
    told = " ".join(class_sets.warnings(found))
    assert "leaf has fewer than 10 pictures" in told


def test_a_picture_in_two_classes_is_told(workspace, folder, tmp_path):
    assert class_sets.copies(class_sets.own_set(folder)) == []
    more(folder, "c02", "ruby", [0], tmp_path / "copy")
    (told,) = class_sets.copies(class_sets.own_set(folder))
    assert "1 picture is in ruby and sea alike" in told


def test_a_folder_of_the_machine_is_left_as_it_is(workspace, tmp_path):
    given = colour_folder(tmp_path / "mine", 4)
    before = sorted(path.name for path in given.rglob("*"))
    set_id = class_sets.point_to(workspace, str(given))
    class_sets.name_pointed_class(workspace.picture_set(set_id), "sea", "the sea")
    found = class_sets.find(workspace, set_id)
    assert found.kind == "folder"
    assert found.data_options() == {"data_dir": str(given), "class_names": ["sea=the sea"]}
    assert sorted(path.name for path in given.rglob("*")) == before
    assert class_sets.class_sets(workspace) == [set_id]


@pytest.mark.parametrize(("name", "words"), [("leaf", "name of its own"), ("  ", "one line of text")])
def test_a_class_of_a_folder_takes_no_name_that_training_would_refuse(workspace, tmp_path, name, words):
    folder = workspace.picture_set(class_sets.point_to(workspace, str(colour_folder(tmp_path / "mine", 4))))
    with pytest.raises(InputError, match=words):
        class_sets.name_pointed_class(folder, "sea", name)
    assert class_sets.find(workspace, folder.name).names() == {name: name for name in sorted(COLOURS)}


def test_guests_name_no_folder_of_the_machine(tmp_path):
    guest = Workspace(tmp_path / "runs", tmp_path / "sets", "ann", is_local=False)
    given = colour_folder(tmp_path / "mine", 4)
    with pytest.raises(InputError, match="only by who works at it"):
        class_sets.point_to(guest, str(given))
    host = Workspace(tmp_path / "runs", tmp_path / "sets", is_local=True)
    with pytest.raises(InputError, match="only by who works at it"):
        class_sets.find(guest, class_sets.point_to(host, str(given)))


@pytest.mark.parametrize("path", ["", "  ", "/no/such/folder"])
def test_a_folder_that_is_none_is_refused(workspace, path):
    with pytest.raises(InputError, match="There is no folder"):
        class_sets.point_to(workspace, path)


def test_the_example_is_a_set_of_ten_digits(workspace):
    found = class_sets.find(workspace, class_sets.EXAMPLE)
    assert found.names() == {str(digit): str(digit) for digit in range(10)}
    assert found.count == 1797
    assert found.data_options() == {}


def test_as_many_pictures_are_learned_from_as_every_class_has(folder, workspace, tmp_path):
    classes = class_sets.find(workspace, folder.name)
    # Four of six are left: two to learn from and two to choose on.
    assert class_presets.fitting_shots(classes, ["2"]) == ["2"]
    assert class_presets.fitting_shots(classes, ["16"]) == ["all"]
    split = sample_split(load_folder(folder), 2, 0)
    assert len(split.names["train"]) == 6
    with pytest.raises(InputError, match="fewer shots"):
        sample_split(load_folder(folder), 3, 0)


def test_a_users_own_number_of_pictures_is_left_as_it_is(folder, workspace):
    classes, fast = class_sets.find(workspace, folder.name), preset_named(CLASSIFY, "Fast").options()
    assert class_presets.completed(classes, fast, {})["data"]["shots"] == ["all"]
    own = {"data": {"shots": ["3"]}}
    assert class_presets.completed(classes, fast | {"data": {"shots": ["3"]}}, own)["data"]["shots"] == ["3"]


def test_all_pictures_of_large_classes_take_no_hours(workspace):
    best = preset_named(CLASSIFY, "Best").options()
    found = class_presets.completed(class_sets.find(workspace, class_sets.EXAMPLE), best, {})
    fewest = 174 - round(0.3 * 174)
    assert found["optimisation"]["iterations_per_shot"] == class_presets.MOST_STEPS // fewest


@pytest.mark.parametrize("name", [preset.name for preset in CLASSIFY])
def test_every_preset_is_one_that_the_recipe_takes(name, folder, workspace):
    from webui.work.options import build

    values = class_presets.completed(class_sets.find(workspace, folder.name), preset_named(CLASSIFY, name).options(), {})
    options = build(workspace, "classify", values)
    assert "nora" in options.method.method
    assert options.data.data_dir == str(Path(folder).absolute())


def test_the_set_that_a_run_was_trained_on_is_found_again(folder, workspace, tmp_path):
    run = workspace.new_run()
    (run / "status.json").write_text("{}")
    for data_dir, expected in ((str(folder.absolute()), folder.name), (None, class_sets.EXAMPLE), (str(tmp_path), None)):
        (run / "options.json").write_text(json.dumps({"data": {"data_dir": data_dir}}))
        assert class_sets.set_of_run(workspace, workspace.run(run.name)) == expected


def test_pictures_that_a_run_is_learning_from_stay(folder, workspace):
    run = workspace.new_run()
    launch = {"task": "classify", "options": {"data": {"data_dir": str(folder.absolute())}}, "created": 0.0}
    (run / "launch.json").write_text(json.dumps(launch))
    sleeping = subprocess.Popen(["sleep", "60"])
    own = {"pid": sleeping.pid, "pid_started": psutil.Process(sleeping.pid).create_time()}
    try:
        (run / "status.json").write_text(json.dumps({"state": "running", "phase": "fitting", **own}))
        with pytest.raises(InputError, match="is learning from these pictures"):
            class_runs.check_free(workspace, folder)
    finally:
        sleeping.kill()
        sleeping.wait()
    class_runs.check_free(workspace, folder)


def test_a_set_is_called_by_its_classes(folder, workspace):
    assert class_sets.title(workspace, folder.name) == f"{', '.join(COLOURS)} (18 pictures)"


def test_what_is_typed_into_the_expert_panel_is_started(folder, workspace):
    about = panel.Source(None, "classify", CLASSIFY, None, None, class_runs.complete)
    draft = {"set": folder.name, "preset": "Fast", "options": {}, "typed": {"optimisation": {"min_train_steps": "4"}}}
    settled = about.settled(workspace, draft)
    assert settled["options"] == {"optimisation": {"min_train_steps": 4}}
    values = class_runs.complete(workspace, settled, merged(about.preset(settled).options(), settled["options"]))
    assert values["optimisation"] == {"min_train_steps": 4}
    assert values["data"]["data_dir"] == str(folder.absolute())
