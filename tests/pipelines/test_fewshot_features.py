"""Features of frozen encoders are those of open_clip, computed once, and not shared between encoders."""

import peft
import pytest
import torch
from PIL import Image
from tiny_clip import images, prompts, tiny_clip
from torch.nn import functional as F

from pipelines.cache import TensorCache
from pipelines.clip import Clip
from pipelines.fewshot.features import image_features, prompt_features, raw_pixels
from pipelines.fewshot.prompts import Prompts

ROWS = prompts(3, 7, 12, 5)
COUNT = 5


@pytest.fixture
def clip():
    """A tiny CLIP whose texts are the numbers, modulo four, of their tokens' rows."""
    return Clip(tiny_clip(), preprocess=None, tokenizer=lambda texts: ROWS[[int(text) % 4 for text in texts]], name="tiny")


@pytest.fixture
def runs(clip):
    """The number of images or texts in each call of an encoder, in order."""
    counts = {"pictures": [], "texts": []}
    clip.model.visual.register_forward_pre_hook(lambda _, inputs: counts["pictures"].append(len(inputs[0])))
    clip.model.transformer.register_forward_pre_hook(lambda _, inputs: counts["texts"].append(len(inputs[0])))
    return counts


def labelled(*places):
    """Some of the COUNT images, each with its index as label."""
    pixels = images(COUNT)
    return [(pixels[place], place) for place in places or range(COUNT)]


@torch.no_grad()
def test_features_are_open_clips_in_order_for_every_batch_size(clip):
    features, labels = image_features(clip, labelled(), batch_size=2)
    torch.testing.assert_close(features, clip.model.encode_image(images(COUNT), normalize=True))
    assert labels.tolist() == list(range(COUNT))


@torch.no_grad()
def test_a_class_is_the_mean_direction_of_its_prompts(clip):
    features = prompt_features(clip, Prompts(("1", "2"), ("{}", "1{}")), batch_size=3)
    texts = clip.model.encode_text(ROWS, normalize=True)
    torch.testing.assert_close(features, F.normalize(torch.stack([texts[1] + texts[11 % 4], texts[2] + texts[12 % 4]]), dim=-1))


def test_only_features_that_are_not_cached_are_computed(clip, runs, tmp_path):
    cache = TensorCache(tmp_path)
    first, _ = image_features(clip, labelled(0, 1, 2), cache=cache)
    again, labels = image_features(clip, labelled(3, 2, 0), cache=cache)
    assert runs["pictures"] == [3, 1]
    assert labels.tolist() == [3, 2, 0]
    assert torch.equal(again[1:], first[[2, 0]])
    torch.testing.assert_close(again[0], image_features(clip, labelled(3))[0][0])


def test_features_of_prompts_are_cached(clip, runs, tmp_path):
    cache = TensorCache(tmp_path)
    first = prompt_features(clip, Prompts(("0", "1", "2"), ("{}",)), cache=cache)
    assert torch.equal(prompt_features(clip, Prompts(("0", "1", "2"), ("{}",)), cache=cache), first)
    assert runs["texts"] == [3]


@pytest.mark.parametrize(("changed", "expected"), [("visual.proj", [COUNT, COUNT]), ("text_projection", [COUNT])])
def test_only_weights_of_the_same_encoder_invalidate_features(clip, runs, tmp_path, changed, expected):
    cache = TensorCache(tmp_path)
    image_features(clip, labelled(), cache=cache)
    clip.model.get_parameter(changed).data.mul_(-1)
    found, _ = image_features(clip, labelled(), cache=cache)
    assert runs["pictures"] == expected
    torch.testing.assert_close(found, clip.encode_images(images(COUNT)))


@pytest.mark.parametrize(("tower", "expected"), [("visual", [COUNT, COUNT]), ("transformer", [COUNT])])
def test_features_of_an_encoder_with_an_adapter_are_not_cached(clip, runs, tmp_path, tower, expected):
    config = peft.LoraConfig(target_modules=rf"{tower}\..*c_fc")
    peft.inject_adapter_in_model(config, clip.model)
    for _ in range(2):
        image_features(clip, labelled(), cache=TensorCache(tmp_path))
    assert runs["pictures"] == expected


def test_features_are_computed_in_evaluation_mode_and_the_mode_is_restored(clip):
    clip.model.visual.patch_dropout = torch.nn.Dropout(0.5)
    expected, _ = image_features(clip, labelled())
    clip.model.visual.train()
    found, _ = image_features(clip, labelled())
    assert torch.equal(found, expected)
    assert not found.requires_grad
    assert clip.model.visual.patch_dropout.training
    assert not clip.model.transformer.training


def test_raw_pixels_are_block_means_of_the_whole_image():
    values = torch.randint(0, 256, (8, 12, 3), generator=torch.Generator().manual_seed(0), dtype=torch.uint8)
    found = raw_pixels(Image.fromarray(values.numpy()), side=4).view(3, 4, 4)
    means = F.avg_pool2d(values.permute(2, 0, 1).float(), (2, 3)) / 255
    # Pillow rounds to bytes after the columns, and again after the rows.
    torch.testing.assert_close(found, means, atol=1 / 255 + 1e-6, rtol=0)
