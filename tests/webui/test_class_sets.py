"""Labelled datasets: their fixed test split, the warnings, and the options that the presets choose for them."""

import json
import subprocess
import zipfile
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
from webui.image_datasets import add_class, move_image, read_set, remove_image, rename_class
from webui.labelled_classes import EXAMPLE
from webui.presets import preset_named
from webui.screens import class_images
from webui.uploads import add_images, add_zip
from webui.workspace import Workspace


@pytest.fixture
def workspace(tmp_path):
    """An empty workspace."""
    return Workspace(tmp_path / "runs", tmp_path / "sets", is_local=True)


@pytest.fixture
def folder(workspace, tmp_path):
    """A dataset of three classes with six images each."""
    return colour_set(workspace, tmp_path / "given")


def more(folder, key, name, places, scratch):
    """Add further images to a class; returns their file names."""
    scratch.mkdir()
    for place in places:
        (scratch / f"{place}.png").write_bytes(coloured(name, place))
    return add_images(folder, sorted(scratch.iterdir()), key).names


def test_the_recipe_uses_the_test_split_of_the_dataset(folder):
    split = sample_split(load_folder(folder), "all", 0)
    kept = class_sets.read_split(folder)
    assert {name for name, _ in split.names["test"]} == kept["test"]
    assert {name for part in ("train", "val") for name, _ in split.names[part]} == kept["train"]
    assert [sum(name.startswith(key) for name in kept["test"]) for key in ("c00", "c01", "c02")] == [2, 2, 2]


def test_images_added_later_fill_up_the_test_split_and_move_none_out_of_it(folder, tmp_path):
    before = class_sets.read_split(folder)
    added = more(folder, "c00", "ruby", range(20, 30), tmp_path / "more")
    class_sets.update_split(folder)
    after = class_sets.read_split(folder)
    assert before["test"] < after["test"]
    assert before["train"] < after["train"]
    # 30% of sixteen images are five test images, two of which existed before.
    assert len(set(added) & after["test"]) == 3


def test_corrections_are_training_images_and_never_test_images(folder, tmp_path):
    before = class_sets.read_split(folder)
    (tmp_path / "new").mkdir()
    files = [tmp_path / "new" / f"{place}.png" for place in range(10)]
    for place, file in enumerate(files):
        file.write_bytes(coloured("ruby", 100 + place))
    added = class_sets.add_corrections(folder, {"c00": files})
    assert len(added.names) == 10
    assert class_sets.read_split(folder)["test"] == before["test"]
    class_sets.update_split(folder)
    assert not set(added.names) & class_sets.read_split(folder)["test"]


def test_the_recipe_reads_a_dataset_after_images_are_removed_or_moved(folder):
    tested = sorted(class_sets.read_split(folder)["test"])[0]
    remove_image(folder, tested)
    moved = move_image(folder, read_set(folder).classes[1].images[0].file, "c02")
    class_sets.update_split(folder)
    parts = load_folder(folder).parts
    assert tested not in parts
    assert moved in parts


def test_the_recipe_gets_class_names_by_folder(folder, workspace):
    rename_class(folder, "c01", "green leaf")
    options = class_sets.find(workspace, folder.name).data_options()
    assert options["data_dir"] == str(folder.absolute())
    assert options["class_names"] == ["c00=ruby", "c01=green leaf", "c02=sea"]


def test_warnings_name_what_prevents_training(workspace, tmp_path):
    folder = workspace.new_image_set()
    assert "no classes yet" in class_sets.warnings(class_sets.uploaded_set(folder))[0]
    more(folder, add_class(folder, "ruby"), "ruby", range(20), tmp_path / "a")
    assert "only one class" in class_sets.warnings(class_sets.uploaded_set(folder))[0]
    more(folder, add_class(folder, "leaf"), "leaf", range(2), tmp_path / "b")
    found = class_sets.uploaded_set(folder)
    assert "leaf has 2 images. Training needs at least 3" in class_sets.warnings(found)[0]
    assert not class_sets.is_ready(found)
    more(folder, "c01", "leaf", range(2, 4), tmp_path / "c")
    found = class_sets.uploaded_set(folder)
    assert class_sets.is_ready(found)
    told = " ".join(class_sets.warnings(found))
    assert "leaf has fewer than 10 images" in told


def test_an_image_in_two_classes_is_named(workspace, folder, tmp_path):
    assert class_sets.duplicates(class_sets.uploaded_set(folder)) == []
    more(folder, "c02", "ruby", [0], tmp_path / "copy")
    (told,) = class_sets.duplicates(class_sets.uploaded_set(folder))
    assert "1 image is in more than one class: ruby and sea." in told


def test_a_local_folder_is_not_changed(workspace, tmp_path):
    given = colour_folder(tmp_path / "mine", 4)
    before = sorted(path.name for path in given.rglob("*"))
    set_id = class_sets.point_to(workspace, str(given))
    class_sets.name_pointed_class(workspace.image_set(set_id), "sea", "the sea")
    found = class_sets.find(workspace, set_id)
    assert found.kind == "folder"
    assert found.data_options() == {"data_dir": str(given), "class_names": ["sea=the sea"]}
    assert sorted(path.name for path in given.rglob("*")) == before
    assert class_sets.class_sets(workspace) == [set_id]


@pytest.mark.parametrize(("name", "words"), [("leaf", "must be unique"), ("  ", "one line of text")])
def test_a_class_of_a_local_folder_rejects_names_that_training_would_refuse(workspace, tmp_path, name, words):
    folder = workspace.image_set(class_sets.point_to(workspace, str(colour_folder(tmp_path / "mine", 4))))
    with pytest.raises(InputError, match=words):
        class_sets.name_pointed_class(folder, "sea", name)
    assert class_sets.find(workspace, folder.name).names() == {name: name for name in sorted(COLOURS)}


def test_guests_cannot_use_local_folders(tmp_path):
    guest = Workspace(tmp_path / "runs", tmp_path / "sets", "ann", is_local=False)
    given = colour_folder(tmp_path / "mine", 4)
    with pytest.raises(InputError, match="only from this machine"):
        class_sets.point_to(guest, str(given))
    host = Workspace(tmp_path / "runs", tmp_path / "sets", is_local=True)
    with pytest.raises(InputError, match="only from this machine"):
        class_sets.find(guest, class_sets.point_to(host, str(given)))


@pytest.mark.parametrize("path", ["", "  ", "/no/such/folder"])
def test_a_missing_folder_is_refused(workspace, path):
    with pytest.raises(InputError, match="There is no folder"):
        class_sets.point_to(workspace, path)


def test_the_example_is_a_set_of_ten_digits(workspace):
    found = class_sets.find(workspace, EXAMPLE)
    assert found.names() == {str(digit): str(digit) for digit in range(10)}
    assert found.count == 1797
    assert found.data_options() == {}


def test_the_shots_are_limited_by_the_smallest_class(folder, workspace, tmp_path):
    classes = class_sets.find(workspace, folder.name)
    # Four of six images are not test images: two for training and two for validation.
    assert class_presets.fitting_shots(classes, ["2"]) == ["2"]
    assert class_presets.fitting_shots(classes, ["16"]) == ["all"]
    split = sample_split(load_folder(folder), 2, 0)
    assert len(split.names["train"]) == 6
    with pytest.raises(InputError, match="fewer shots"):
        sample_split(load_folder(folder), 3, 0)


def test_shots_set_by_the_user_are_not_changed(folder, workspace):
    classes, fast = class_sets.find(workspace, folder.name), preset_named(CLASSIFY, "Fast").options()
    assert class_presets.completed(classes, fast, {})["data"]["shots"] == ["all"]
    own = {"data": {"shots": ["3"]}}
    assert class_presets.completed(classes, fast | {"data": {"shots": ["3"]}}, own)["data"]["shots"] == ["3"]


def test_steps_are_limited_for_large_classes(workspace):
    best = preset_named(CLASSIFY, "Best").options()
    found = class_presets.completed(class_sets.find(workspace, EXAMPLE), best, {})
    fewest = 174 - round(0.3 * 174)
    assert found["optimisation"]["iterations_per_shot"] == class_presets.MOST_STEPS // fewest


@pytest.mark.parametrize("name", [preset.name for preset in CLASSIFY])
def test_the_recipe_accepts_every_preset(name, folder, workspace):
    from webui.work.options import build

    values = class_presets.completed(class_sets.find(workspace, folder.name), preset_named(CLASSIFY, name).options(), {})
    options = build(workspace, "classify", values)
    assert "nora" in options.method.method
    assert options.data.data_dir == str(Path(folder).absolute())


def test_the_dataset_of_a_run_is_found_again(folder, workspace, tmp_path):
    run = workspace.new_run()
    (run / "status.json").write_text("{}")
    for data_dir, expected in ((str(folder.absolute()), folder.name), (None, EXAMPLE), (str(tmp_path), None)):
        (run / "options.json").write_text(json.dumps({"data": {"data_dir": data_dir}}))
        assert class_sets.set_of_run(workspace, workspace.run(run.name)) == expected


def test_images_of_an_active_run_cannot_be_changed(folder, workspace):
    run = workspace.new_run()
    launch = {"task": "classify", "options": {"data": {"data_dir": str(folder.absolute())}}, "created": 0.0}
    (run / "launch.json").write_text(json.dumps(launch))
    sleeping = subprocess.Popen(["sleep", "60"])
    own = {"pid": sleeping.pid, "pid_started": psutil.Process(sleeping.pid).create_time()}
    try:
        (run / "status.json").write_text(json.dumps({"state": "running", "phase": "fitting", **own}))
        with pytest.raises(InputError, match="is training on these images"):
            class_runs.check_free(workspace, folder)
    finally:
        sleeping.kill()
        sleeping.wait()
    class_runs.check_free(workspace, folder)


def test_the_title_of_a_dataset_lists_its_classes(folder, workspace):
    assert class_sets.title(workspace, folder.name) == f"{', '.join(COLOURS)} (18 images)"


def test_a_run_starts_with_the_pending_input_of_the_expert_panel(folder, workspace):
    about = panel.FieldSource(None, "classify", CLASSIFY, None, None, class_runs.complete)
    draft = {"set": folder.name, "preset": "Fast", "options": {}, "typed": {"optimisation": {"min_train_steps": "4"}}}
    settled = about.with_pending_input(workspace, draft)
    assert settled["options"] == {"optimisation": {"min_train_steps": 4}}
    values = class_runs.complete(workspace, settled, merged(about.preset(settled).options(), settled["options"]))
    assert values["optimisation"] == {"min_train_steps": 4}
    assert values["data"]["data_dir"] == str(folder.absolute())


def split_zip(path, folders, name="ruby", each=3, more=None):
    """Write a zip with images in these folders to `path`; returns `path`."""
    with zipfile.ZipFile(path, "w") as archive:
        for place, folder in enumerate(folders):
            for number in range(each):
                archive.writestr(f"{folder}/{place}{number}.png", coloured(name, 10 * place + number))
        for other, content in (more or {}).items():
            archive.writestr(other, content)
    return path


@pytest.mark.parametrize("how", ["folders", "split.json"])
def test_the_split_in_a_zip_is_kept(workspace, tmp_path, how):
    folder, keys = workspace.new_image_set(), ("ruby", "leaf")
    if how == "folders":
        path = split_zip(tmp_path / "a.zip", [f"set/{word}/{key}" for word in ("Training", "Test_Set") for key in keys])
    else:
        files = [f"{key}/{place}{number}.png" for place, key in enumerate(keys) for number in range(4)]
        split = {"Train": [file for file in files if file[-5] < "2"], "TEST": [file for file in files if file[-5] >= "2"]}
        path = split_zip(tmp_path / "a.zip", keys, each=4, more={"split.json": json.dumps(split)})
    added = add_zip(folder, path)
    assert not added.refused
    class_sets.update_split_after_upload(folder, added)
    assert [one.name for one in read_set(folder).classes] == ["leaf", "ruby"] if how == "folders" else ["ruby", "leaf"]
    names = {entry.file: entry.name for entry in read_set(folder).entries()}
    tested = {names[file] for file in class_sets.read_split(folder)["test"]}
    # The third and fourth image are test images, by their folder or by split.json.
    expected = (
        {"20.png", "21.png", "22.png", "30.png", "31.png", "32.png"}
        if how == "folders"
        else {"02.png", "03.png", "12.png", "13.png"}
    )
    assert tested == expected
    class_sets.update_split(folder)
    assert {names[file] for file in class_sets.read_split(folder)["test"]} == expected
    assert "Split by " in class_images._upload_summary(added)


@pytest.mark.parametrize(
    ("folders", "message"),
    [
        (["Train", "Test"], "contain images and no class folders"),
        (["Train/ruby", "Train/leaf", "Test/ruby", "extra/ruby"], "'Test', 'Train', but not 'extra'"),
    ],
)
def test_a_zip_with_an_ambiguous_split_is_refused(workspace, tmp_path, folders, message):
    folder = workspace.new_image_set()
    with pytest.raises(InputError, match=message):
        add_zip(folder, split_zip(tmp_path / "a.zip", folders))
    assert not read_set(folder).entries()


def test_unused_files_of_a_folder_and_classes_without_test_images_are_shown(workspace, tmp_path):
    mine = colour_folder(tmp_path / "mine" / "Train", 4, ("ruby", "leaf", "sea")).parent
    colour_folder(mine / "Test", 2, ("ruby", "leaf"))
    (mine / "Train" / "sea" / "<b>.txt").touch()
    found = class_sets.find(workspace, class_sets.point_to(workspace, str(mine)))
    shown = class_images._summary(found, None)
    assert "Split by folders: &#x27;Train&#x27; is train (12 images)" in shown
    assert "1 file with the suffix .txt is not used: 1 in class &#x27;sea&#x27;." in shown
    assert "no test images, so their accuracy is unknown: &#x27;sea&#x27;." in shown
    assert {one.key: one.learnable for one in found.classes} == {"ruby": 4, "leaf": 4, "sea": 4}


def test_a_class_with_only_test_images_cannot_be_trained(workspace, tmp_path):
    mine = colour_folder(tmp_path / "mine" / "Train", 4, ("ruby", "leaf")).parent
    colour_folder(mine / "Test", 4, ("ruby", "leaf", "sea"))
    found = class_sets.find(workspace, class_sets.point_to(workspace, str(mine)))
    assert not class_sets.is_ready(found)
    assert any("All images of sea are test images" in one for one in class_sets.warnings(found))
