"""The projection at the end of an image encoder, and the embeddings before it."""

import pytest
import torch
from tiny_clip import images, tiny_clip

from pipelines.clip import BUILT_IN, Clip, load_clip
from pipelines.errors import InputError
from pipelines.fewshot.projection import encode_embeddings, image_projection


@torch.no_grad()
@pytest.mark.parametrize("kind", ["ViT", "timm"])
def test_projected_embeddings_are_the_features(kind):
    clip = load_clip(BUILT_IN) if kind == "timm" else Clip(tiny_clip(), preprocess=None, tokenizer=None, name="tiny")
    pixels = torch.rand(2, 3, 64, 64) if kind == "timm" else images(2)
    expected = clip.encode_images(pixels)
    embeddings = encode_embeddings(clip, pixels)
    assert embeddings.shape[1] == image_projection(clip).weight.shape[1] != expected.shape[1]
    torch.testing.assert_close(image_projection(clip).features(embeddings), expected)
    torch.testing.assert_close(clip.encode_images(pixels), expected)


def test_an_encoder_without_a_projection_is_refused():
    model = tiny_clip()
    model.visual.proj = None
    with pytest.raises(InputError, match=r"The image encoder of tiny does not end in a linear projection"):
        image_projection(Clip(model, preprocess=None, tokenizer=None, name="tiny"))
