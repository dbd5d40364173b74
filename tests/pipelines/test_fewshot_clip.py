"""Loading CLIP models, and features that are those of open_clip."""

import json

import open_clip
import pytest
import torch
from open_clip.transformer import QuickGELU
from PIL import Image
from safetensors.torch import save_file
from tiny_clip import CONFIG, CONTEXT, END, images, prompts, tiny_clip
from torch.nn import functional as F

from pipelines import mini_clip
from pipelines.clip import Clip, load_clip
from pipelines.errors import InputError
from pipelines.mini_sdxl import PROMPT_WORDS, reduced_tokenizer


def clip_of(model):
    return Clip(model, preprocess=None, tokenizer=None, name="tiny")


@pytest.fixture(scope="module")
def tiny_name(tmp_path_factory):
    """The name of the tiny model in open_clip."""
    file = tmp_path_factory.mktemp("configs") / "tiny-clip.json"
    file.write_text(json.dumps(CONFIG))
    open_clip.add_model_config(file)
    return file.stem


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    file = tmp_path_factory.mktemp("weights") / "tiny.safetensors"
    save_file(tiny_clip().state_dict(), file)
    return file


@torch.no_grad()
@pytest.mark.parametrize("custom_text", [False, True])
def test_features_are_open_clips_of_length_one(custom_text):
    model = tiny_clip(custom_text=custom_text)
    clip, tokens = clip_of(model), prompts(3, 7, 12)
    assert clip.reads_up_to_the_end_token
    torch.testing.assert_close(clip.encode_images(images(2)), model.encode_image(images(2), normalize=True))
    torch.testing.assert_close(clip.encode_texts(tokens), model.encode_text(tokens, normalize=True))
    torch.testing.assert_close(clip.encode_texts(tokens[:2]), model.encode_text(tokens[:2], normalize=True))
    torch.testing.assert_close(clip.logit_scale, model.logit_scale.exp())


@torch.no_grad()
def test_tokens_after_the_end_token_are_not_computed():
    model = tiny_clip()
    clip, tokens, lengths = clip_of(model), prompts(3, 5), []
    model.transformer.register_forward_pre_hook(lambda _, inputs: lengths.append(inputs[0].shape[1]))
    clip.encode_texts(tokens)
    assert lengths == [5]


@torch.no_grad()
def test_texts_whose_end_token_is_not_the_largest_id_are_supported():
    model = tiny_clip(text_cfg={"pool_type": "eos", "eos_id": 7})
    tokens = prompts(4, 9).masked_fill(prompts(4, 9) == 7, 8)
    tokens = torch.where(tokens == END, 7, tokens)
    torch.testing.assert_close(clip_of(model).encode_texts(tokens), model.encode_text(tokens, normalize=True))
    assert clip_of(model).end_positions(tokens).tolist() == [3, 8]


@torch.no_grad()
def test_a_bidirectional_text_encoder_gets_all_tokens():
    model = tiny_clip(custom_text=True, text_cfg={"no_causal_mask": True, "pool_type": "last"})
    clip = clip_of(model)
    assert not clip.reads_up_to_the_end_token
    torch.testing.assert_close(clip.encode_texts(prompts(4)), model.encode_text(prompts(4), normalize=True))
    with pytest.raises(InputError, match="unlike that of tiny"):
        clip.encode_embedded_texts(torch.zeros(1, 4, 16), torch.tensor([3]))


@torch.no_grad()
def test_embedded_texts_are_encoded_as_their_tokens():
    model = tiny_clip()
    tokens = prompts(4, 6)
    features = clip_of(model).encode_embedded_texts(model.token_embedding(tokens), tokens.argmax(dim=-1))
    torch.testing.assert_close(features, model.encode_text(tokens, normalize=True))


def test_features_pass_gradients_to_embedded_texts():
    embedded = torch.randn(2, 5, 16, requires_grad=True)
    clip_of(tiny_clip()).encode_embedded_texts(embedded, torch.tensor([4, 2])).sum().backward()
    assert embedded.grad[0].abs().sum(dim=-1).bool().all()
    assert embedded.grad[1].abs().sum(dim=-1).bool().tolist() == [True, True, True, False, False]


@torch.no_grad()
def test_a_local_checkpoint_is_loaded(tiny_name, checkpoint):
    clip = load_clip(tiny_name, str(checkpoint))
    model = tiny_clip()
    torch.testing.assert_close(clip.encode_images(images(2)), model.encode_image(images(2), normalize=True))
    assert not clip.model.training
    assert not any(parameter.requires_grad for parameter in clip.model.parameters())
    assert clip.tokenizer(["a cat", "a dog"]).shape == (2, CONTEXT)
    assert clip.preprocess(Image.new("RGB", (40, 20))).shape == (3, 16, 16)


@torch.no_grad()
def test_half_precision_gives_single_precision_features(tiny_name, checkpoint):
    clip = load_clip(tiny_name, str(checkpoint), dtype=torch.bfloat16)
    assert {parameter.dtype for parameter in clip.model.parameters()} == {torch.bfloat16}
    for features in (clip.encode_images(images(2)), clip.encode_texts(prompts(3, 5))):
        assert features.dtype == torch.float32
        torch.testing.assert_close(features.norm(dim=-1), torch.ones(2))


@torch.no_grad()
def test_the_weights_of_a_tag_get_their_activation(tiny_name, checkpoint, monkeypatch):
    settings = {"file": str(checkpoint), "quick_gelu": True, "mean": (0.1,) * 3, "std": (0.2,) * 3}
    monkeypatch.setitem(open_clip.pretrained._PRETRAINED, tiny_name, {"original": settings})
    clip = load_clip(tiny_name, "original")
    assert isinstance(clip.model.visual.transformer.resblocks[0].mlp.gelu, QuickGELU)
    white = clip.preprocess(Image.new("RGB", (16, 16), "white"))
    torch.testing.assert_close(white, torch.full((3, 16, 16), (1 - 0.1) / 0.2))
    assert torch.equal(clip.model.visual.conv1.weight, tiny_clip().visual.conv1.weight)
    assert not torch.equal(clip.encode_images(images(1)), F.normalize(tiny_clip().encode_image(images(1)), dim=-1))


@pytest.mark.parametrize("settings", [{"url": "https://example.org/old.pt"}, {"file": "cache/open_clip_pytorch_model.bin"}])
def test_a_tag_that_is_a_pickle_is_refused(tiny_name, monkeypatch, settings):
    monkeypatch.setitem(open_clip.pretrained._PRETRAINED, tiny_name, {"old": settings})
    with pytest.raises(InputError, match=r"(is|as) a pickle"):
        load_clip(tiny_name, "old")


@pytest.mark.parametrize("suffix", [".pt", ".bin", ".PTH"])
def test_a_pickle_is_refused_by_its_name_with_the_remedy(tiny_name, tmp_path, suffix):
    file = tmp_path / f"weights{suffix}"
    torch.save(tiny_clip().state_dict(), file)
    with pytest.raises(InputError, match=r"is a pickle by its name.*convert it"):
        load_clip(tiny_name, str(file))


def test_a_pickle_under_another_name_is_refused(tiny_name, tmp_path):
    file = tmp_path / "weights.safetensors"
    torch.save(tiny_clip().state_dict(), file)
    with pytest.raises(InputError, match="not a valid safetensors file"):
        load_clip(tiny_name, str(file))


def test_weights_of_another_model_are_refused_by_file_and_model(tiny_name, tmp_path):
    file = tmp_path / "other.safetensors"
    save_file(tiny_clip(vision_cfg={"layers": 2}).state_dict(), file)
    with pytest.raises(InputError, match=r"other\.safetensors does not contain the weights of tiny-clip"):
        load_clip(tiny_name, str(file))


@pytest.mark.parametrize(
    ("model", "pretrained", "message"),
    [
        ("ViT-B-61", None, r"model must be 'mini'.*ViT-B-16.*got 'ViT-B-61'"),
        ("ViT-B-16", None, r"one of the tags openai, .*'random'; got None"),
        ("ViT-B-16", "opneai", r"got 'opneai'"),
        ("ViT-B-16", "gone.safetensors", r"no checkpoint 'gone\.safetensors'"),
    ],
)
def test_models_and_weights_that_cannot_be_loaded_are_named(model, pretrained, message):
    with pytest.raises(InputError, match=message):
        load_clip(model, pretrained)


def test_a_folder_without_a_model_is_named(tmp_path):
    with pytest.raises(InputError, match=r"must contain open_clip_config\.json, but .*pretrain_mini"):
        load_clip(str(tmp_path))


@pytest.fixture(scope="module")
def mini_folder(tmp_path_factory):
    """The built-in model's folder, with untrained weights."""
    folder = tmp_path_factory.mktemp("mini-clip")
    mini_clip.write_configuration(folder, reduced_tokenizer([PROMPT_WORDS]))
    torch.manual_seed(0)
    save_file(mini_clip.new_model(folder).state_dict(), folder / mini_clip.WEIGHTS_FILE)
    return folder


@torch.no_grad()
def test_the_built_in_model_is_a_folder(mini_folder, monkeypatch):
    monkeypatch.setattr("pipelines.clip.BUILT_IN_CLIP", mini_folder)
    clip, model = load_clip("mini"), mini_clip.load_model(mini_folder)
    pixels = torch.rand(2, 3, 64, 64)
    torch.testing.assert_close(clip.encode_images(pixels), mini_clip.image_features(model, pixels))
    tokens = clip.tokenizer(["a red star", "a photo of cardboard"])
    torch.testing.assert_close(clip.encode_texts(tokens), model.encode_text(tokens, normalize=True))
    black = clip.preprocess(Image.new("RGB", (64, 64)))
    torch.testing.assert_close(black, torch.full((3, 64, 64), -1.0))


@torch.no_grad()
def test_a_folder_written_by_open_clip_is_loaded(tmp_path):
    config = {"model_cfg": CONFIG, "preprocess_cfg": {"mean": [0.5] * 3, "std": [0.5] * 3}}
    (tmp_path / mini_clip.CONFIG_FILE).write_text(json.dumps(config))
    save_file(tiny_clip().state_dict(), tmp_path / mini_clip.WEIGHTS_FILE)
    clip = load_clip(str(tmp_path))
    torch.testing.assert_close(clip.encode_images(images(2)), tiny_clip().encode_image(images(2), normalize=True))
    with pytest.raises(InputError, match="no checkpoint 'openai'"):
        load_clip(str(tmp_path), "openai")
    weights = tiny_clip().state_dict()
    weights["visual.proj"] *= -1
    save_file(weights, tmp_path / "other.safetensors")
    other = load_clip(str(tmp_path), str(tmp_path / "other.safetensors"))
    torch.testing.assert_close(other.encode_images(images(2)), -clip.encode_images(images(2)))
    assert torch.equal(other.preprocess(Image.new("RGB", (16, 16))), torch.full((3, 16, 16), -1.0))
