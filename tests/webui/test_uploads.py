"""Uploads: which files are accepted, and how they are stored."""

from __future__ import annotations

import io
import json
import os
import pickle
import struct
import threading
import zipfile
from pathlib import Path

import numpy as np
import pytest
import torch
from hostile import bomb_png, hostile_zips, pickled, png_bytes, polyglot
from PIL import Image, ImageCms
from safetensors.torch import save_file

from pipelines.errors import InputError
from pipelines.image_formats import UPLOAD_FORMATS, listed
from webui import uploads
from webui.datasets import Dataset
from webui.generation import find_adapter, others
from webui.workspace import Workspace


@pytest.fixture
def workspace(tmp_path):
    return Workspace(tmp_path / "runs", tmp_path / "sets", is_local=True)


@pytest.fixture
def dataset(workspace):
    return Dataset(workspace.new_image_set())


def written(path: Path, content: bytes) -> Path:
    path.write_bytes(content)
    return path


def opened(dataset: Dataset, file: str) -> Image.Image:
    with Image.open(dataset.folder / file) as image:
        image.load()
        return image


def test_a_png_of_17_kb_that_decodes_to_144_megapixels_is_refused_undecoded(tmp_path, dataset):
    path = written(tmp_path / "small.png", bomb_png())
    assert path.stat().st_size < 20_000
    added = uploads.add_images(dataset, [path])
    assert added.names == []
    assert "12,000 x 12,000" in added.refused[0]
    assert "40 million pixels" in added.refused[0]


@pytest.mark.parametrize(
    "content",
    [
        b'<svg xmlns="http://www.w3.org/2000/svg"><script>alert(1)</script></svg>',
        b"<!doctype html><script>alert(1)</script>",
        b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n",
        b"name,label\n1,2\n",
        b"\xff\x0a a JPEG XL image",
        b"",
        pickle.dumps([1]),
    ],
    ids=["svg", "html", "postscript", "csv", "jxl", "empty", "pickle"],
)
def test_a_file_that_is_not_an_image_is_refused_whatever_its_suffix(tmp_path, dataset, content):
    added = uploads.add_images(dataset, [written(tmp_path / "mug.png", content)])
    assert added.names == []
    assert added.refused == [f"mug.png is not a {listed(UPLOAD_FORMATS)} image. Save it in one of these formats."]


def test_a_bitmap_is_refused_although_pillow_reads_it(tmp_path, dataset):
    Image.new("RGB", (8, 8)).save(tmp_path / "a.png", "BMP")
    assert "is not a JPEG" in uploads.add_images(dataset, [tmp_path / "a.png"]).refused[0]


def test_only_the_pixels_of_a_polyglot_are_stored(tmp_path, dataset):
    path = written(tmp_path / "a.png", polyglot())
    assert zipfile.is_zipfile(path)
    [name] = uploads.add_images(dataset, [path]).names
    stored = (dataset.folder / name).read_bytes()
    assert b"<script>" not in stored
    assert b"secret.txt" not in stored
    assert not zipfile.is_zipfile(dataset.folder / name)


def test_a_refused_file_does_not_block_the_others(tmp_path, dataset):
    good = [written(tmp_path / f"{place}.png", png_bytes(place)) for place in range(2)]
    added = uploads.add_images(dataset, [good[0], written(tmp_path / "bad.png", b"no"), good[1], tmp_path / "gone.png"])
    assert added.names == ["0001.png", "0002.png"]
    assert [sentence.split()[0] for sentence in added.refused] == ["bad.png", "gone.png"]
    assert [entry.name for entry in dataset.photos()] == ["0.png", "1.png"]


def test_a_batch_in_which_the_server_is_killed_is_not_listed_and_can_be_added_again(tmp_path, dataset, monkeypatch):
    class Killed(BaseException):
        pass

    def killed_at_second(source, target):
        if str(target).endswith("0002.png"):
            raise Killed("at the second image")
        replace(source, target)

    files, replace = [written(tmp_path / f"{place}.png", png_bytes(place)) for place in range(3)], os.replace
    with monkeypatch.context() as patch:
        patch.setattr(os, "replace", killed_at_second)
        with pytest.raises(Killed, match="at the second image"):
            uploads.add_images(dataset, files)
    assert dataset.photos() == []
    uploads.add_images(dataset, files[1:])
    assert [(entry.file, entry.name) for entry in dataset.photos()] == [("0001.png", "1.png"), ("0002.png", "2.png")]
    (dataset.folder / "0003.jpg").write_bytes(b"of another batch that was not listed")
    dataset.seal()
    assert sorted(path.name for path in dataset.folder.iterdir()) == ["0001.png", "0002.png", "set.json"]


def test_a_truncated_image_is_refused(tmp_path, dataset):
    noise = np.random.default_rng(0).integers(0, 256, (64, 64, 3), dtype=np.uint8)
    whole = io.BytesIO()
    Image.fromarray(noise).save(whole, "JPEG")
    added = uploads.add_images(dataset, [written(tmp_path / "a.jpg", whole.getvalue()[:900])])
    assert added.refused == ["a.jpg is damaged or truncated. Add it again, or export it again from the original."]


def test_a_file_of_more_than_25_mb_is_refused_unread(tmp_path, dataset):
    path = tmp_path / "large.png"
    with path.open("wb") as file:
        file.truncate(26 * 2**20)
    assert "26 MB" in uploads.add_images(dataset, [path]).refused[0]


def test_metadata_is_dropped_and_the_orientation_applied(tmp_path, dataset):
    exif = Image.Exif()
    exif[0x0112], exif[0x010E] = 6, "where I live"
    image = Image.new("RGB", (20, 10), "red")
    image.save(tmp_path / "a.jpg", exif=exif, comment=b"my secret")
    [name] = uploads.add_images(dataset, [tmp_path / "a.jpg"]).names
    stored = opened(dataset, name)
    assert stored.size == (10, 20)
    assert not stored.getexif()
    assert not stored.info
    assert b"secret" not in (dataset.folder / name).read_bytes()


def test_small_images_are_stored_losslessly_and_large_ones_as_jpeg(tmp_path, dataset):
    small = np.random.default_rng(0).integers(0, 256, (64, 64, 3), dtype=np.uint8)
    Image.fromarray(small).save(tmp_path / "small.png")
    Image.new("RGB", (1600, 1200), "teal").save(tmp_path / "large.png")
    names = uploads.add_images(dataset, [tmp_path / "small.png", tmp_path / "large.png"]).names
    assert names == ["0001.png", "0002.jpg"]
    assert (np.asarray(opened(dataset, names[0])) == small).all()
    assert opened(dataset, names[1]).size == (1600, 1200)


def test_sixteen_bits_a_pixel_are_scaled_not_clipped(tmp_path, dataset):
    Image.fromarray(np.full((4, 4), 32896, dtype=np.uint16)).save(tmp_path / "deep.png")
    [name] = uploads.add_images(dataset, [tmp_path / "deep.png"]).names
    assert opened(dataset, name).getpixel((0, 0)) == (128, 128, 128)


@pytest.mark.parametrize("mode", ["CMYK", "L", "P", "LA", "RGBA", "1"])
def test_every_kind_of_image_comes_out_as_rgb(tmp_path, dataset, mode):
    path = tmp_path / ("a.jpg" if mode == "CMYK" else "a.png")
    Image.new("RGB", (6, 6), "white").convert(mode).save(path)
    [name] = uploads.add_images(dataset, [path]).names
    stored = opened(dataset, name)
    assert (stored.mode, stored.getpixel((3, 3))) == ("RGB", (255, 255, 255))


def test_the_first_frame_of_an_animation_is_used(tmp_path, dataset):
    frames = [Image.new("RGB", (8, 8), colour) for colour in ("red", "blue")]
    frames[0].save(tmp_path / "a.webp", save_all=True, append_images=frames[1:], lossless=True)
    frames[0].save(tmp_path / "b.png", save_all=True, append_images=frames[1:])
    names = uploads.add_images(dataset, [tmp_path / "a.webp", tmp_path / "b.png"]).names
    assert [opened(dataset, name).getpixel((0, 0)) for name in names] == [(255, 0, 0), (255, 0, 0)]


def test_a_jpeg_that_carries_further_images_counts_as_jpeg(tmp_path, dataset):
    Image.new("RGB", (8, 8), "red").save(tmp_path / "a.jpg", "MPO", save_all=True, append_images=[Image.new("RGB", (8, 8))])
    with Image.open(tmp_path / "a.jpg") as image:
        assert image.format == "MPO"
    assert uploads.add_images(dataset, [tmp_path / "a.jpg"]).refused == []


def test_a_damaged_colour_profile_is_ignored(tmp_path, dataset):
    good = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()
    Image.new("RGB", (8, 8), "red").save(tmp_path / "good.png", icc_profile=good)
    Image.new("RGB", (8, 8), "red").save(tmp_path / "bad.png", icc_profile=b"no profile" * 40)
    names = uploads.add_images(dataset, [tmp_path / "good.png", tmp_path / "bad.png"]).names
    assert [opened(dataset, name).getpixel((0, 0)) for name in names] == [(255, 0, 0), (255, 0, 0)]


def test_names_are_stored_in_set_json_as_one_line(tmp_path, dataset):
    name = "<img src=x onerror=alert(1)>; rm -rf $(pwd) `id`.png"
    path = written(tmp_path / name, png_bytes())
    assert uploads.add_images(dataset, [path]).names == ["0001.png"]
    assert [entry.name for entry in dataset.photos()] == [name]
    assert sorted(path.name for path in dataset.folder.iterdir()) == ["0001.png", "set.json"]
    assert uploads.display_name("/etc/a\nb\x1b[31m.png") == "a b [31m.png"
    assert uploads.display_name("C:\\photos\\a.png") == "a.png"


@pytest.mark.parametrize("kind", list(hostile_zips()))
def test_a_hostile_zip_is_refused_completely(tmp_path, dataset, kind):
    make, sentence = hostile_zips()[kind]
    path = make(tmp_path / "upload.zip")
    before = sorted(tmp_path.parent.rglob("*"))
    with pytest.raises(InputError, match=sentence) as refused:
        uploads.add_zip(dataset, path)
    assert str(tmp_path) not in str(refused.value)
    assert sorted(tmp_path.parent.rglob("*")) == before
    assert dataset.content().images() == []


def test_the_class_folders_of_a_zip_become_classes(tmp_path, dataset):
    with zipfile.ZipFile(tmp_path / "a.zip", "w") as archive:
        for place, name in enumerate(("set/red mug/1.png", "set/red mug/2.png", "set/<b>blue</b> mug/1.png")):
            archive.writestr(name.replace("</b>", ""), png_bytes(place))
        archive.writestr("set/red mug/broken.jpg", b"no")
        archive.writestr("set/more.zip", b"PK")
        archive.writestr("set/labels.csv", b"a,b")
        archive.writestr("alone.png", png_bytes(9))
        archive.writestr("__MACOSX/set/red mug/1.png", b"no")
    added = uploads.add_zip(dataset, tmp_path / "a.zip")
    assert added.names == ["c00/0001.png", "c01/0001.png", "c01/0002.png"]
    assert [(each.folder, each.name) for each in dataset.content().classes] == [("c00", "<b>blue mug"), ("c01", "red mug")]
    refused = " ".join(added.refused)
    assert len(added.refused) == 4
    for part in ("more.zip is a zip inside the zip", "labels.csv", "alone.png is not in a class folder", "broken.jpg"):
        assert part in refused


def test_a_second_zip_adds_to_the_classes_of_the_first(tmp_path, dataset):
    for place in range(2):
        with zipfile.ZipFile(tmp_path / "a.zip", "w") as archive:
            archive.writestr("Cat/1.png" if place else "cat/1.png", png_bytes(place))
        uploads.add_zip(dataset, tmp_path / "a.zip")
        os.utime(tmp_path / "a.zip", (place, place))
    assert [(each.name, len(each.images)) for each in dataset.content().classes] == [("cat", 2)]


def test_the_number_of_images_per_user_is_limited(tmp_path, dataset, monkeypatch):
    monkeypatch.setattr(uploads, "MAX_IMAGES", 10)
    files = [written(tmp_path / f"{place}.png", png_bytes(place)) for place in range(20)]
    added = uploads.add_images(dataset, files)
    assert len(added.names) == 8
    assert "10 images" in added.refused[-1]


def test_the_files_of_a_user_are_counted_once_per_upload_not_per_batch(tmp_path, dataset, monkeypatch):
    counted, quota = [], uploads.Quota
    monkeypatch.setattr(uploads, "Quota", lambda sets: counted.append(sets) or quota(sets))
    files = [written(tmp_path / f"{place}.png", png_bytes(place)) for place in range(2 * uploads.BATCH + 1)]
    assert len(uploads.add_images(dataset, files).names) == len(files)
    assert counted == [dataset.folder.parent]


def test_the_bytes_per_user_are_limited(tmp_path, dataset, monkeypatch):
    monkeypatch.setattr(uploads, "MAX_USER_BYTES", 10)
    added = uploads.add_images(dataset, [written(tmp_path / "a.png", png_bytes())])
    assert added.names == []
    assert "Delete a dataset" in added.refused[0]


def test_images_are_removed_reordered_moved_and_captioned_by_their_generated_names(tmp_path, dataset):
    files = [written(tmp_path / f"{place}.png", png_bytes(place)) for place in range(3)]
    uploads.add_images(dataset, files)
    dataset.move("0003.png", -2)
    dataset.move("0002.png", 1)
    dataset.set_caption("0003.png", "a red\nmug")
    assert (dataset.folder / "0003.txt").read_text() == "a red mug"
    dataset.remove(["0001.png"])
    assert [(image.file, image.caption) for image in dataset.photos()] == [("0003.png", "a red mug"), ("0002.png", "")]
    cups = dataset.add_class("cups")
    assert dataset.move_to_class(["0003.png"], cups) == ["c00/0001.png"]
    dataset.rename_class(cups, "mugs")
    assert [(one.name, one.images[0].caption) for one in dataset.content().classes] == [("mugs", "a red mug")]
    assert (dataset.folder / "c00/0001.txt").exists()
    dataset.remove_class(cups)
    assert not (dataset.folder / "c00").exists()
    uploads.add_images(dataset, files[:1])
    assert [image.file for image in dataset.photos()] == ["0002.png", "0004.png"]
    dataset.delete()
    with pytest.raises(InputError, match="no longer exist"):
        uploads.add_images(dataset, files)


@pytest.mark.parametrize("file", ["../../secret.txt", "/etc/passwd", "c00/../../x", "set.json", "", "0001.png\x00"])
def test_no_path_given_by_a_user_is_followed(tmp_path, dataset, file):
    uploads.add_images(dataset, [written(tmp_path / "a.png", png_bytes())])
    before = sorted(tmp_path.rglob("*"))
    for change in (
        lambda: dataset.remove([file]),
        lambda: dataset.move(file, 1),
        lambda: dataset.set_caption(file, "words"),
        lambda: dataset.move_to_class(["0001.png"], file),
        lambda: dataset.move_to_class([file], "c00"),
        lambda: dataset.remove_class(file),
        lambda: dataset.rename_class(file, "x"),
        lambda: uploads.add_images(dataset, [tmp_path / "a.png"], file),
    ):
        with pytest.raises(InputError, match="no longer exist"):
            change()
    assert sorted(path for path in tmp_path.rglob("*") if path.name != "set.json") == [
        path for path in before if path.name != "set.json"
    ]


def test_two_simultaneous_uploads_lose_no_image(tmp_path, dataset):
    files = [written(tmp_path / f"{place}.png", png_bytes(place)) for place in range(8)]
    tabs = [threading.Thread(target=lambda file=file: [uploads.add_images(dataset, [file]) for _ in range(5)]) for file in files]
    for tab in tabs:
        tab.start()
    for tab in tabs:
        tab.join()
    entries = dataset.photos()
    assert len({entry.file for entry in entries}) == len(entries) == 40
    assert all((dataset.folder / entry.file).exists() for entry in entries)
    assert json.loads((dataset.folder / "set.json").read_text())["photos"]["next"] == 41


def test_a_pickle_named_safetensors_is_refused_and_runs_nothing(tmp_path, workspace):
    trace = tmp_path / "was-run"
    for place, content in enumerate(pickled(trace)):
        path = written(tmp_path / f"{place}.safetensors", content)
        with pytest.raises(InputError, match=r"pickle|truncated|header"):
            uploads.add_adapter(workspace, path)
    assert not trace.exists()
    assert uploads.adapters(workspace) == []


def test_an_adapter_is_copied_under_a_generated_name(tmp_path, workspace):
    path = tmp_path / "<b>mine.safetensors"
    save_file({"unet.x.lora_A.weight": torch.ones(2, 2)}, path)
    copy, notes = uploads.add_adapter(workspace, path)
    assert notes == []
    assert uploads.adapters(workspace) == [("<b>mine.safetensors", copy)]
    assert copy.parent.parent == workspace.sets
    assert copy.read_bytes() == path.read_bytes()


def test_tensors_that_are_no_adapter_or_not_finite_are_refused(tmp_path, workspace):
    save_file({"conv.weight": torch.ones(2)}, tmp_path / "model.safetensors")
    save_file({"x.lora_A.weight": torch.full((2, 2), torch.nan)}, tmp_path / "nan.safetensors")
    (tmp_path / "table.csv").write_text("a,b")
    sentences = {"model.safetensors": "no adapter", "nan.safetensors": "not finite", "table.csv": "must have the suffix"}
    for name, sentence in sentences.items():
        with pytest.raises(InputError, match=sentence) as refused:
            uploads.add_adapter(workspace, tmp_path / name)
        assert str(tmp_path) not in str(refused.value)


@pytest.mark.parametrize(
    ("tensors", "sentence"),
    [
        (
            {"clip_l": torch.ones(2, 768), "clip_g": torch.ones(2, 1280)},
            r"^a\.safetensors is a textual inversion .* and not a LoRA",
        ),
        ({"lora_unet_double_blocks_0_img_attn_proj.lora_down.weight": torch.ones(2, 8)}, r"^a\.safetensors is a LoRA of Flux"),
        ({"unet.x.lora_A.weight": torch.ones(2, 2), "control_model.x.weight": torch.ones(2)}, r"^a\.safetensors is a ControlNet"),
    ],
)
def test_a_file_that_is_not_a_lora_for_sdxl_is_refused_with_its_kind(tmp_path, workspace, tensors, sentence):
    save_file(tensors, tmp_path / "a.safetensors")
    with pytest.raises(InputError, match=sentence):
        uploads.add_adapter(workspace, tmp_path / "a.safetensors")


def test_integer_alphas_are_accepted_and_ignored_tensors_reported(tmp_path, workspace):
    layer = "lora_unet_input_blocks_4_1_proj_in"
    tensors = {f"{layer}.lora_down.weight": torch.ones(2, 4), f"{layer}.alpha": torch.tensor(2)}
    tensors |= {"bundle_emb.blue mug.clip_l": torch.ones(1, 4), "step": torch.tensor(9)}
    save_file(tensors, tmp_path / "<b>.SAFETENSORS")
    copy, said = uploads.add_adapter(workspace, tmp_path / "<b>.SAFETENSORS")
    assert copy.suffix == ".safetensors"
    assert said[0].startswith("<b>.SAFETENSORS also holds a textual inversion ('blue mug')")
    assert "also holds 'step'" in said[1]


def test_two_uploaded_adapters_have_different_references(tmp_path, workspace):
    copies = {}
    for name in ("first.safetensors", "second.safetensors"):
        save_file({"unet.x.lora_A.weight": torch.ones(2, 2)}, tmp_path / name)
        copies[name], _ = uploads.add_adapter(workspace, tmp_path / name)
    references = dict(others(workspace, None))
    assert set(references) == set(copies)
    for name, copy in copies.items():
        assert find_adapter(workspace, references[name]).path == copy


def test_a_header_larger_than_the_limit_is_refused(tmp_path, workspace):
    path = written(tmp_path / "a.safetensors", struct.pack("<Q", 2**40) + b"{}")
    with pytest.raises(InputError, match="header of 1099511627776 bytes"):
        uploads.add_adapter(workspace, path)


def test_an_adapter_above_the_size_limit_is_refused_unread(tmp_path, workspace):
    path = tmp_path / "a.safetensors"
    with path.open("wb") as file:
        file.truncate(600 * 2**20)
    with pytest.raises(InputError, match="600 MB"):
        uploads.add_adapter(workspace, path)
