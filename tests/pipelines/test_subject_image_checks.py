"""Image checks report problems, leave out unreadable images, and change no file."""

import hashlib
import json
from pathlib import Path

import numpy as np
import pytest
from command_line import exit_status
from PIL import Image, ImageFilter, ImageOps

from pipelines.errors import InputError
from pipelines.subject.image_checks import ImageCheckOptions, ImageCheckReport, check_images, main, perceptual_hash, sharpness
from training.options.data import SAMPLE_SUBJECT

ORIENTATION, TURNED_RIGHT = 0x0112, 6


def photo(place=0):
    return Image.open(SAMPLE_SUBJECT / f"{place:02d}.jpg").convert("RGB")


def kinds(report: ImageCheckReport):
    return {diagnosis.path.name: [finding.kind for finding in diagnosis.findings] for diagnosis in report.images}


@pytest.fixture
def album(tmp_path):
    """Three different good images."""
    folder = tmp_path / "red_toy"
    folder.mkdir()
    for place in range(3):
        photo(place).save(folder / f"{place}.png")
    return folder


def test_good_images_are_called_good():
    report = check_images(SAMPLE_SUBJECT)
    assert {diagnosis.verdict for diagnosis in report.images} == {"good"}
    assert not report.findings
    assert len(report.usable) == 5


@pytest.mark.parametrize(
    ("name", "content", "kind"),
    [
        ("cut.jpg", "cut", "unreadable"),
        ("empty.png", b"", "unreadable"),
        ("words.png", b"no image at all", "unreadable"),
        ("disguised.png", b"8BPS\0\1 and more", "wrong_format"),
        ("pointer.jpg", b"version https://git-lfs.github.com/spec/v1\noid sha256:0\n", "wrong_format"),
        ("phone.heic", b"any", "wrong_format"),
    ],
)
def test_a_bad_image_is_left_out_with_its_reason(album, name, content, kind):
    if content == "cut":
        photo().save(album / name)
        content = (album / name).read_bytes()[:-2000]
    (album / name).write_bytes(content)
    report = check_images(album)
    assert kinds(report)[name] == [kind]
    assert {path.name for path in report.usable} == {"0.png", "1.png", "2.png"}
    assert f"left out: {album / name}" in report.summary()


def test_an_image_with_the_suffix_of_another_readable_format_is_used(album):
    photo(3).save(album / "3.png", "JPEG")
    assert kinds(check_images(album))["3.png"] == []


@pytest.mark.parametrize(
    ("kind", "change"),
    [
        ("blurred", lambda image: image.filter(ImageFilter.GaussianBlur(6))),
        ("tiny", lambda image: image.resize((60, 60))),
        ("extreme_shape", lambda image: image.crop((0, 0, 512, 150))),
    ],
)
def test_a_poor_image_is_reported_and_used(album, kind, change):
    change(photo(3)).save(album / "poor.png")
    report = check_images(album)
    assert kinds(report)["poor.png"] == [kind]
    assert album / "poor.png" in report.usable
    assert all(not found for name, found in kinds(report).items() if name != "poor.png")


@pytest.mark.parametrize("change", ["copy", "jpeg", "smaller", "brighter"])
def test_the_same_image_in_other_bytes_is_a_near_duplicate(album, change):
    image = photo(1)
    if change == "smaller":
        image = image.resize((300, 300), Image.Resampling.BICUBIC)
    if change == "brighter":
        image = image.point(lambda value: min(255, round(value * 1.1)))
    image.save(album / ("9.jpg" if change == "jpeg" else "9.png"), **({"quality": 40} if change == "jpeg" else {}))
    report = check_images(album)
    assert [found for found in kinds(report).values() if found] == [["near_duplicate"]]
    assert "'1.png'" in report.images[-1].findings[0].words


def test_an_image_that_is_stored_rotated_is_reported(album):
    exif = Image.Exif()
    exif[ORIENTATION] = TURNED_RIGHT
    photo(3).crop((0, 0, 500, 400)).save(album / "3.png", exif=exif)
    report = check_images(album)
    assert kinds(report)["3.png"] == ["turned"]
    assert report.images[-1].size == (400, 500)


def test_similar_images_and_too_few_images_are_reported_for_the_set(tmp_path):
    alike, single = tmp_path / "alike", tmp_path / "single"
    alike.mkdir()
    single.mkdir()
    for place in range(3):
        photo(0).crop((20 * place, 30, 430 + 20 * place, 470)).save(alike / f"{place}.png")
    photo(0).save(single / "0.png")
    findings = {finding.kind: finding.words for finding in check_images(tmp_path).findings}
    assert "'alike'" in findings["low_variety"]
    assert "is 1 image of 'single'" in findings["few_pictures"]


def test_images_smaller_than_the_training_resolution_are_reported(album):
    assert list(kinds(check_images(album, resolution=1024)).values()) == [["small"]] * 3
    assert list(kinds(check_images(album).for_resolution(1024)).values()) == [["small"]] * 3
    assert list(kinds(check_images(album, resolution=512)).values()) == [[]] * 3


def test_a_folder_without_usable_images_is_an_error_that_lists_them(tmp_path):
    for name in ("a.png", "b.jpg"):
        (tmp_path / name).write_bytes(b"broken")
    with pytest.raises(InputError, match=r"(?s)no image that can be used.*a\.png.*b\.jpg"):
        check_images(tmp_path)


def test_no_file_is_changed_and_workers_give_the_same_report(album):
    (album / "broken.png").write_bytes(b"broken")

    def digests():
        return {file.name: hashlib.sha256(file.read_bytes()).hexdigest() for file in album.iterdir()}

    before = digests()
    assert check_images(album, workers=2) == check_images(album)
    assert digests() == before


def test_the_report_is_json_with_a_verdict_for_each_image(album, tmp_path, capsys):
    (album / "broken.png").write_bytes(b"broken")
    report = main(ImageCheckOptions(str(album), json=str(tmp_path / "report.json")))
    written = json.loads((tmp_path / "report.json").read_text())
    assert written == json.loads(json.dumps(report.to_dict()))
    verdicts = {Path(entry["path"]).name: entry["verdict"] for entry in written["pictures"]}
    assert verdicts == {"0.png": "good", "1.png": "good", "2.png": "good", "broken.png": "left out"}
    assert "left out: " in capsys.readouterr().out


def test_sharpness_is_the_variance_of_the_laplacian():
    grey = np.random.default_rng(0).integers(0, 256, (16, 24), dtype=np.uint8)
    values = np.pad(grey.astype(float), 1, mode="edge")
    laplacian = sum(np.roll(values, shift, axis) for shift in (1, -1) for axis in (0, 1)) - 4 * values
    assert sharpness(Image.fromarray(grey)) == pytest.approx(laplacian[1:-1, 1:-1].var())


def test_the_hash_ignores_brightness_but_not_rotation():
    bright = photo().point(lambda value: value // 2 + 60)
    assert (perceptual_hash(bright) != perceptual_hash(photo())).sum() <= 6
    assert (perceptual_hash(ImageOps.flip(photo())) != perceptual_hash(photo())).sum() > 30


def test_the_command_ends_with_one_line_for_a_missing_folder(tmp_path, capsys):
    assert exit_status("pipelines.subject.image_checks", str(tmp_path / "none")) == 2
    assert "does not exist" in capsys.readouterr().err.splitlines()[-1]


def test_the_commands_error_does_not_name_the_trainers_option(tmp_path):
    with pytest.raises(InputError, match=r"The folder '.*gone' does not exist") as refused:
        main(ImageCheckOptions(str(tmp_path / "gone")))
    assert "--instance_data_dir" not in str(refused.value)
    (tmp_path / "subject").mkdir()
    for name in ("cover.png", "subject/0.png"):
        Image.new("RGB", (64, 64)).save(tmp_path / name)
    with pytest.raises(InputError, match=r"or give one of the folders") as refused:
        main(ImageCheckOptions(str(tmp_path)))
    assert "--instance_data_dir" not in str(refused.value)
    with pytest.raises(InputError, match=r"--json must be a \.json file, got 'report\.txt'"):
        main(ImageCheckOptions(str(tmp_path), json="report.txt"))
