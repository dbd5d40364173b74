"""CoOp: the learned context replaces words in the prompts, and nothing else is trained."""

import open_clip
import pytest
import torch
from tiny_clip import tiny_clip
from torch.nn import functional as F
from toy_task import CLASSES, START, toy_clip

from pipelines import mini_clip
from pipelines.clip import Clip
from pipelines.errors import InputError
from pipelines.fewshot.baselines import coop
from pipelines.fewshot.baselines.task import Examples, FewShotTask
from pipelines.mini_sdxl import MAX_TOKENS, PROMPT_WORDS, reduced_tokenizer


@torch.no_grad()
def test_coops_context_replaces_the_placeholders():
    clip = toy_clip()
    prompts = coop.prompts_with_context(clip, CLASSES)
    words = [f"a X X grey teapot. a a X {name}" for name in ("cat.", "grey dog.", "teapot.")]
    context = clip.model.token_embedding(clip.tokenizer(words)[0, 1:9])
    torch.testing.assert_close(prompts.features(context), clip.model.encode_text(clip.tokenizer(words), normalize=True))


@pytest.mark.parametrize(("context", "length"), [(24, 16), (20, 16), (19, 8), (8, 4)])
def test_coops_context_leaves_room_for_the_longest_name(context, length):
    prompts = coop.prompts_with_context(toy_clip(context), CLASSES)
    assert prompts.length == length
    assert prompts.tokens[:, 0].tolist() == [START] * 3


@torch.no_grad()
@pytest.mark.parametrize("built_in", [False, True])
def test_coop_initialised_from_words_is_zero_shot_with_real_tokenizers(built_in, tmp_path):
    if built_in:
        mini_clip.write_configuration(tmp_path, reduced_tokenizer([PROMPT_WORDS]))
        tokenizer, vocabulary, length = open_clip.get_tokenizer(f"local-dir:{tmp_path}"), 4000, MAX_TOKENS
    else:
        tokenizer, vocabulary, length = open_clip.get_tokenizer("ViT-B-16"), 49408, 77
    model = tiny_clip(text_cfg={"vocab_size": vocabulary, "context_length": length})
    clip = Clip(model, preprocess=None, tokenizer=tokenizer, name="tiny")
    texts = tokenizer([f"a photo of a {name}." for name in ("cat", "grey dog", "teapot")])
    prompts = coop.prompts_with_context(clip, CLASSES, lengths=(4,))
    context = model.token_embedding(texts[0, 1:5])
    torch.testing.assert_close(prompts.features(context), model.encode_text(texts, normalize=True))


def test_a_class_name_without_room_for_the_context_is_named():
    with pytest.raises(InputError, match="'grey_dog' is too long"):
        coop.prompts_with_context(toy_clip(context=7), CLASSES)


def test_coop_trains_only_the_context_and_fits_the_images():
    clip = toy_clip()
    clip.model.requires_grad_(True)
    before = {name: value.clone() for name, value in clip.model.state_dict().items()}
    prompts = coop.prompts_with_context(clip, CLASSES)
    # Images at the class features of another context.
    shown = prompts.features(torch.randn(8, 16, generator=torch.Generator().manual_seed(1))).detach()
    examples = Examples(shown.repeat(4, 1), torch.arange(3).repeat(4))
    task = FewShotTask(CLASSES, prompts.features(torch.zeros(8, 16)).detach(), 300.0, examples, examples, clip)
    weights = [coop.learned(task, prompts, 0, rate).head.weight for rate in (0.0, 2e-2)] + [300.0 * shown]
    start, learned, theirs = (F.cross_entropy(examples.features @ weight.T, examples.labels) for weight in weights)
    assert start > theirs > learned
    assert all(torch.equal(value, before[name]) for name, value in clip.model.state_dict().items())
    assert all(parameter.grad is None for parameter in clip.model.parameters())


def test_a_text_encoder_that_does_not_pool_at_the_end_token_is_refused():
    model = tiny_clip(custom_text=True, text_cfg={"no_causal_mask": True, "pool_type": "last"})
    clip = Clip(model, preprocess=None, tokenizer=None, name="other")
    shown = Examples(torch.eye(3, 24), torch.arange(3))
    with pytest.raises(InputError, match="pools at the end token, as in CLIP, unlike that of other"):
        coop.fit(FewShotTask(CLASSES, torch.eye(3, 24), 1.0, shown, shown, clip), seed=0)


def test_a_tokenizer_that_splits_the_placeholder_is_refused():
    clip = toy_clip(context=24)
    spelled = Clip(clip.model, None, lambda texts: clip.tokenizer([text.replace("X", "a grey") for text in texts]), "spelling")
    with pytest.raises(InputError, match="one token for 'X', unlike that of spelling"):
        coop.prompts_with_context(spelled, CLASSES, lengths=(4,))
