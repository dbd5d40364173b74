"""Uploaded images of every format: stored as sRGB pixels without a profile, with notes on what was not used."""

import io
import os
import struct
import sys
import zipfile
import zlib

import numpy as np
import pillow_heif
import pytest
from icc_profiles import DISPLAY_P3, rgb_profile
from PIL import Image, ImageCms, features

from pipelines import image_formats, untrusted_images
from pipelines.fewshot.sources import ImageBytes
from pipelines.image_formats import UPLOAD_FORMATS, listed
from webui import classifiers, render, uploads
from webui.datasets import Dataset
from webui.workspace import Workspace

PIXELS = np.random.default_rng(0).integers(0, 256, (12, 20, 3), dtype=np.uint8)
P3 = rgb_profile(DISPLAY_P3)
KINDS = ["PNG", "WEBP", "TIFF", "GIF", "JPEG", *(["AVIF"] if features.check("avif") else [])]


@pytest.fixture
def dataset(tmp_path):
    return Dataset(Workspace(tmp_path / "runs", tmp_path / "sets", is_local=True).new_image_set())


def content(kind, image=None, **how):
    stream = io.BytesIO()
    (image or Image.fromarray(PIXELS)).save(stream, kind, **how)
    return stream.getvalue()


def expected(stored):
    """The sRGB pixels of the decoded file, converted by littlecms."""
    opened = Image.open(io.BytesIO(stored))
    image = opened.convert("RGB")
    if "icc_profile" not in opened.info:
        return np.asarray(image)
    return np.asarray(ImageCms.profileToProfile(image, ImageCms.ImageCmsProfile(io.BytesIO(P3)), ImageCms.createProfile("sRGB")))


@pytest.mark.parametrize("kind", KINDS)
def test_an_upload_is_stored_in_srgb_without_its_profile_whatever_its_name(tmp_path, dataset, kind):
    stored = content(kind, **({} if kind == "GIF" else {"icc_profile": P3}))
    (tmp_path / "a.TIF").write_bytes(stored)
    added = uploads.add_images(dataset, [tmp_path / "a.TIF"])
    assert (added.names, added.refused, added.notes) == (["0001.png"], [], [])
    with Image.open(dataset.folder / "0001.png") as image:
        assert not image.info
        assert (np.asarray(image) == expected(stored)).all()


def test_a_thumbnail_shows_the_colours_that_are_trained_on():
    image = Image.new("RGB", (64, 64), (255, 40, 40))
    path, _ = render.small(ImageBytes("a.png", content("PNG", image, icc_profile=P3)))
    assert np.abs(np.asarray(Image.open(path)).astype(int) - expected(content("PNG", image, icc_profile=P3))).max() < 12


def test_the_first_frame_of_an_animation_is_stored_with_a_note(tmp_path, dataset):
    frames = [Image.new("RGB", (8, 8), colour) for colour in ("red", "blue")]
    (tmp_path / "a.gif").write_bytes(content("GIF", frames[0], save_all=True, append_images=frames[1:]))
    added = uploads.add_images(dataset, [tmp_path / "a.gif"])
    assert added.refused == []
    assert len(added.notes) == 1
    assert added.notes[0].startswith("a.gif: It has several frames or pages; the first one is used.")
    assert Image.open(dataset.folder / added.names[0]).getpixel((0, 0)) == (255, 0, 0)


def test_an_unusable_colour_profile_is_noted(tmp_path, dataset):
    (tmp_path / "a.png").write_bytes(content("PNG", icc_profile=b"no profile" * 40))
    added = uploads.add_images(dataset, [tmp_path / "a.png"])
    assert [note.split(":")[:2] for note in added.notes] == [["a.png", " Its ICC colour profile is not used"]]


def test_notes_of_many_files_are_summarised(tmp_path, dataset):
    stored = content("PNG", icc_profile=b"no profile" * 40)
    for place in range(25):
        (tmp_path / f"{place}.png").write_bytes(stored)
    added = uploads.add_images(dataset, sorted(tmp_path.glob("*.png")))
    assert (len(added.names), len(added.notes)) == (25, uploads.SENTENCES)
    assert added.notes[-1] == "6 further files have similar notes."


@pytest.mark.parametrize(("kind", "scale"), [("JPEG", 4), ("MPO", 1), ("HEIF", 1)])
def test_a_photo_of_a_phone_with_48_megapixels_is_halved_with_a_note(tmp_path, dataset, monkeypatch, kind, scale):
    pillow_heif.register_heif_opener()
    # Encoding a HEIC of 48 megapixels takes many seconds, so one of 3 megapixels has a limit of 2.5.
    monkeypatch.setattr(untrusted_images, "MAX_PIXELS", untrusted_images.MAX_PIXELS * scale**2 // 16)
    width, height = 2016 * scale, 1512 * scale
    exif = Image.Exif()
    # On its side; a HEIC says so outside of its EXIF data.
    exif[0x0112] = 1 if kind == "HEIF" else 6
    size = (width // 2, height // 2) if kind == "HEIF" else (height // 2, width // 2)
    photo = Image.new("RGB", (width, height), "teal")
    photo.paste("red", (0, 0, width // 2, height))
    (tmp_path / "IMG_1.jpg").write_bytes(content(kind, photo, exif=exif))
    added = uploads.add_images(dataset, [tmp_path / "IMG_1.jpg"])
    assert added.refused == []
    words = (
        f"{3 * scale**2 + (scale > 1)} million pixels. It was downscaled to {size[0]:,} x {size[1]:,}, more than training uses."
    )
    assert added.notes == [f"IMG_1.jpg has {words}"]
    with Image.open(dataset.folder / added.names[0]) as stored:
        assert stored.size == size
        assert np.abs(np.subtract(stored.getpixel((10, 10)), (254, 0, 0))).max() < 4


def test_a_photo_with_more_pixels_than_any_phone_is_refused(tmp_path, dataset):
    (tmp_path / "a.jpg").write_bytes(content("JPEG", Image.new("L", (12_000, 11_000))))
    (sentence,) = uploads.add_images(dataset, [tmp_path / "a.jpg"]).refused
    assert "12,000 x 11,000; a JPEG image may have at most 128 million pixels" in sentence


@pytest.mark.parametrize("kind", ["GIF", "TIFF", "PNG"])
def test_a_bomb_of_any_format_is_refused_undecoded(tmp_path, dataset, kind):
    packed = {"TIFF": {"compression": "tiff_deflate"}}.get(kind, {})
    (tmp_path / "a.png").write_bytes(content(kind, Image.new("1", (12_000, 4_000)), **packed))
    added = uploads.add_images(dataset, [tmp_path / "a.png"])
    assert added.names == []
    assert "12,000 x 4,000" in added.refused[0]


def test_megabytes_of_text_in_a_png_are_dropped(tmp_path, dataset):
    whole, data = content("PNG"), b"workflow\0\0" + zlib.compress(b'{"nodes": []}' * 200_000)
    chunk = struct.pack(">I", len(data)) + b"zTXt" + data + struct.pack(">I", zlib.crc32(b"zTXt" + data))
    (tmp_path / "a.png").write_bytes(whole[:33] + chunk + whole[33:])
    added = uploads.add_images(dataset, [tmp_path / "a.png"])
    assert added.refused == []
    assert (np.asarray(Image.open(dataset.folder / added.names[0])) == PIXELS).all()


def test_a_heic_without_its_decoder_is_named_with_the_remedy(tmp_path, dataset, monkeypatch):
    monkeypatch.setitem(sys.modules, "pillow_heif", None)
    image_formats._register_heif.cache_clear()
    (tmp_path / "IMG_1.HEIC").write_bytes(b"\0\0\0\x18ftypheic\0\0\0\0mif1heic" + bytes(80))
    with zipfile.ZipFile(tmp_path / "a.zip", "w") as archive:
        archive.write(tmp_path / "IMG_1.HEIC", "cat/IMG_1.HEIC")
        archive.writestr("cat/2.jfif", content("JPEG"))
    for added in (uploads.add_images(dataset, [tmp_path / "IMG_1.HEIC"]), uploads.add_zip(dataset, tmp_path / "a.zip")):
        assert len(added.refused) == 1
        assert "IMG_1.HEIC cannot be read as an image: it is HEIC, whose decoder is missing." in added.refused[0]
        assert "pip install pillow-heif" in added.refused[0]
    assert added.names == ["c00/0001.png"]
    image_formats._register_heif.cache_clear()


def test_the_page_lists_the_formats_that_it_accepts(tmp_path, dataset):
    words = listed(UPLOAD_FORMATS)
    assert words.startswith("JPEG, PNG, WebP, GIF, TIFF")
    assert "BMP" not in words
    (tmp_path / "a.png").write_bytes(b"no image")
    assert f"is not a {words} image" in uploads.add_images(dataset, [tmp_path / "a.png"]).refused[0]
    assert {".jfif", ".tiff", ".gif", ".heic"} < set(image_formats.UPLOAD_SUFFIXES)


def test_a_name_that_is_not_valid_utf_8_can_be_displayed_and_written(tmp_path, dataset):
    path = tmp_path / os.fsdecode(b"\xffmug.png")
    try:
        path.write_bytes(content("PNG"))
    except OSError:
        pytest.skip("This file system takes no name that is not UTF-8.")
    assert uploads.add_images(dataset, [path]).names == ["0001.png"]
    assert uploads.display_name(path) == "mug.png"
    table = classifiers.write_table([{"image": path.name, "class 1": "mug"}], tmp_path / "a.csv")
    assert r"\udcffmug.png,mug" in table.read_text(encoding="utf-8")
