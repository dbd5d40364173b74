"""Input images of a classifier: files, PIL images and tensors are equivalent, and errors name the image."""

import io

import numpy as np
import pytest
import torch
from image_sets import stored_image
from PIL import Image

from pipelines.errors import InputError
from pipelines.fewshot.inputs import GivenImageSet

PIXELS = torch.randint(0, 256, (3, 3, 6, 8), generator=torch.Generator().manual_seed(0), dtype=torch.uint8)
IMAGES = [Image.fromarray(own.permute(1, 2, 0).numpy()) for own in PIXELS]
# All values of a byte.
LEVELS = torch.arange(256, dtype=torch.uint8).expand(3, 2, 256)


def arrays(given):
    """The inputs of the model as arrays (h, w, 3)."""
    found = GivenImageSet(given, np.asarray)
    assert [found[place][1] for place in range(len(found))] == list(range(len(found)))
    return [found[place][0] for place in range(len(found))]


@pytest.mark.parametrize(
    "given",
    [IMAGES, tuple(IMAGES), PIXELS, list(PIXELS), PIXELS / 255, (PIXELS / 255).half(), (PIXELS.double() / 255)],
    ids=["pictures", "tuple", "one tensor", "tensors", "single", "half", "double"],
)
def test_files_pil_images_and_tensors_give_the_same_image(given):
    np.testing.assert_array_equal(np.stack(arrays(given)), PIXELS.permute(0, 2, 3, 1))


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32, torch.float64])
def test_pixel_values_are_rounded_and_not_truncated(dtype):
    (found,) = arrays((LEVELS.double() / 255).to(dtype))
    np.testing.assert_array_equal(found, LEVELS.permute(1, 2, 0))


def test_images_are_named_by_path_or_index(tmp_path):
    IMAGES[0].save(tmp_path / "0.png")
    given = [tmp_path / "0.png", str(tmp_path / "0.png"), IMAGES[1], PIXELS[2]]
    np.testing.assert_array_equal(arrays(given)[:2], [IMAGES[0], IMAGES[0]])
    assert GivenImageSet(given, np.asarray).names == (*[str(tmp_path / "0.png")] * 2, "images[2]", "images[3]")
    for single in given:
        assert len(GivenImageSet(single, np.asarray)) == 1


def test_images_are_turned_upright_and_transparent_parts_white(tmp_path):
    exif = Image.Exif()
    exif[0x0112] = 6
    IMAGES[0].transpose(Image.Transpose.ROTATE_90).save(tmp_path / "turned.png", exif=exif)
    clear, white = IMAGES[0].convert("RGBA"), IMAGES[0].copy()
    clear.putalpha(Image.fromarray(np.repeat([[0], [255]], [2, 4], axis=0).repeat(8, axis=1).astype(np.uint8)))
    white.paste("white", (0, 0, 8, 2))
    with Image.open(tmp_path / "turned.png") as opened:
        found = arrays([tmp_path / "turned.png", opened, clear])
    np.testing.assert_array_equal(found, [IMAGES[0], IMAGES[0], white])


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ([], "images must contain at least one image, got none"),
        ([PIXELS[0], torch.zeros(1, 8, 8)], r"images\[1\] must be a tensor of shape \(3, h, w\), got \(1, 8, 8\)"),
        (torch.zeros(8, 8), r"images\[0\] must be a tensor of shape \(3, h, w\), got \(8, 8\)"),
        (torch.zeros(3, 0, 8), r"images\[0\] must be a tensor of shape \(3, h, w\), got \(3, 0, 8\)"),
        ([PIXELS[0], LEVELS / 255 * 2 - 1], r"images\[1\] must hold values in \[0, 1\], got -1 to 1\. Undo any normalisation"),
        ([PIXELS[0] * torch.nan], r"images\[0\] must hold values in \[0, 1\], got nan"),
        ([PIXELS[0].long()], r"images\[0\] must be uint8 or floating point, got torch\.int64"),
        ([PIXELS[0], PIXELS[0].numpy()], r"images\[1\] must be a PIL image, the path of a file, or a tensor .*, got ndarray"),
        (["nowhere/cat.png"], r"'nowhere/cat\.png' cannot be read as an image"),
    ],
)
def test_inputs_that_are_not_images_are_refused_by_index(given, message):
    with pytest.raises(InputError, match=message):
        arrays(given)


def test_a_damaged_image_is_named(tmp_path):
    cut = stored_image(0, side=64)[:-500]
    (tmp_path / "cut.png").write_bytes(cut)
    with pytest.raises(InputError, match=r"cut\.png' cannot be read as an image"):
        arrays([IMAGES[0], tmp_path / "cut.png"])
    with Image.open(io.BytesIO(cut)) as opened, pytest.raises(InputError, match=r"images\[1\] cannot be decoded"):
        arrays([IMAGES[0], opened])
