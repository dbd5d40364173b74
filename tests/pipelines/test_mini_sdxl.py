"""The built-in model's tokenizer and shapes."""

import pytest
import torch
from open_clip.tokenizer import SimpleTokenizer

from pipelines import mini_sdxl

TEXTS = ("a large red star in the snow", "a photo of sks toy at night", "an orange letter k")


@pytest.fixture(scope="module")
def tokenizer():
    return mini_sdxl.reduced_tokenizer(TEXTS)


@pytest.mark.parametrize("text", TEXTS)
def test_the_reduced_tokenizer_splits_its_words_as_clip_does(tokenizer, text):
    full = SimpleTokenizer()
    assert tokenizer.tokenize(text) == [full.decoder[token] for token in full.encode(text)]


@pytest.mark.parametrize("text", ["zebra", "unseen words", "café", "3 robots!"])
def test_any_other_word_is_encoded_and_decoded(tokenizer, text):
    tokens = tokenizer(text)["input_ids"]
    assert tokenizer.unk_token_id not in tokens[1:-1]
    assert tokenizer.decode(tokens, skip_special_tokens=True).strip() == text.replace("!", " !").strip()


def test_the_reduced_tokenizer_survives_saving(tokenizer, tmp_path):
    tokenizer.save_pretrained(tmp_path)
    again = type(tokenizer).from_pretrained(tmp_path)
    assert [again(text)["input_ids"] for text in TEXTS] == [tokenizer(text)["input_ids"] for text in TEXTS]


def test_the_autoencoder_downsamples_by_four():
    vae = mini_sdxl.new_vae().eval()
    with torch.no_grad():
        latents = vae.encode(torch.zeros(1, 3, 64, 64)).latent_dist.mean
        assert latents.shape == (1, 8, 16, 16)
        assert vae.decode(latents).sample.shape == (1, 3, 64, 64)


def test_the_assembled_pipeline_generates_at_the_models_resolution(tokenizer):
    torch.manual_seed(0)
    pipeline = mini_sdxl.assemble(mini_sdxl.new_vae(), mini_sdxl.new_unet(), mini_sdxl.new_text_encoders(tokenizer), tokenizer)
    pipeline.set_progress_bar_config(disable=True)
    image = pipeline("a red star", num_inference_steps=1).images[0]
    assert image.size == (mini_sdxl.RESOLUTION, mini_sdxl.RESOLUTION)
