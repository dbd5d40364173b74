"""Images of a subject: orientation, crops, and size conditioning."""

import contextlib
import io

import numpy as np
import pytest
import torch
from PIL import Image

from pipelines.errors import InputError
from pipelines.images import read_image
from pipelines.subject.data import CropVariant, image_size, load_examples, preprocess

ORIENTATION = 0x0112
TURNED_RIGHT = 6


def halves(width, height):
    """Red to the left, blue to the right."""
    image = Image.new("RGB", (width, height), "red")
    image.paste("blue", (width // 2, 0, width, height))
    return image


def turned_exif():
    exif = Image.Exif()
    exif[ORIENTATION] = TURNED_RIGHT
    return exif


def test_an_image_is_read_upright_and_its_size_is_the_upright_one(tmp_path):
    halves(60, 40).save(tmp_path / "a.png", exif=turned_exif())
    upright = read_image(tmp_path / "a.png")
    assert upright.size == (40, 60)
    assert upright.getpixel((20, 5)) == (255, 0, 0)
    assert upright.getpixel((20, 55)) == (0, 0, 255)
    assert load_examples([tmp_path / "a.png"], 20)[0].time_ids[:2].tolist() == [60, 40]


@pytest.mark.parametrize(("size", "crop"), [((80, 40), (0, 10)), ((40, 80), (10, 0)), ((40, 40), (0, 0))])
def test_time_ids_are_original_size_crop_and_target_in_sdxls_order(tmp_path, size, crop):
    halves(*size).save(tmp_path / "a.png")
    example = load_examples([tmp_path / "a.png"], 20)[0]
    assert example.time_ids.tolist() == [size[1], size[0], *crop, 20, 20]
    assert example.pixels.shape == (3, 20, 20)


def test_the_crop_is_the_middle_and_pixels_lie_in_minus_one_to_one(tmp_path):
    halves(80, 40).save(tmp_path / "a.png")
    pixels = load_examples([tmp_path / "a.png"], 20)[0].pixels
    torch.testing.assert_close(pixels[:, 10, 0], torch.tensor([1.0, -1.0, -1.0]))
    torch.testing.assert_close(pixels[:, 10, 19], torch.tensor([-1.0, -1.0, 1.0]))


def test_target_conditioning_gives_the_target_size_only(tmp_path):
    halves(80, 40).save(tmp_path / "a.png")
    example = load_examples([tmp_path / "a.png"], 20, "target")[0]
    assert example.time_ids.tolist() == [20, 20, 0, 0, 20, 20]


def bars(width, height):
    """An image whose red is the column's number and whose green is the row's."""
    values = np.zeros((height, width, 3), dtype=np.uint8)
    values[..., 0], values[..., 1] = np.arange(width), np.arange(height)[:, None]
    return Image.fromarray(values)


def shown(shot, image, **more):
    """The columns and rows of the original that a crop shows without resizing, and its time_ids."""
    example = preprocess("a.png", image, shot, **more)
    values = ((example.pixels + 1) * 127.5).round().int()
    return values[0, 0].tolist(), values[1, :, 0].tolist(), example.time_ids.tolist()


@pytest.mark.parametrize("crop", [None, (0.0, 0.0), (0.0, 0.999), (0.0, 0.4)])
@pytest.mark.parametrize("width", [30, 31])
def test_the_crop_of_a_mirrored_image_is_that_in_the_mirrored_image(crop, width):
    image = bars(width, 20)
    columns, _, time_ids = shown(CropVariant((20, 20), crop, mirrored=True), image)
    left = int(time_ids[3])
    turned = list(range(width))[::-1]
    assert columns == turned[left : left + 20]
    assert time_ids == [20, width, 0, left, 20, 20]


@pytest.mark.parametrize("size", [(20, 30), (30, 20), (20, 20)])
def test_a_bucket_is_covered_cropped_along_one_side_and_is_the_target_size(size):
    columns, rows, time_ids = shown(CropVariant(size, (0.5, 0.5)), bars(40, 40) if size == (20, 20) else bars(30, 30))
    assert (len(rows), len(columns)) == size
    assert time_ids[4:] == list(size)
    assert (time_ids[2] == 0) == (size[0] >= size[1])
    assert (time_ids[3] == 0) == (size[1] >= size[0])


def test_time_ids_have_the_position_of_a_random_crop():
    columns, rows, time_ids = shown(CropVariant((20, 20), (0.3, 0.7)), bars(20, 36))
    assert time_ids[:4] == [36, 20, int(0.3 * 17), 0]
    assert rows == list(range(int(time_ids[2]), int(time_ids[2]) + 20))
    assert columns == list(range(20))


def test_target_conditioning_gives_the_bucket_only():
    assert shown(CropVariant((20, 30), (0.0, 0.9), True), bars(60, 40), size_conditioning="target")[2] == [20, 30, 0, 0, 20, 30]


@pytest.mark.parametrize("orientation", range(1, 9))
def test_the_size_is_read_without_decoding(tmp_path, orientation):
    exif = Image.Exif()
    exif[ORIENTATION] = orientation
    halves(60, 40).save(tmp_path / "a.jpg", exif=exif)
    upright = read_image(tmp_path / "a.jpg")
    assert image_size(tmp_path / "a.jpg") == (upright.height, upright.width)


def test_transparent_parts_become_white(tmp_path):
    Image.new("RGBA", (8, 8), (255, 0, 0, 0)).save(tmp_path / "a.png")
    assert read_image(tmp_path / "a.png").getpixel((4, 4)) == (255, 255, 255)


@pytest.mark.parametrize("content", [b"no image at all", b"", b"\x89PNG\r\n\x1a\n"])
def test_an_unreadable_image_is_named(tmp_path, content):
    (tmp_path / "broken.png").write_bytes(content)
    with pytest.raises(InputError, match=r"broken\.png.* cannot be read as an image"):
        read_image(tmp_path / "broken.png")


@pytest.mark.parametrize("form", ["JPEG", "PNG", "WEBP", "BMP"])
def test_damaged_images_are_read_or_raise_an_input_error(form):
    rng = np.random.default_rng(0)
    whole = io.BytesIO()
    halves(20, 24).convert("L" if form == "BMP" else "RGB").save(whole, form, exif=b"" if form == "BMP" else turned_exif())
    for _ in range(400):
        damaged = bytearray(whole.getvalue())
        for place in rng.integers(len(damaged), size=3):
            damaged[place] = rng.integers(256)
        with contextlib.suppress(InputError):
            assert read_image(io.BytesIO(damaged), "the damaged one").mode == "RGB"


def test_a_format_that_pillow_passes_to_another_program_is_never_opened(tmp_path):
    halves(20, 20).save(tmp_path / "a.eps")
    (tmp_path / "a.eps").rename(tmp_path / "a.jpg")
    with pytest.raises(InputError, match=r"a\.jpg.* cannot be read as an image"):
        read_image(tmp_path / "a.jpg")


def test_more_pixels_than_allowed_are_refused_and_the_limit_itself_is_not(tmp_path):
    halves(20, 30).save(tmp_path / "a.png")
    assert read_image(tmp_path / "a.png", max_pixels=600).size == (20, 30)
    with pytest.raises(InputError, match=r"a\.png.* at most 599 pixels, got 20 x 30"):
        read_image(tmp_path / "a.png", max_pixels=599)


def test_a_truncated_image_is_named(tmp_path):
    halves(60, 40).save(tmp_path / "whole.jpg")
    (tmp_path / "cut.jpg").write_bytes((tmp_path / "whole.jpg").read_bytes()[:-200])
    with pytest.raises(InputError, match=r"cut\.jpg.* cannot be read as an image"):
        read_image(tmp_path / "cut.jpg")
