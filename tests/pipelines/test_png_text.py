"""PNG files with megabytes of text are read: texts are removed without decompressing them."""

import io
import struct
import tracemalloc
import zlib

import numpy as np
import pytest
from image_sets import write_files
from PIL import Image
from shared_cases import case_folder

from pipelines.errors import InputError
from pipelines.fewshot.data import check_readable
from pipelines.fewshot.loading import load_folder
from pipelines.images import opened_image, read_image, read_image_with_notes, read_settings, save_image
from pipelines.subject.image_checks import check_images

PIXELS = np.random.default_rng(0).integers(0, 256, (20, 30, 3), dtype=np.uint8)
AFTER_HEADER = 33
WORKFLOW = b'{"nodes": [' + b'{"id": 1, "type": "KSampler"}, ' * 60_000 + b"]}"
SETTINGS = {
    name: "x" for name in ("prompt", "negative_prompt", "num_inference_steps", "guidance_scale", "seed", "sampler", "model")
}


def plain():
    stream = io.BytesIO()
    Image.fromarray(PIXELS).save(stream, "PNG")
    return stream.getvalue()


def chunk(kind, data, checksum=None):
    return (
        struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data) if checksum is None else checksum)
    )


TEXTS = {
    "tEXt": chunk(b"tEXt", b"workflow\0" + WORKFLOW),
    "zTXt": chunk(b"zTXt", b"workflow\0\0" + zlib.compress(WORKFLOW)),
    "iTXt": chunk(b"iTXt", b"workflow\0\0\0\0\0" + WORKFLOW),
    "packed iTXt": chunk(b"iTXt", b"workflow\0\1\0\0\0" + zlib.compress(WORKFLOW)),
    "many": chunk(b"tEXt", b"prompt\0" + bytes(b"a" * 2**20)) * 66,
    "damaged": chunk(b"zTXt", b"workflow\0\0no zlib"),
    "strange method": chunk(b"zTXt", b"workflow\0\7" + zlib.compress(b"a")),
    "wrong checksum": chunk(b"tEXt", b"workflow\0a", checksum=1),
    "known keyword": chunk(b"zTXt", b"XML:com.adobe.xmp\0\0" + zlib.compress(bytes(2**22))),
}


@pytest.mark.parametrize("kind", TEXTS)
@pytest.mark.parametrize("where", ["before", "after"])
def test_text_of_any_kind_and_size_does_not_change_the_image(tmp_path, kind, where):
    place = AFTER_HEADER if where == "before" else len(plain()) - 12
    path = tmp_path / "a.png"
    path.write_bytes(plain()[:place] + TEXTS[kind] + plain()[place:])
    found = read_image_with_notes(path)
    assert (np.asarray(found.image) == PIXELS).all()
    assert found.notes == ()


def test_the_image_checks_and_the_few_shot_reader_accept_such_images(tmp_path):
    files = {
        f"{label}/{place}.png": plain()[:AFTER_HEADER] + TEXTS["packed iTXt"] + plain()[AFTER_HEADER:]
        for label in ("cat", "dog")
        for place in range(2)
    }
    write_files(tmp_path, files)
    check_readable(load_folder(tmp_path).images)
    assert len(check_images(tmp_path / "cat").usable) == 2


def test_comfyui_images_are_usable():
    folder = case_folder("photos-png-text") / "png_big_text_all"
    assert len(check_images(folder).usable) == 4


@pytest.mark.parametrize("keyword", [b"workflow", b"Raw profile type exif", b"nora_vision"])
def test_a_decompression_bomb_in_a_text_uses_no_memory(keyword):
    packer = zlib.compressobj(9)
    bomb = b"".join([*(packer.compress(bytes(2**24)) for _ in range(8)), packer.flush()])
    stream = io.BytesIO(plain()[:AFTER_HEADER] + chunk(b"zTXt", keyword + b"\0\0" + bomb) + plain()[AFTER_HEADER:])
    tracemalloc.start()
    try:
        assert read_image(stream, "a").size == (30, 20)
        assert tracemalloc.get_traced_memory()[1] < 8 * 2**20
    finally:
        tracemalloc.stop()


def test_a_chunk_with_a_claimed_size_of_gigabytes_allocates_no_memory():
    content = plain()[:AFTER_HEADER] + struct.pack(">I", 2**31 - 1) + b"tEXtworkflow\0"
    with pytest.raises(InputError, match="the image cannot be read"):
        read_image(io.BytesIO(content), "the image")


def test_generation_settings_are_read_beside_megabytes_of_other_text(tmp_path):
    path = tmp_path / "a.png"
    save_image(Image.fromarray(PIXELS), path, SETTINGS)
    content = path.read_bytes()
    path.write_bytes(content[:AFTER_HEADER] + TEXTS["many"] + TEXTS["zTXt"] + content[AFTER_HEADER:])
    assert read_settings(path) == SETTINGS


def test_the_orientation_in_a_text_is_used():
    xmp = b'<x:xmpmeta><rdf:Description tiff:Orientation="6"/></x:xmpmeta>'
    stream = io.BytesIO(
        plain()[:AFTER_HEADER] + chunk(b"iTXt", b"XML:com.adobe.xmp\0\1\0\0\0" + zlib.compress(xmp)) + plain()[AFTER_HEADER:]
    )
    with opened_image(stream, "a") as opened:
        assert opened.size == (30, 20)
    assert read_image(stream, "a").size == (20, 30)
