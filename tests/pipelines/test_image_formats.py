"""Image formats are recognised by content, and unsupported files are reported with the remedy."""

import io
import sys
import warnings

import numpy as np
import pytest
from icc_profiles import DISPLAY_P3, rgb_profile
from PIL import Image, features
from shared_cases import case_folder

from pipelines import image_formats
from pipelines.errors import InputError
from pipelines.fewshot.data import LabelledImage, check_readable
from pipelines.fewshot.sources import ImageBytes
from pipelines.images import IMAGE_SUFFIXES, has_image_name, read_image, read_image_with_notes
from pipelines.subject.data import image_size
from pipelines.subject.folder_scan import scan_folder
from pipelines.subject.image_checks import check_images

PIXELS = np.random.default_rng(0).integers(0, 256, (30, 44, 3), dtype=np.uint8)
KINDS = ["JPEG", "PNG", "WEBP", "GIF", "TIFF", "BMP", *(["AVIF"] if features.check("avif") else [])]
ORIENTATION, TURNED_RIGHT = 0x0112, 6
JPEG_SUFFIXES = [".jpg", ".jpeg", ".jpe", ".jfif", ".jfi", ".jif", ".JFIF", ".JPE", ".JPG"]


def content(kind, image=None, **how):
    stream = io.BytesIO()
    (image or Image.fromarray(PIXELS)).save(stream, kind, **how)
    return stream.getvalue()


@pytest.fixture
def without_heif(monkeypatch):
    monkeypatch.setitem(sys.modules, "pillow_heif", None)
    image_formats._register_heif.cache_clear()
    yield
    image_formats._register_heif.cache_clear()


@pytest.mark.parametrize("kind", ["only", "mixed"])
def test_jpegs_with_the_suffixes_jfif_and_jpe_are_images(kind):
    folder = case_folder("photos-jfif") / f"jfif_{kind}"
    assert len(scan_folder(folder).subjects[0].images) == 5
    assert len(check_images(folder).usable) == 5


def test_every_jpeg_suffix_is_recognised_in_upper_and_lower_case(tmp_path):
    for place, suffix in enumerate(JPEG_SUFFIXES):
        (tmp_path / f"{place}{suffix}").write_bytes(content("JPEG"))
    (subject,) = scan_folder(tmp_path).subjects
    assert [path.suffix for path in subject.images] == JPEG_SUFFIXES
    assert {read_image(path).size for path in subject.images} == {(44, 30)}


def test_names_of_all_readable_formats_are_images_in_either_case_and_hidden_ones_are_not():
    for suffix in IMAGE_SUFFIXES:
        assert has_image_name(f"a{suffix}")
        assert has_image_name(f"A{suffix.upper()}")
        assert not has_image_name(f".a{suffix}")
    assert {".tif", ".tiff", ".gif", ".heic", ".heif", ".avif", ".webp", ".bmp"} < IMAGE_SUFFIXES
    assert not has_image_name("a.svg")


@pytest.mark.parametrize("kind", KINDS)
def test_a_file_is_read_by_its_content_whatever_its_name(tmp_path, kind):
    for name in ("a.png", "b.jfif", "c.tif", "d.heic"):
        (tmp_path / name).write_bytes(content(kind))
        assert read_image(tmp_path / name).size == (44, 30)


def _several(kind):
    frames = [Image.new("RGB", (20, 12), colour) for colour in ("red", "lime", "blue")]
    return content(kind, frames[0], save_all=True, append_images=frames[1:], **({"lossless": True} if kind == "WEBP" else {}))


@pytest.mark.parametrize("kind", [kind for kind in KINDS if kind not in ("JPEG", "BMP")])
def test_the_first_of_several_frames_or_pages_is_used_with_a_note(tmp_path, kind):
    (tmp_path / "a.gif").write_bytes(_several(kind))
    with pytest.warns(UserWarning, match=r"a\.gif'.*the first one is used"):
        found = read_image(tmp_path / "a.gif")
    assert np.abs(np.asarray(found).astype(int) - (255, 0, 0)).max() <= (3 if kind == "AVIF" else 0)
    assert "first_frame" in [finding.kind for finding in check_images(tmp_path).images[0].findings]


@pytest.mark.parametrize("kind", ["GIF", "TIFF", "WEBP", "PNG", "MPO"])
def test_a_single_frame_gives_no_note(kind):
    how = {"save_all": True, "append_images": [Image.new("RGB", (44, 30))]} if kind == "MPO" else {}
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert read_image(io.BytesIO(content(kind, **how)), "a").size == (44, 30)


def test_transparent_parts_of_a_gif_are_white():
    image = Image.new("P", (8, 8), 0)
    image.putpalette([10, 20, 30])
    assert read_image(io.BytesIO(content("GIF", image, transparency=0)), "a").getpixel((1, 1)) == (255, 255, 255)


@pytest.mark.parametrize("kind", [kind for kind in KINDS if kind not in ("GIF", "BMP")])
@pytest.mark.parametrize("orientation", [1, 3, TURNED_RIGHT])
def test_the_reported_size_is_that_of_the_upright_image(tmp_path, kind, orientation):
    exif = Image.Exif()
    exif[ORIENTATION] = orientation
    (tmp_path / "a.jpg").write_bytes(content(kind, exif=exif))
    found = read_image_with_notes(tmp_path / "a.jpg")
    assert found.image.size == ((30, 44) if orientation == TURNED_RIGHT else (44, 30))
    assert image_size(tmp_path / "a.jpg") == (found.image.height, found.image.width)
    assert [note.kind for note in found.notes] == ([] if orientation == 1 else ["turned"])


def test_sixteen_bit_greys_of_a_tiff_are_scaled_in_either_byte_order_and_polarity():
    ramp = (np.arange(256, dtype=np.uint16) * 257)[None].repeat(2, axis=0)
    for image in (Image.fromarray(ramp), Image.frombytes("I;16B", (256, 2), ramp.astype(">u2").tobytes())):
        plain = read_image(io.BytesIO(content("TIFF", image)), "a")
        assert (np.asarray(plain)[..., 0] == np.arange(256)).all()
    inverted = read_image(io.BytesIO(content("TIFF", Image.fromarray(ramp), tiffinfo={262: 0})), "a")
    assert (np.asarray(inverted)[..., 0] == 255 - np.arange(256)).all()


def test_the_transparent_grey_of_sixteen_bits_is_white_and_its_neighbours_are_not():
    greys = np.array([[20_000, 20_001, 40_000]], dtype=np.uint16)
    found = read_image(io.BytesIO(content("PNG", Image.fromarray(greys), transparency=20_000)), "a")
    assert np.asarray(found)[0, :, 0].tolist() == [255, 20_001 // 257, 40_000 // 257]


def test_pixels_without_a_fixed_range_are_refused_rather_than_clipped():
    for values in (np.linspace(0, 1, 64, dtype=np.float32), np.arange(64, dtype=np.int32)):
        stream = io.BytesIO(content("TIFF", Image.fromarray(values.reshape(8, 8))))
        with pytest.raises(InputError, match=r"the scan cannot be read .*8 or 16 bits a channel"):
            read_image(stream, "the scan")


@pytest.mark.parametrize("tags", [{254: 1}, {50706: b"\1\4\0\0"}], ids=["reduced", "dng"])
def test_the_preview_in_a_raw_file_is_not_used_as_the_image(tags):
    stream = io.BytesIO(content("TIFF", tiffinfo=tags))
    with pytest.raises(InputError, match=r"the photo cannot be read .*a camera's raw file. Save it as JPEG or PNG"):
        read_image(stream, "the photo")


def ftyp(*brands):
    body = b"ftyp" + brands[0] + bytes(4) + b"".join(brands[1:])
    return (len(body) + 4).to_bytes(4, "big") + body + bytes(64)


@pytest.mark.parametrize(
    "start", [ftyp(b"heic", b"mif1", b"heic"), ftyp(b"mif1", b"heic"), b"any"], ids=["heic", "mif1", "words"]
)
def test_without_pillow_heif_a_heic_is_reported_with_the_remedy(tmp_path, without_heif, start):
    for name in ("photo.HEIC", "1.jpg", "2.jpg"):
        (tmp_path / name).write_bytes(start if name == "photo.HEIC" else content("JPEG"))
    with pytest.raises(InputError, match=r"photo\.HEIC'.*HEIC.*pip install pillow-heif"):
        read_image(tmp_path / "photo.HEIC")
    report = check_images(tmp_path)
    assert "pip install pillow-heif" in report.summary()
    assert {path.name for path in report.usable} == {"1.jpg", "2.jpg"}


def test_without_avif_in_pillow_an_avif_is_reported_with_the_remedy(monkeypatch):
    monkeypatch.setattr(image_formats.features, "check", lambda name: False)
    with pytest.raises(InputError, match=r"the photo .*AVIF.*upgrade Pillow"):
        read_image(io.BytesIO(ftyp(b"mif1", b"avif")), "the photo")
    assert "AVIF" not in image_formats.listed()


def test_with_pillow_heif_a_heic_is_read_upright_and_in_srgb(tmp_path):
    pillow_heif = pytest.importorskip("pillow_heif")
    pillow_heif.register_heif_opener()
    exif = Image.Exif()
    exif[ORIENTATION] = TURNED_RIGHT
    image, profile = Image.new("RGB", (48, 32), (200, 80, 40)), rgb_profile(DISPLAY_P3)
    (tmp_path / "a.HEIC").write_bytes(content("HEIF", image, exif=exif.tobytes(), icc_profile=profile, quality=100))
    found = read_image(tmp_path / "a.HEIC")
    assert found.size == (32, 48)
    assert image_size(tmp_path / "a.HEIC") == (48, 32)
    expected = read_image(io.BytesIO(content("PNG", image, icc_profile=profile)), "a").getpixel((1, 1))
    assert np.abs(np.asarray(found).astype(int) - expected).max() < 8


@pytest.mark.parametrize(
    ("start", "words"),
    [
        (b"\xff\x0a", "JPEG XL"),
        (b"\0\0\0\x0cjP  \r\n\x87\n", "JPEG 2000"),
        (b"8BPS\0\1", "Photoshop"),
        (b"%PDF-1.7", "PDF"),
        (b"%!PS-Adobe-3.0 EPSF-3.0", "PostScript"),
        (b"<svg xmlns='http://www.w3.org/2000/svg'/>", "SVG"),
        (b"\n<!DOCTYPE html><html>", "web page"),
        (b"version https://git-lfs.github.com/spec/v1\n", "git lfs pull"),
        (b"II*\0\x10\0\0\0CR\2\0", "raw file"),
        (ftyp(b"crx "), "raw file"),
        (ftyp(b"isom", b"mp42"), "video"),
        (b"PK\x03\x04", "zip"),
    ],
)
def test_a_file_that_is_not_an_image_is_recognised(tmp_path, start, words):
    (tmp_path / "a.jpg").write_bytes(start + bytes(100))
    with pytest.raises(InputError, match=rf"a\.jpg' cannot be read as an image: it is .*{words}"):
        read_image(tmp_path / "a.jpg")


@pytest.mark.parametrize("kind", KINDS)
def test_messages_about_damage_name_the_file_and_no_python_object(tmp_path, kind):
    whole = content(kind)
    for cut in (0, 1, 8, 14, 40, len(whole) // 2, len(whole) * 9 // 10):
        path = tmp_path / "cut.jpg"
        path.write_bytes(whole[:cut])
        for damaged in (lambda path=path: read_image(path), lambda path=path: check_readable([_labelled(path.read_bytes())])):
            with pytest.raises(InputError, match=r"cut\.jpg' .*cannot be read") as error:
                damaged()
            assert "<" not in str(error.value)


def _labelled(stored):
    return LabelledImage(ImageBytes("cat/cut.jpg", stored), 0, "cat")


def test_a_folder_named_like_an_image_is_reported(tmp_path):
    (tmp_path / "x.jpg").mkdir()
    with pytest.raises(InputError, match=r"x\.jpg' cannot be read"):
        read_image(tmp_path / "x.jpg")


def test_a_photo_of_48_megapixels_is_read(tmp_path):
    Image.new("1", (8000, 6000)).save(tmp_path / "a.png")
    assert read_image(tmp_path / "a.png").size == (8000, 6000)
