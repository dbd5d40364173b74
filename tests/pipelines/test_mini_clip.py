"""The folder of the built-in CLIP: stock open_clip loads it and computes the same."""

import open_clip
import pytest
import torch
from PIL import Image
from safetensors.torch import save_file
from torch import nn

from pipelines import mini_clip
from pipelines.corpus import to_pixels
from pipelines.mini_sdxl import PROMPT_WORDS, reduced_tokenizer

TEXTS = ["a red star", "a photo of cardboard!", "zebra", "a large blue striped letter K on a wooden floor"]


@pytest.fixture(scope="module")
def tokenizer():
    return reduced_tokenizer([PROMPT_WORDS])


@pytest.fixture(scope="module")
def checkout(tokenizer, tmp_path_factory):
    """A checkout's folder of the model, with untrained weights."""
    root = tmp_path_factory.mktemp("checkout")
    folder = root / "assets" / "mini-clip"
    mini_clip.write_configuration(folder, tokenizer)
    torch.manual_seed(0)
    weights = mini_clip.new_model(folder).state_dict()
    halves = {name: value.half() if value.is_floating_point() else value for name, value in weights.items()}
    save_file(halves, folder / mini_clip.WEIGHTS_FILE)
    return root


@pytest.fixture(scope="module")
def model(checkout):
    return mini_clip.load_model(checkout / "assets" / "mini-clip")


@torch.no_grad()
def test_stock_open_clip_loads_the_folder_from_the_root_of_a_checkout(checkout, model, tokenizer, monkeypatch):
    monkeypatch.chdir(checkout)
    stock, _, _ = open_clip.create_model_and_transforms("local-dir:assets/mini-clip")
    tokens = open_clip.get_tokenizer("local-dir:assets/mini-clip")(TEXTS)
    assert torch.equal(tokens, mini_clip.tokenize(tokenizer, TEXTS))
    pixels = torch.rand(2, 3, 64, 64)
    stock.eval()
    torch.testing.assert_close(stock.encode_image(pixels, normalize=True), mini_clip.image_features(model, pixels))
    torch.testing.assert_close(stock.encode_text(tokens), model.encode_text(tokens))


def test_open_clips_preprocessing_is_the_one_of_pretraining(checkout, monkeypatch):
    monkeypatch.chdir(checkout)
    _, _, preprocess = open_clip.create_model_and_transforms("local-dir:assets/mini-clip")
    image = torch.randint(0, 256, (64, 64, 3), dtype=torch.uint8).numpy()
    pixels = preprocess(Image.fromarray(image))
    torch.testing.assert_close(pixels, to_pixels(image[None])[0])


@torch.no_grad()
def test_texts_are_encoded_as_open_clip_does_without_the_padding(model, tokenizer):
    tokens = mini_clip.tokenize(tokenizer, TEXTS)
    torch.testing.assert_close(mini_clip.encode_texts(model, tokens), model.encode_text(tokens, normalize=True))


def test_attention_is_over_all_64_positions_with_packed_linears(model):
    seen = []
    hooks = [
        layer.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0].flatten(1, -2).shape[1:]))
        for name, layer in model.visual.named_modules()
        if name.endswith("attn.qkv") and isinstance(layer, nn.Linear)
    ]
    mini_clip.image_features(model, torch.rand(1, 3, 64, 64))
    for hook in hooks:
        hook.remove()
    assert seen == [(64, 160)] * 3


def test_the_weights_take_less_than_ten_mebibytes(checkout):
    assert sum(file.stat().st_size for file in checkout.rglob("*") if file.is_file()) < 10 * 2**20


@torch.no_grad()
def test_zero_shot_weights_are_means_over_templates(model, tokenizer):
    names = mini_clip.class_tokens(tokenizer, ["a cat", "a teapot"])
    weights = mini_clip.zero_shot_weights(model, names)
    texts = [template.format("a teapot") for template in mini_clip.TEMPLATES]
    mean = model.encode_text(mini_clip.tokenize(tokenizer, texts), normalize=True).mean(dim=0)
    torch.testing.assert_close(weights[1], mean / mean.norm())
