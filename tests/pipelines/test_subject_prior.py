"""Class images: generated once, completed when images are missing, and never those of another class."""

import os

import pytest
from PIL import Image

from pipelines.errors import InputError
from pipelines.images import read_settings
from pipelines.subject.captions import find_captioned
from pipelines.subject.data import TrainingImage
from pipelines.subject.prior import ClassImages, in_sizes

SETTINGS = {"negative_prompt": "", "num_inference_steps": 2, "guidance_scale": 4.0, "sampler": "Euler"}


def wanted(folder, count=3, prompts=None, model="owner/model", **more):
    return ClassImages(folder, prompts or {"sks dog": "a photo of a dog"}, count, model, **more)


def make(classes, missing=None):
    """Generate the missing images, whose shade is their seed."""
    drawn = []

    def draw(prompts, seeds):
        for prompt, seed in zip(prompts, seeds, strict=True):
            drawn.append((prompt, seed))
            yield Image.new("RGB", (8, 8), (seed % 256, 0, 0))

    classes.make(classes.missing() if missing is None else missing, draw, SETTINGS)
    return drawn


def test_class_images_are_generated_once_with_their_settings(tmp_path):
    drawn = make(wanted(tmp_path / "class"))
    assert len(drawn) == len(set(drawn)) == 3
    assert make(wanted(tmp_path / "class")) == []
    found = wanted(tmp_path / "class").images()
    assert [(p.path.name, p.prompt, p.kind, p.subject) for p in found] == [
        (f"{number:05d}.png", "a photo of a dog", "class", "sks dog") for number in range(3)
    ]
    assert [read_settings(image.path)["seed"] for image in found] == [seed for _, seed in drawn]


def test_missing_images_are_generated_with_the_same_result(tmp_path):
    make(wanted(tmp_path))
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    (tmp_path / "00001.png").unlink()
    assert len(make(wanted(tmp_path))) == 1
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == before
    assert len(make(wanted(tmp_path, count=5))) == 2


def test_the_users_class_images_count_and_are_kept(tmp_path):
    Image.new("RGB", (8, 8)).save(tmp_path / "my dog.jpg")
    assert len(make(wanted(tmp_path))) == 2
    assert {p.path.name for p in wanted(tmp_path).images()} == {"00000.png", "00001.png", "my dog.jpg"}


def test_an_unreadable_image_is_reported_before_any_is_generated(tmp_path):
    (tmp_path / "my dog.jpg").write_bytes(b"no image")
    with pytest.raises(InputError, match=r"my dog.jpg' cannot be read as an image .*Remove it"):
        wanted(tmp_path).missing()


def test_no_more_images_are_used_than_requested(tmp_path):
    make(wanted(tmp_path, count=5))
    assert len(wanted(tmp_path, count=2).images()) == 2
    assert make(wanted(tmp_path, count=2)) == []


@pytest.mark.parametrize("change", [{"prompts": {"sks cat": "a photo of a cat"}}, {"model": "owner/other"}])
def test_images_of_another_class_or_model_are_refused(tmp_path, change):
    make(wanted(tmp_path))
    with pytest.raises(
        InputError, match=r"00000\.png' was generated from the prompt 'a photo of a dog' by 'owner/model', not from"
    ):
        wanted(tmp_path, **change).missing()


def test_a_model_may_have_been_moved(tmp_path):
    make(wanted(tmp_path, model="/here/mini"))
    assert wanted(tmp_path, model="/there/mini").missing() == []


def test_each_class_has_its_own_folder_and_subjects_of_one_class_share_it(tmp_path):
    prompts = {"rex": "a photo of a dog", "tom": "a photo of a cat!", "bello": "a photo of a dog"}
    make(wanted(tmp_path, prompts=prompts, count=2))
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a-photo-of-a-cat", "a-photo-of-a-dog"]
    found = wanted(tmp_path, prompts=prompts, count=2).images()
    assert [image.prompt for image in found] == ["a photo of a dog"] * 2 + ["a photo of a cat!"] * 2
    assert {image.path.parent.name for image in found[2:]} == {"a-photo-of-a-cat"}


def test_processes_share_the_generation_with_the_same_result(tmp_path):
    make(wanted(tmp_path / "alone", count=5))
    parts = [wanted(tmp_path / "together", count=5, share=(place, 2)) for place in range(2)]
    missing = parts[0].missing()
    assert sorted(make(parts[0], missing) + make(parts[1], missing)) == sorted(
        (prompt, seed) for _, prompt, seed in wanted(tmp_path / "none", count=5).missing()
    )
    for path in (tmp_path / "alone").iterdir():
        assert (tmp_path / "together" / path.name).read_bytes() == path.read_bytes()


def test_an_image_whose_writing_was_interrupted_is_generated_again(tmp_path, monkeypatch):
    monkeypatch.setattr(os, "replace", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
    with pytest.raises(KeyboardInterrupt):
        make(wanted(tmp_path))
    monkeypatch.undo()
    assert len(make(wanted(tmp_path))) == 3
    assert len(find_captioned(tmp_path, "dog")) == 3


def test_every_size_of_the_subject_gets_class_images(tmp_path):
    for name, size in {"wide": (20, 10), "tall": (10, 20)}.items():
        Image.new("RGB", size).save(tmp_path / f"{name}.png")
    images = [TrainingImage(tmp_path / f"{name}.png", "dog", "class") for name in ("wide", "tall")]
    shown = [(p.path.stem, size) for p, size in zip(*in_sizes(images, [(8, 16), (16, 8)]), strict=True)]
    assert shown == [("wide", (8, 16)), ("tall", (16, 8))]
    shown = [(p.path.stem, size) for p, size in zip(*in_sizes(images[:1], [(8, 16), (16, 8)]), strict=True)]
    assert shown == [("wide", (8, 16)), ("wide", (16, 8))]
