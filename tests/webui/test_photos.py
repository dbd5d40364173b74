"""The draft of a run, the order of its photos, their image checks, and their cards."""

import numpy as np
import pytest
from listeners import listener
from PIL import Image, ImageFilter

from pipelines.errors import InputError
from pipelines.sample_subject import sample_images
from training.options import DataOptions, ModelOptions, OutputOptions, SubjectOptions
from webui import inference_jobs, tasks
from webui.datasets import EXAMPLE_SUBJECT, Dataset
from webui.draft import Draft
from webui.inference_jobs import checked_images, long_prompts_of
from webui.page import build_page
from webui.render import escaped, thumbnail
from webui.screens import photos as screen
from webui.screens.photos import FIRST_SCREEN, cards
from webui.uploads import add_crop, add_images
from webui.workspace import Settings, Workspace


@pytest.fixture
def workspace(tmp_path):
    return Workspace(tmp_path / "runs", tmp_path / "sets", is_local=True)


@pytest.fixture
def uploads(tmp_path):
    """Uploaded files: two sharp images of the toy, and a blurred copy of the first."""
    first, second, *_ = sample_images()
    blurred = first.filter(ImageFilter.GaussianBlur(8))
    for name, image in (("front.png", first), ("side.jpg", second), ("dim.png", blurred)):
        image.save(tmp_path / name)
    return [str(tmp_path / name) for name in ("front.png", "side.jpg", "dim.png")]


@pytest.fixture
def photos(workspace, uploads):
    photos = Dataset(workspace.new_image_set())
    add_images(photos, uploads)
    return photos


def names(photos):
    return [entry.name for entry in photos.photos()]


def test_photos_are_moved_and_removed(photos):
    files = {entry.name: entry.file for entry in photos.photos()}
    photos.move(files["dim.png"], -1)
    assert names(photos) == ["front.png", "dim.png", "side.jpg"]
    photos.move(files["front.png"], -1)
    assert names(photos) == ["front.png", "dim.png", "side.jpg"]
    photos.remove([files["front.png"]])
    assert names(photos) == ["dim.png", "side.jpg"]
    assert not (photos.folder / files["front.png"]).exists()


@pytest.mark.parametrize("file", ["0099.png", "../0001.png", "/etc/passwd", ""])
def test_a_file_outside_of_the_dataset_is_refused(photos, file):
    with pytest.raises(InputError, match="no longer exist"):
        photos.move(file, 1)
    with pytest.raises(InputError, match="no longer exist"):
        photos.remove([file])


def test_a_run_reads_the_photos_in_the_order_of_the_page(photos):
    photos.move(photos.photos()[2].file, -2)
    first = (photos.folder / photos.photos()[0].file).read_bytes()
    photos.seal()
    assert names(photos) == ["dim.png", "front.png", "side.jpg"]
    assert next(path.read_bytes() for path in sorted(photos.folder.glob("0*.png"))) == first
    assert [entry.file for entry in photos.photos()] == sorted(entry.file for entry in photos.photos())


def test_the_photos_of_a_started_run_do_not_change_and_edits_go_to_a_copy(workspace, photos, uploads):
    assert photos.editable(workspace) == photos
    photos.seal()
    copy = photos.editable(workspace)
    copy.remove([copy.photos()[0].file])
    add_images(copy, uploads[:1])
    assert names(photos) == ["front.png", "side.jpg", "dim.png"]
    assert names(copy) == ["side.jpg", "dim.png", "front.png"]


def test_the_example_is_never_changed(workspace):
    example = Dataset.of(workspace, None)
    example.seal()
    assert example.is_example
    assert example.id is None
    assert len(example.photos()) == 5
    assert not list(EXAMPLE_SUBJECT.glob(".*"))
    assert not example.editable(workspace).is_example


def test_the_image_checks_use_the_users_file_names(photos):
    found = checked_images(photos)
    by_name = {entry.name: found.images[entry.file] for entry in photos.photos()}
    assert [by_name[name].verdict for name in ("front.png", "side.jpg", "dim.png")] == ["good", "good", "look again"]
    blurred = " ".join(by_name["dim.png"].sentences)
    assert "It is blurred" in blurred
    assert "Use a sharper image" in blurred
    assert "“front.png”" in blurred


def test_photos_may_be_removed_one_after_another_while_they_are_checked(photos, monkeypatch):
    first, *others = [photo.file for photo in photos.photos()]

    def removing(report):
        if others:
            file = others.pop()
            photos.remove([file])
            (photos.folder / file).stat()
        return report

    monkeypatch.setattr(inference_jobs, "with_outliers", removing)
    assert list(checked_images(photos).images) == [first]


def test_a_photo_may_be_removed_while_the_cards_are_drawn(photos, monkeypatch):
    *others, last = [photo.file for photo in photos.photos()]

    def removing(path):
        if path.name == last:
            photos.remove([last])
        return thumbnail(path)

    monkeypatch.setattr(screen, "thumbnail", removing)
    drawn = cards(photos, Draft())
    assert [file in drawn for file in (*others, last)] == [True] * len(others) + [False]


def test_truncated_prompts_and_captions_are_reported_before_training(photos):
    file = photos.photos()[1].file
    photos.set_caption(file, "sks toy " * 60)
    data = DataOptions(str(photos.folder), "a photo of sks toy", with_prior_preservation=True, class_prompt="a toy " * 40)
    words = long_prompts_of(photos, SubjectOptions(data=data, output=OutputOptions(validation_prompt=["sks toy at sea"])))
    assert [sentence.partition(" has ")[0] for sentence in words] == [
        f"The class prompt '{'a toy ' * 6}a to...'",
        "The caption of 'side.jpg'",
    ]
    elsewhere = ModelOptions(pretrained_model_name_or_path="owner/not-on-this-machine")
    assert long_prompts_of(photos, SubjectOptions(data=data, model=elsewhere)) == []


def test_findings_about_all_photos_name_no_folder(workspace, uploads):
    photos = Dataset(workspace.new_image_set())
    add_images(photos, uploads[:1])
    (said,) = checked_images(photos).together
    assert said.startswith("There is 1 image of your subject.")
    assert photos.folder.name not in said


def test_a_card_shows_user_input_as_text(workspace, tmp_path):
    photos = Dataset(workspace.new_image_set())
    Image.fromarray(np.zeros((64, 64, 3), np.uint8)).save(tmp_path / "x.png")
    hostile = tmp_path / "<img src=x onerror=alert(1)> {{value}} ${1+1} \"'.png"
    (tmp_path / "x.png").rename(hostile)
    add_images(photos, [str(hostile)])
    markup = cards(photos, Draft())
    assert "<img src=x" not in markup
    assert "{{" not in markup
    assert "${" not in markup
    assert escaped(photos.photos()[0].name) in markup


def test_photos_that_are_lost_are_replaced_by_the_example_and_forgotten(workspace, photos):
    page = build_page(Settings(workspace.runs, workspace.sets))
    draft = Draft(set=photos.id, previous_set=photos.id).to_browser()
    assert "front.png" in listener(page, "photos", "show")(draft, [], None)[2]
    photos.delete()
    lost, _, example, *_ = listener(page, "photos", "show")(draft, [], None)
    assert lost == photos.id
    assert "00.jpg" in example
    assert listener(page, "photos", "forget")(draft) == Draft().to_browser()


def test_without_photos_the_page_says_what_to_do(workspace):
    assert "Drop three to ten photos" in cards(Dataset(workspace.new_image_set()), Draft())


def test_a_square_of_a_photo_becomes_a_new_photo_after_it(photos):
    first = photos.photos()[0]
    photos.set_caption(first.file, "sks toy")
    with Image.open(photos.folder / first.file) as opened:
        whole = np.asarray(opened)
    file = add_crop(photos, first.file, 0.25, 0.5, 0.5)
    assert names(photos)[:2] == ["front.png", "front (crop).png"]
    short = min(whole.shape[:2])
    with Image.open(photos.folder / file) as opened:
        assert (np.asarray(opened) == whole[short // 2 : short, short // 4 : short // 4 + short // 2]).all()
    assert photos.photos()[1].caption == (photos.folder / file).with_suffix(".txt").read_text() == "sks toy"


@pytest.mark.parametrize("square", [(0.6, 0, 0.8), (-0.5, 0, 0.5), (0, 0, 0.01), (0, 0, float("nan")), (float("inf"), 0, 0.5)])
def test_a_square_outside_of_the_photo_or_too_small_is_refused(photos, square):
    with pytest.raises(InputError, match="must lie in the image and have at least 64 pixels"):
        add_crop(photos, photos.photos()[0].file, *square)
    assert len(photos.photos()) == 3


def test_a_photo_unlike_the_others_is_reported_and_photos_of_one_subject_are_not(workspace, tmp_path):
    images = [*sample_images(), Image.effect_mandelbrot((256, 256), (-2, -1.5, 1, 1.5), 100)]
    files = []
    for index, image in enumerate(images):
        files.append(tmp_path / f"{index}.png")
        image.save(files[-1])
    dataset = Dataset(workspace.new_image_set())
    add_images(dataset, files[:-1])
    assert not any("unlike" in sentence for one in checked_images(dataset).images.values() for sentence in one.sentences)
    add_images(dataset, files[-1:])
    verdicts = checked_images(dataset).images
    unlike = [file for file, one in verdicts.items() if any("looks unlike the other images" in words for words in one.sentences)]
    assert unlike == [dataset.photos()[-1].file]


def test_photos_of_different_subjects_are_reported(workspace, tmp_path):
    mandelbrot = Image.effect_mandelbrot((256, 256), (-2, -1.5, 1, 1.5), 100)
    for index, image in enumerate((sample_images()[0], mandelbrot, Image.effect_noise((256, 256), 80))):
        image.save(tmp_path / f"{index}.png")
    dataset = Dataset(workspace.new_image_set())
    add_images(dataset, sorted(tmp_path.glob("*.png")))
    (said,) = [sentence for sentence in checked_images(dataset).together if "unlike" in sentence]
    assert said.startswith("Most images of your subject look unlike each other, as if they showed different things.")


@pytest.mark.parametrize(
    ("answer", "expected"),
    [
        ("echo 'NVIDIA A10, 24576'", ("NVIDIA A10", 25.769803776)),
        ("echo 'No devices were found'", None),
        ("echo 'driver mismatch' >&2; exit 9", None),
        ("true", None),
    ],
)
def test_the_gpu_is_named_by_the_driver_and_a_driver_without_a_device_is_none(tmp_path, monkeypatch, answer, expected):
    (tmp_path / "nvidia-smi").write_text(f"#!/bin/sh\n{answer}\n")
    (tmp_path / "nvidia-smi").chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path), prepend=":")
    tasks.gpu.cache_clear()
    monkeypatch.setattr(tasks.platform, "system", lambda: "Linux")
    assert tasks.gpu() == expected
    tasks.gpu.cache_clear()


def test_the_images_of_the_first_screen_are_cells_of_the_bundled_run_without_their_labels():
    for name in ("photos", "before", "after"):
        with Image.open(FIRST_SCREEN / f"{name}.webp") as opened:
            pixels = np.asarray(opened.convert("L"), dtype=float)
        # The sheet's margins between the cells are plain white rows and columns.
        middle = len(pixels) // 2
        for lines in (pixels, pixels.T):
            assert all(line.std() > 1 or line.mean() < 250 for line in (lines[0], lines[middle - 1], lines[middle], lines[-1]))
