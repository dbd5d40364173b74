"""Embedded colour profiles: conversion to sRGB against algebra and LittleCMS, and reports of unusable profiles."""

import io
import warnings
import zlib
from types import SimpleNamespace

import numpy as np
import pytest
from icc_profiles import (
    ADOBE_GAMMA,
    ADOBE_RGB,
    DISPLAY_P3,
    SRGB,
    cmyk_profile,
    grey_profile,
    linear_to_srgb,
    rgb_profile,
    srgb_to_linear,
    to_xyz,
)
from PIL import Image, ImageCms, PngImagePlugin, features

from pipelines.fewshot.data import LabelledImage, read
from pipelines.fewshot.inputs import as_image
from pipelines.fewshot.sources import ImageBytes
from pipelines.images import read_image, read_image_with_notes
from pipelines.subject import encoding
from pipelines.subject.data import CropVariant
from pipelines.subject.encoding import LatentEncoder
from pipelines.subject.image_checks import check_images

PIXELS = np.random.default_rng(0).integers(0, 256, (40, 50, 3), dtype=np.uint8)
P3 = rgb_profile(DISPLAY_P3)
LOSSLESS = {"png": {}, "tif": {}, "webp": {"lossless": True}}


def file_of(image, suffix, **how):
    stream = io.BytesIO()
    image.save(stream, {"tif": "TIFF", "jpg": "JPEG"}.get(suffix, suffix.upper()), **how)
    stream.seek(0)
    return stream


def values(image):
    return np.asarray(image).astype(int)


def in_srgb(pixels, primaries, linear):
    """`linear` light of the primaries, converted by matrices through XYZ, with the transfer curve of sRGB."""
    light = linear(pixels / 255) @ (np.linalg.inv(to_xyz(SRGB)) @ to_xyz(primaries)).T
    return 255 * linear_to_srgb(light)


@pytest.mark.parametrize("suffix", LOSSLESS)
def test_display_p3_and_adobe_rgb_become_srgb_as_the_matrices_say(suffix):
    cases = [(P3, DISPLAY_P3, srgb_to_linear), (rgb_profile(ADOBE_RGB, ADOBE_GAMMA), ADOBE_RGB, lambda v: v**ADOBE_GAMMA)]
    for profile, primaries, linear in cases:
        found = read_image(file_of(Image.fromarray(PIXELS), suffix, icc_profile=profile, **LOSSLESS[suffix]), "a")
        expected = in_srgb(PIXELS, primaries, linear)
        assert np.abs(expected - PIXELS).max() > 20
        assert np.abs(values(found) - expected).max() <= 2


def test_a_jpeg_and_an_avif_are_converted_as_littlecms_converts_what_they_decode_to():
    for suffix in ("jpg", *(("avif",) if features.check("avif") else ())):
        stream = file_of(Image.fromarray(PIXELS), suffix, icc_profile=P3)
        source = ImageCms.ImageCmsProfile(io.BytesIO(P3))
        expected = ImageCms.profileToProfile(Image.open(stream), source, ImageCms.createProfile("sRGB"))
        assert (values(read_image(stream, "a")) == values(expected)).all()


def test_a_cmyk_jpeg_is_converted_by_its_profile():
    image = Image.fromarray(np.random.default_rng(1).integers(0, 256, (16, 16, 4), dtype=np.uint8), "CMYK")
    stream = file_of(image, "jpg", icc_profile=cmyk_profile(), quality=100)
    source = ImageCms.ImageCmsProfile(io.BytesIO(cmyk_profile()))
    expected = ImageCms.profileToProfile(Image.open(stream), source, ImageCms.createProfile("sRGB"), outputMode="RGB")
    assert (values(read_image(stream, "a")) == values(expected)).all()
    assert np.abs(values(expected) - values(Image.open(stream).convert("RGB"))).max() > 20


@pytest.mark.parametrize("bits", [8, 16])
def test_grey_images_are_converted_by_their_profile(bits):
    grey = np.arange(256, dtype=np.uint8)[None].repeat(2, axis=0)
    image = Image.fromarray(grey if bits == 8 else grey.astype(np.uint16) * 257)
    found = values(read_image(file_of(image, "png", icc_profile=grey_profile(1.8)), "a"))
    expected = 255 * linear_to_srgb((grey / 255) ** (461 / 256))
    assert np.abs(found - expected[..., None]).max() <= 2


def test_an_srgb_profile_of_any_program_changes_no_pixel():
    for profile in (ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes(), rgb_profile(SRGB)):
        found = read_image(file_of(Image.fromarray(PIXELS), "png", icc_profile=profile), "a")
        assert (np.asarray(found) == PIXELS).all()
        grey = Image.fromarray(PIXELS[..., 0])
        assert (
            np.asarray(read_image(file_of(grey, "jpg", icc_profile=profile), "a"))[..., 0]
            == values(Image.open(file_of(grey, "jpg")))
        ).all()


def test_transparency_becomes_white_after_the_conversion():
    alpha = np.random.default_rng(2).integers(0, 256, PIXELS.shape[:2], dtype=np.uint8)
    image = Image.fromarray(np.dstack([PIXELS, alpha]), "RGBA")
    found = values(read_image(file_of(image, "png", icc_profile=P3), "a"))
    share = alpha[..., None] / 255
    assert np.abs(found - (share * in_srgb(PIXELS, DISPLAY_P3, srgb_to_linear) + (1 - share) * 255)).max() <= 3


@pytest.mark.parametrize("mode", ["LA", "P", "1", "PA"])
def test_every_kind_of_image_is_converted(mode):
    image = Image.fromarray(PIXELS).convert("P" if mode == "PA" else mode)
    how = {"transparency": 0} if mode == "PA" else {}
    found = read_image(file_of(image, "png", icc_profile=grey_profile(1.8) if mode in ("LA", "1") else P3, **how), "a")
    assert found.mode == "RGB"
    if mode == "P":
        expected = in_srgb(values(image.convert("RGB")), DISPLAY_P3, srgb_to_linear)
        assert np.abs(values(found) - expected).max() <= 2


def test_a_converted_image_has_no_profile_so_that_it_is_not_applied_twice(tmp_path):
    found = read_image(file_of(Image.fromarray(PIXELS), "png", icc_profile=P3), "a")
    found.save(tmp_path / "again.png")
    assert not found.info
    assert read_image(tmp_path / "again.png").tobytes() == found.tobytes()


def test_both_tasks_and_pil_images_are_converted_alike(tmp_path):
    stream = file_of(Image.fromarray(PIXELS), "png", icc_profile=P3)
    expected = read_image(stream, "a").tobytes()
    (tmp_path / "a.png").write_bytes(stream.getvalue())
    assert read(LabelledImage(ImageBytes("a.png", stream.getvalue()), 0, "cat")).tobytes() == expected
    assert as_image(tmp_path / "a.png", "images[0]").tobytes() == expected
    given = Image.open(stream)
    assert as_image(given, "images[0]").tobytes() == expected
    assert given.info["icc_profile"] == P3


@pytest.mark.parametrize(
    ("profile", "words"),
    [(b"no profile" * 40, "damaged"), (P3[:200], "damaged|converted"), (cmyk_profile(), "CMYK"), (grey_profile(2.2), "GRAY")],
    ids=["words", "cut", "cmyk", "grey"],
)
def test_an_unusable_profile_is_reported_and_the_pixels_are_unchanged(tmp_path, profile, words):
    for suffix in ("png", "tif"):
        path = tmp_path / f"a.{suffix}"
        path.write_bytes(file_of(Image.fromarray(PIXELS), suffix, icc_profile=profile).getvalue())
        with pytest.warns(UserWarning, match=rf"a\.{suffix}'.*profile is not used.*({words})"):
            assert (np.asarray(read_image(path)) == PIXELS).all()
    assert [finding.kind for finding in check_images(tmp_path).images[0].findings].count("color_profile") == 1


def test_a_damaged_or_oversized_profile_chunk_of_a_png_is_reported():
    whole = file_of(Image.fromarray(PIXELS), "png").getvalue()
    for packed in (b"\0no zlib", b"\1" + zlib.compress(P3), b"\0" + zlib.compress(bytes(2**25))):
        body = b"iCCP" + b"name\0" + packed
        chunk = (len(body) - 4).to_bytes(4, "big") + body + zlib.crc32(body).to_bytes(4, "big")
        with pytest.warns(UserWarning, match="the photo: Its ICC colour profile is not used"):
            found = read_image(io.BytesIO(whole[:33] + chunk + whole[33:]), "the photo")
        assert (np.asarray(found) == PIXELS).all()


def test_a_jpeg_with_a_part_of_its_profile_missing_is_reported():
    content = file_of(Image.fromarray(PIXELS), "jpg", icc_profile=P3).getvalue()
    broken = content.replace(b"ICC_PROFILE\0\1\1", b"ICC_PROFILE\0\1\2")
    assert [note.kind for note in read_image_with_notes(io.BytesIO(broken), "a").notes] == ["color_profile"]


def _adobe_by_exif():
    exif = Image.Exif()
    exif[0x8769] = {0xA001: 65535, 0xA005: {1: "R03"}}
    return file_of(Image.fromarray(PIXELS), "jpg", exif=exif)


def _with_chunk(kind, data):
    info = PngImagePlugin.PngInfo()
    info.add(kind, data)
    return file_of(Image.fromarray(PIXELS), "png", pnginfo=info)


@pytest.mark.parametrize(
    ("stream", "words"),
    [
        (_adobe_by_exif(), "Adobe RGB"),
        (_with_chunk(b"gAMA", (55556).to_bytes(4, "big")), "gAMA"),
        (_with_chunk(b"cICP", b"\x0c\x0d\0\1"), "cICP"),
    ],
    ids=["exif", "gamma", "cicp"],
)
def test_other_colour_information_is_ignored_and_reported(stream, words):
    with pytest.warns(UserWarning, match=words):
        read_image(stream, "a")


@pytest.mark.parametrize(
    "stream", [_with_chunk(b"gAMA", (45455).to_bytes(4, "big")), _with_chunk(b"cICP", b"\1\x0d\0\1")], ids=["gamma", "cicp"]
)
def test_other_colour_information_that_says_srgb_is_not_reported(stream):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        read_image(stream, "a")


def test_the_cache_of_another_reading_version_is_not_reused(monkeypatch):
    encoder = SimpleNamespace(vae={})
    before = LatentEncoder._key(encoder, "digest", CropVariant((16, 16)), "image")
    monkeypatch.setattr(encoding, "READING_VERSION", 1)
    assert LatentEncoder._key(encoder, "digest", CropVariant((16, 16)), "image") != before
