"""The cache of latents and prompt embeddings gives the model's values, and never those of another image or model."""

import shutil

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors import safe_open
from safetensors.torch import save_file
from tiny_pipeline import tiny_pipeline

from pipelines.cache import TensorCache, digest_of, key_of, module_digest
from pipelines.digests import file_digest
from pipelines.errors import InputError
from pipelines.images import read_image
from pipelines.subject import encoding
from pipelines.subject.base_model import encode_images, encode_prompts, load_base_model
from pipelines.subject.data import CropVariant, TrainingImage, preprocess
from pipelines.subject.encoding import CachedImages, CropConfig, LatentEncoder

SQUARE = CropConfig(((16, 16),))


@pytest.fixture
def cache(tmp_path):
    return TensorCache(tmp_path / "cache")


def images_in(folder, prompt="a star"):
    return [TrainingImage(path, f"{prompt} {path.stem}") for path in sorted(folder.glob("*.png"))]


@pytest.fixture
def made(monkeypatch):
    """The images and prompts that the model has encoded."""
    asked = []
    moments, embeddings = LatentEncoder._moments, LatentEncoder._embeddings
    monkeypatch.setattr(LatentEncoder, "_moments", lambda self, example: asked.append(example.path) or moments(self, example))
    monkeypatch.setattr(LatentEncoder, "_embeddings", lambda self, prompt: asked.append(prompt) or embeddings(self, prompt))
    return asked


def equal(first, second):
    for place in range(len(first)):
        for variant in range(first.variants):
            for ours, theirs in zip(first.read(place, variant), second.read(place, variant), strict=True):
                assert torch.equal(ours, theirs)
    for name in ("hidden", "pooled"):
        assert torch.equal(getattr(first.prompts, name)[first.prompt_of], getattr(second.prompts, name)[second.prompt_of])


def test_cached_latents_are_those_of_the_model_for_each_variant(pipe, images_dir, cache):
    images = images_in(images_dir)
    framing = CropConfig(((16, 24), (24, 16), (16, 16)), random_crops=2, mirror=True, seed=1)
    encoded = LatentEncoder(pipe, cache).encode(images, framing)
    assert encoded.sizes == ((16, 24), (24, 16), (16, 16))
    assert encoded.variants == 4
    for place, image in enumerate(images):
        shots = framing.crop_variants(place, encoded.sizes[place])
        assert [shot.mirrored for shot in shots] == [False, False, True, True]
        for variant, shot in enumerate(shots):
            example = preprocess(image.path, read_image(image.path), shot)
            moments, time_ids = encoded.read(place, variant)
            torch.testing.assert_close(moments, encode_images(pipe, example.pixels[None])[0])
            assert torch.equal(time_ids, example.time_ids)
        stock = encode_prompts(pipe, [image.prompt])
        prompt = encoded.prompt_of[place]
        torch.testing.assert_close(encoded.prompts.hidden[prompt], stock.hidden[0])
        torch.testing.assert_close(encoded.prompts.pooled[prompt], stock.pooled[0])


def test_cached_images_are_not_encoded_again(pipe, images_dir, cache, made):
    first = LatentEncoder(pipe, cache).encode(images_in(images_dir), SQUARE)
    assert len(made) == 6
    made.clear()
    second = LatentEncoder(tiny_pipeline(), cache).encode(images_in(images_dir), SQUARE)
    assert made == []
    equal(first, second)


def test_the_cache_does_not_depend_on_the_models_folder(tiny_model, images_dir, cache, made, tmp_path):
    for folder in (tiny_model, shutil.copytree(tiny_model, tmp_path / "copy")):
        made.clear()
        LatentEncoder(load_base_model(str(folder)), cache).encode(images_in(images_dir), SQUARE)
    assert made == []


def test_mirrored_variants_are_added_to_the_cache(pipe, images_dir, cache, made):
    LatentEncoder(pipe, cache).encode(images_in(images_dir), SQUARE)
    made.clear()
    LatentEncoder(pipe, cache).encode(images_in(images_dir), CropConfig(((16, 16),), mirror=True))
    assert len(made) == 3


def changed_bytes(images, folder):
    target = folder / images[0].path.name
    Image.fromarray(255 - np.asarray(Image.open(images[0].path))).save(target)
    return [TrainingImage(target, images[0].prompt)]


@pytest.mark.parametrize("what", ["size", "crop", "mirror", "conditioning", "picture", "vae"])
def test_anything_that_changes_an_image_changes_its_cache_key(pipe, images_dir, cache, tmp_path, made, what):
    images = images_in(images_dir)[:1]
    LatentEncoder(pipe, cache).encode(images, SQUARE)
    made.clear()
    framing = {
        "size": CropConfig(((24, 16),)),
        "crop": CropConfig(((16, 16),), random_crops=1),
        "mirror": CropConfig(((16, 16),), mirror=True),
        "conditioning": CropConfig(((16, 16),), size_conditioning="target"),
    }.get(what, SQUARE)
    if what == "picture":
        images = changed_bytes(images, tmp_path)
    if what == "vae":
        pipe.vae.quant_conv.bias.data += 1e-3
    LatentEncoder(pipe, cache).encode(images, framing)
    assert made == [images[0].path]


@pytest.mark.parametrize("what", ["prompt", "text_encoder", "text_encoder_2"])
def test_anything_that_changes_a_prompt_changes_its_cache_key(pipe, images_dir, cache, made, what):
    images = images_in(images_dir)[:1]
    LatentEncoder(pipe, cache).encode(images, SQUARE)
    made.clear()
    if what == "prompt":
        images = [TrainingImage(images[0].path, "another star")]
    else:
        next(getattr(pipe, what).parameters()).data += 1e-3
    LatentEncoder(pipe, cache).encode(images, SQUARE)
    assert made == [images[0].prompt]


def test_images_with_equal_names_and_equal_images_with_other_captions_are_distinct(pipe, images_dir, cache, tmp_path):
    for place, folder in enumerate("ab"):
        (tmp_path / folder).mkdir()
        shutil.copy(images_dir / f"{place}.png", tmp_path / folder / "0.png")
    images = [TrainingImage(tmp_path / "a" / "0.png", "one"), TrainingImage(tmp_path / "b" / "0.png", "two")]
    images.append(TrainingImage(tmp_path / "a" / "0.png", "three"))
    encoded = LatentEncoder(pipe, cache).encode(images, SQUARE)
    alone = [LatentEncoder(pipe, TensorCache(tmp_path / str(n))).encode([image], SQUARE) for n, image in enumerate(images)]
    for place, expected in enumerate(alone):
        equal(encoded.only([place]), expected)
    assert not torch.equal(encoded.mean(0), encoded.mean(1))
    assert torch.equal(encoded.mean(0), encoded.mean(2))


def spoil(path, how):
    if how == "cut":
        path.write_bytes(path.read_bytes()[:-7])
    elif how == "flipped bit":
        content = bytearray(path.read_bytes())
        content[-3] ^= 1
        path.write_bytes(content)
    else:
        with safe_open(path, "pt") as opened:
            tensors = {name: opened.get_tensor(name) for name in opened.keys()}  # noqa: SIM118
        save_file(tensors, path, metadata={"key": "f" * 64, "sha256": digest_of(tensors)})


@pytest.mark.parametrize("how", ["cut", "flipped bit", "another's"])
def test_a_damaged_or_swapped_cache_file_is_computed_again(pipe, images_dir, cache, made, how):
    images = images_in(images_dir)
    first = LatentEncoder(pipe, cache).encode(images, SQUARE)
    for file in cache.folder.rglob("*.safetensors"):
        spoil(file, how)
    made.clear()
    with pytest.warns(UserWarning, match="computed again"):
        second = LatentEncoder(pipe, cache).encode(images, SQUARE)
    assert len(made) == 6
    equal(first, second)


def test_a_cache_file_lost_during_training_is_an_error_with_the_remedy(pipe, images_dir, cache):
    encoded = LatentEncoder(pipe, cache).encode(images_in(images_dir), SQUARE)
    shutil.rmtree(cache.folder)
    with pytest.raises(InputError, match=r"removed or damaged.*--resume_from_checkpoint latest"):
        encoded.read(0, 0)


def test_workers_give_the_same_latents(pipe, images_dir, cache, tmp_path):
    alone = LatentEncoder(pipe, cache).encode(images_in(images_dir), SQUARE)
    helped = LatentEncoder(pipe, TensorCache(tmp_path / "other"), workers=2).encode(images_in(images_dir), SQUARE)
    equal(alone, helped)


def test_processes_share_the_encoding_and_all_have_the_result(pipe, images_dir, cache, made):
    images = images_in(images_dir, "one prompt for all")
    counts = []

    def first_then_second():
        # Plays the other process, which encodes its part while this one waits.
        counts.append(sum(path in {image.path for image in images} for path in made))
        LatentEncoder(pipe, cache, share=(1, 2))._encode_missing(jobs[0][1::2])

    jobs = []
    original = LatentEncoder._encode_missing
    watched = LatentEncoder(pipe, cache, share=(0, 2), wait=first_then_second)
    watched._encode_missing = lambda given: jobs.append(jobs_of(watched, images)) or original(watched, given)
    watched.encode(images, SQUARE)
    assert counts == [2]
    assert sorted(path for path in made if path in {image.path for image in images}) == [p.path for p in images]


def jobs_of(encoder, images):
    shot = CropVariant((16, 16))
    return [encoding._Job(image.path, {encoder._key(file_digest(image.path), shot, "image"): shot}, "image") for image in images]


def test_a_limited_number_of_images_stays_in_memory(cache):
    keys = [(key_of(number=number),) for number in range(5)]
    for number, (key,) in enumerate(keys):
        cache.write(key, {"moments": torch.full((2, 1, 1, 1), float(number)), "time_ids": torch.zeros(6)})
    reader = CachedImages(keys, cache, max_in_memory=2)
    for place in (0, 1, 0, 2, 3):
        assert reader(place, 0)[0][0].item() == place
        assert len(reader.memory) <= 2
    assert list(reader.memory) == [keys[2][0], keys[3][0]]


def test_images_are_decoded_one_after_the_other(pipe, images_dir, cache, monkeypatch):
    order = []
    decode, moments = encoding._Job.decode, LatentEncoder._moments
    monkeypatch.setattr(encoding._Job, "decode", lambda job: order.append("decode") or decode(job))
    monkeypatch.setattr(LatentEncoder, "_moments", lambda self, example: order.append("encode") or moments(self, example))
    LatentEncoder(pipe, cache).encode(images_in(images_dir), SQUARE)
    assert order == ["decode", "encode"] * 3


def test_the_hash_of_a_model_covers_every_weight_and_its_dtype(pipe):
    first = module_digest(pipe.vae)
    assert first == module_digest(tiny_pipeline().vae)
    assert first != module_digest(tiny_pipeline().vae.to(torch.bfloat16))
    list(pipe.vae.parameters())[-1].data[0] += 1e-3
    assert first != module_digest(pipe.vae)


def test_crops_depend_only_on_the_seed_and_the_image():
    framing = CropConfig(((16, 16),), random_crops=3, seed=5)
    crops = [[shot.crop for shot in framing.crop_variants(place, (16, 16))] for place in (0, 1, 0)]
    assert crops[0] == crops[2] != crops[1]
    assert all(0 <= value < 1 for crop in crops[0] for value in crop)
    assert crops[0] != [shot.crop for shot in CropConfig(((16, 16),), random_crops=3, seed=6).crop_variants(0, (16, 16))]
