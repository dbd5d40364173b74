"""Labelled datasets: their fixed test split, the warnings, and the options that the presets choose for them."""

import json
import subprocess
import zipfile

import psutil
import pytest
from class_folders import COLOURS, colour_folder, colour_set, coloured, images_of

from pipelines.errors import InputError
from pipelines.fewshot.loading import load_folder, load_images
from pipelines.fewshot.shots import sample_split
from webui.datasets import Dataset
from webui.labelled_datasets import (
    EXAMPLES,
    class_datasets,
    dataset_in,
    find_classes,
    point_to,
    titles,
    uploaded_classes,
)
from webui.screens import classify
from webui.uploads import add_images, add_zip
from webui.workspace import Workspace

# In the order of the folders.
SHAPES = ("heart", "ring", "star")


@pytest.fixture
def workspace(tmp_path):
    """An empty workspace."""
    return Workspace(tmp_path / "runs", tmp_path / "sets", is_local=True)


@pytest.fixture
def dataset(workspace, tmp_path):
    """A dataset of three classes with six images each."""
    return colour_set(workspace, tmp_path / "given")


def more(dataset, key, name, places, scratch):
    """Add further images to a class; returns their file names."""
    scratch.mkdir()
    for place in places:
        (scratch / f"{place}.png").write_bytes(coloured(name, place))
    return add_images(dataset, sorted(scratch.iterdir()), key).names


def test_the_recipe_uses_the_test_split_of_the_dataset(dataset):
    split = sample_split(load_folder(dataset.folder), "all", 0)
    tested = images_of(dataset, "test")
    assert {name for name, _ in split.names["test"]} == tested
    assert {name for part in ("train", "val") for name, _ in split.names[part]} == images_of(dataset, "train")
    assert [sum(name.startswith(key) for name in tested) for key in ("c00", "c01", "c02")] == [2, 2, 2]


def test_images_added_later_fill_up_the_test_split_and_move_none_out_of_it(dataset, tmp_path):
    before = {part: images_of(dataset, part) for part in ("train", "test")}
    added = more(dataset, "c00", "ruby", range(20, 30), tmp_path / "more")
    after = {part: images_of(dataset, part) for part in ("train", "test")}
    assert before["test"] < after["test"]
    assert before["train"] < after["train"]
    # 30% of sixteen images are five test images, two of which existed before.
    assert len(set(added) & after["test"]) == 3


def test_corrections_are_training_images_and_never_test_images(dataset, tmp_path):
    before = images_of(dataset, "test")
    (tmp_path / "new").mkdir()
    files = [tmp_path / "new" / f"{place}.png" for place in range(10)]
    for place, file in enumerate(files):
        file.write_bytes(coloured("ruby", 100 + place))
    added = add_images(dataset, files, "c00", "train")
    assert len(added.names) == 10
    assert images_of(dataset, "test") == before
    assert not set(added.names) & images_of(dataset, "test")


def test_the_recipe_reads_a_dataset_after_images_are_removed_or_moved(dataset):
    tested = sorted(images_of(dataset, "test"))[0]
    dataset.remove([tested])
    (moved,) = dataset.move_to_class([dataset.content().classes[1].images[0].file], "c02")
    parts = load_folder(dataset.folder).parts
    assert tested not in parts
    assert moved in parts


def test_a_test_image_stays_one_when_its_class_is_corrected(dataset):
    tested = min(images_of(dataset, "test"))
    (moved,) = dataset.move_to_class([tested], "c02")
    assert moved in images_of(dataset, "test")


def test_the_recipe_gets_class_names_by_folder(dataset, workspace):
    dataset.rename_class("c01", "green leaf")
    options = find_classes(workspace, dataset.id).data_options()
    assert options["data_dir"] == str(dataset.folder.absolute())
    assert options["class_names"] == ["c00=ruby", "c01=green leaf", "c02=sea"]


def test_warnings_name_what_prevents_training(workspace, tmp_path):
    dataset = Dataset(workspace.new_image_set())
    assert "no classes yet" in uploaded_classes(dataset).warnings()[0]
    more(dataset, dataset.add_class("ruby"), "ruby", range(20), tmp_path / "a")
    assert "only one class" in uploaded_classes(dataset).warnings()[0]
    more(dataset, dataset.add_class("leaf"), "leaf", range(2), tmp_path / "b")
    found = uploaded_classes(dataset)
    assert "leaf has 2 images. Training needs at least 3" in found.warnings()[0]
    assert found.problems
    more(dataset, "c01", "leaf", range(2, 4), tmp_path / "c")
    found = uploaded_classes(dataset)
    assert not found.problems
    told = " ".join(found.warnings())
    assert "leaf has fewer than 10 images" in told


def test_an_image_in_two_classes_is_named(workspace, dataset, tmp_path):
    assert uploaded_classes(dataset).duplicates() == []
    more(dataset, "c02", "ruby", [0], tmp_path / "copy")
    (told,) = uploaded_classes(dataset).duplicates()
    assert "1 image is in more than one class: ruby and sea." in told


def test_a_local_folder_is_not_changed(workspace, tmp_path):
    given = colour_folder(tmp_path / "mine", 4)
    before = sorted(path.name for path in given.rglob("*"))
    set_id = point_to(workspace, str(given))
    Dataset.of(workspace, set_id).rename_class("sea", "the sea")
    found = find_classes(workspace, set_id)
    assert found.kind == "folder"
    assert found.data_options() == {"data_dir": str(given), "class_names": ["sea=the sea"]}
    assert sorted(path.name for path in given.rglob("*")) == before
    assert list(class_datasets(workspace)) == [set_id]


@pytest.mark.parametrize(("name", "words"), [("leaf", "must be unique"), ("  ", "one line of text")])
def test_a_class_of_a_local_folder_rejects_names_that_training_would_refuse(workspace, tmp_path, name, words):
    dataset = Dataset.of(workspace, point_to(workspace, str(colour_folder(tmp_path / "mine", 4))))
    with pytest.raises(InputError, match=words):
        dataset.rename_class("sea", name)
    assert [one.name for one in find_classes(workspace, dataset.id).classes] == sorted(COLOURS)


def test_guests_cannot_use_local_folders(tmp_path):
    guest = Workspace(tmp_path / "runs", tmp_path / "sets", "ann", is_local=False)
    given = colour_folder(tmp_path / "mine", 4)
    with pytest.raises(InputError, match="only from this machine"):
        point_to(guest, str(given))
    host = Workspace(tmp_path / "runs", tmp_path / "sets", is_local=True)
    with pytest.raises(InputError, match="only from this machine"):
        find_classes(guest, point_to(host, str(given)))


@pytest.mark.parametrize("path", ["", "  ", "/no/such/folder"])
def test_a_missing_folder_is_refused(workspace, path):
    with pytest.raises(InputError, match="There is no folder"):
        point_to(workspace, path)


def test_the_first_example_is_coloured_shapes_that_the_recipe_reads_from_their_zip(workspace):
    found = find_classes(workspace, "shapes")
    assert [one.name for one in found.classes] == [f"{colour} {shape}" for colour in ("blue", "green", "red") for shape in SHAPES]
    assert (found.count, not found.problems, next(iter(EXAMPLES))) == (360, True, "shapes")
    read = load_images(found.data_options()["data_dir"])
    assert read.classes == tuple(one.name for one in found.classes)
    assert [image.source for image in read.images] == [source for one in found.classes for source in one.images]


def test_the_other_example_is_a_set_of_ten_digits(workspace):
    found = find_classes(workspace, "digits")
    assert [(one.key, one.name) for one in found.classes] == [(str(digit), str(digit)) for digit in range(10)]
    assert found.count == 1797
    assert found.data_options() == {}


def test_the_dataset_of_a_run_is_found_again(dataset, workspace, tmp_path):
    local = colour_folder(tmp_path / "mine", 4)
    pointer = point_to(workspace, str(local))
    own, zipped = str(dataset.folder.absolute()), str(EXAMPLES["shapes"][1])
    for folder, expected in (
        (own, dataset.id),
        (None, "digits"),
        (zipped, "shapes"),
        (str(local), pointer),
        (str(tmp_path), None),
    ):
        assert dataset_in(workspace, folder) == expected


def test_images_of_an_active_run_cannot_be_changed(dataset, workspace):
    run = workspace.new_run()
    launch = {"task": "classify", "options": {"data": {"data_dir": str(dataset.folder.absolute())}}, "created": 0.0}
    (run / "launch.json").write_text(json.dumps(launch))
    sleeping = subprocess.Popen(["sleep", "60"])
    own = {"pid": sleeping.pid, "pid_started": psutil.Process(sleeping.pid).create_time()}
    try:
        (run / "status.json").write_text(json.dumps({"state": "running", "phase": "fitting", **own}))
        with pytest.raises(InputError, match="is training on these images"):
            classify.check_free(workspace, dataset.folder)
    finally:
        sleeping.kill()
        sleeping.wait()
    classify.check_free(workspace, dataset.folder)


def test_the_title_of_a_dataset_lists_its_classes(dataset, workspace):
    assert titles(workspace)[dataset.id] == f"{', '.join(COLOURS)} (18 images)"


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
    dataset, keys = Dataset(workspace.new_image_set()), ("ruby", "leaf")
    if how == "folders":
        path = split_zip(tmp_path / "a.zip", [f"set/{word}/{key}" for word in ("Training", "Test_Set") for key in keys])
    else:
        files = [f"{key}/{place}{number}.png" for place, key in enumerate(keys) for number in range(4)]
        split = {"Train": [file for file in files if file[-5] < "2"], "TEST": [file for file in files if file[-5] >= "2"]}
        path = split_zip(tmp_path / "a.zip", keys, each=4, more={"split.json": json.dumps(split)})
    added = add_zip(dataset, path)
    assert not added.refused
    assert [one.name for one in dataset.content().classes] == ["leaf", "ruby"] if how == "folders" else ["ruby", "leaf"]
    names = {entry.file: entry.name for entry in dataset.content().images()}
    tested = {names[file] for file in images_of(dataset, "test")}
    # The third and fourth image are test images, by their folder or by split.json.
    expected = (
        {"20.png", "21.png", "22.png", "30.png", "31.png", "32.png"}
        if how == "folders"
        else {"02.png", "03.png", "12.png", "13.png"}
    )
    assert tested == expected
    assert {names[file] for file in images_of(dataset, "test")} == expected
    assert "Split by " in classify.classes_html.upload(added)


@pytest.mark.parametrize(
    ("folders", "message"),
    [
        (["Train", "Test"], "contain images and no class folders"),
        (["Train/ruby", "Train/leaf", "Test/ruby", "extra/ruby"], "'Test', 'Train', but not 'extra'"),
    ],
)
def test_a_zip_with_an_ambiguous_split_is_refused(workspace, tmp_path, folders, message):
    dataset = Dataset(workspace.new_image_set())
    with pytest.raises(InputError, match=message):
        add_zip(dataset, split_zip(tmp_path / "a.zip", folders))
    assert not dataset.content().images()


def test_unused_files_of_a_folder_and_classes_without_test_images_are_shown(workspace, tmp_path):
    mine = colour_folder(tmp_path / "mine" / "Train", 4, ("ruby", "leaf", "sea")).parent
    colour_folder(mine / "Test", 2, ("ruby", "leaf"))
    (mine / "Train" / "sea" / "<b>.txt").touch()
    found = find_classes(workspace, point_to(workspace, str(mine)))
    shown = classify.classes_html.summary(found, None)
    assert "Split by folders: &#39;Train&#39; is train (12 images)" in shown
    assert "1 file with the suffix .txt is not used: 1 in class &#39;sea&#39;." in shown
    assert "no test images, so their accuracy is unknown: &#39;sea&#39;." in shown
    assert {one.key: one.learnable for one in found.classes} == {"ruby": 4, "leaf": 4, "sea": 4}


def test_a_class_with_only_test_images_cannot_be_trained(workspace, tmp_path):
    mine = colour_folder(tmp_path / "mine" / "Train", 4, ("ruby", "leaf")).parent
    colour_folder(mine / "Test", 4, ("ruby", "leaf", "sea"))
    found = find_classes(workspace, point_to(workspace, str(mine)))
    assert found.problems
    assert any("All images of sea are test images" in one for one in found.warnings())


def as_earlier_versions_wrote(dataset):
    """Rewrite set.json with its lists of images under their earlier names, without what stood in files of their own."""
    stored = json.loads((dataset.folder / "set.json").read_text())
    listed = lambda group: {  # noqa: E731
        "pictures": [{name: image[name] for name in ("file", "name", "caption")} for image in group["images"]],
        "next": group["next"],
    }
    classes = [{"folder": one["folder"], "name": one["name"], **listed(one)} for one in stored["classes"]]
    earlier = {**listed(stored["photos"]), "classes": classes, "next_class": stored["next_class"]}
    (dataset.folder / "set.json").write_text(json.dumps(earlier))


def test_datasets_of_earlier_versions_keep_their_images_classes_split_and_seal(workspace, dataset, tmp_path):
    classes = dataset.content()
    photos = Dataset(workspace.new_image_set())
    (tmp_path / "toy.png").write_bytes(coloured("ruby", 1))
    add_images(photos, [tmp_path / "toy.png"])
    photos.set_caption(photos.photos()[0].file, "a ruby toy")
    before = photos.content()
    before.is_sealed = True
    as_earlier_versions_wrote(dataset)
    as_earlier_versions_wrote(photos)
    (photos.folder / ".sealed").touch()
    assert (dataset.content(), photos.content()) == (classes, before)

    pointer = Dataset(workspace.new_image_set())
    (pointer.folder / "folder.json").write_text(json.dumps({"path": str(tmp_path), "names": {"c0": "cup"}}))
    assert (pointer.content().local_folder, pointer.content().class_names) == (tmp_path, {"c0": "cup"})
    assert set(class_datasets(workspace)) == {dataset.folder.name, pointer.folder.name}
