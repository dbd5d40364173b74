"""Prompts that the tokenizers truncate: the number of tokens, the limit, and the text that is cut off."""

from pathlib import Path

import pytest
from transformers import CLIPTokenizer

from pipelines.built_in import BUILT_IN_MODEL
from pipelines.subject.prompt_length import long_prompts


@pytest.fixture(scope="module")
def tokenizer():
    return CLIPTokenizer.from_pretrained(BUILT_IN_MODEL, subfolder="tokenizer")


def tokens(tokenizer, text, **more):
    return tokenizer(text, verbose=False, **more).input_ids


@pytest.mark.parametrize("words", ["a Red star,  ", "zxqwv ", "une étoile à côté ", "星 "])
def test_the_kept_and_the_cut_part_make_up_the_prompt(tokenizer, words):
    text = "a photo of " + words * 40
    (prompt,) = long_prompts((tokenizer, tokenizer), {text: "validation prompt"})
    assert prompt.num_tokens == len(tokens(tokenizer, text)) > prompt.max_tokens == tokenizer.model_max_length
    read = text[: text.rindex(prompt.cut)]
    truncated = tokens(tokenizer, text, truncation=True)
    assert prompt.cut
    assert text.rstrip().endswith(prompt.cut)
    # A word across the limit is cut in the middle, and its pieces have other tokens.
    assert tokens(tokenizer, read)[:-2] == truncated[: len(tokens(tokenizer, read)) - 2]
    assert len(tokens(tokenizer, read)) == pytest.approx(len(truncated), abs=2)


def test_the_limit_is_that_of_the_tokenizer_including_start_and_end(tokenizer):
    room = tokenizer.model_max_length - 2
    words = [word for word in ("red", "star") if len(tokens(tokenizer, word)) == 3]
    fits, cut = " ".join(words[:1] * room), " ".join(words[:1] * (room + 1))
    assert long_prompts((tokenizer,), {fits: "class prompt"}) == []
    (prompt,) = long_prompts((tokenizer,), {cut: "class prompt"})
    assert (prompt.num_tokens, prompt.max_tokens, prompt.cut) == (room + 3, room + 2, words[0])
    assert prompt.summary() == (
        f"The class prompt {cut[:40] + '...'!r} has {room + 3} tokens, but the tokenizer's limit is {room + 2}, including the "
        f"start and end tokens: {words[0]!r} is cut off. Shorten it."
    )


def test_the_tokenizer_that_cuts_more_is_reported(tokenizer):
    short = CLIPTokenizer.from_pretrained(BUILT_IN_MODEL, subfolder="tokenizer", model_max_length=8)
    (prompt,) = long_prompts((tokenizer, short), {"a red star " * 4: "validation prompt"})
    assert prompt.max_tokens == 8


def test_images_with_the_same_caption_share_a_sentence(tokenizer):
    long, prompt = "a red star " * 40, "a blue ring " * 40
    images = [(Path("a/0.png"), long), (Path("a/1.png"), long), (Path("a/2.png"), "short"), (Path("a/3.png"), prompt)]
    by_role = {each.role: each for each in long_prompts((tokenizer,), {prompt: "instance prompt"}, images)}
    assert set(by_role) == {"caption", "instance prompt"}
    assert by_role["caption"].images == ("0.png", "1.png")
    assert by_role["caption"].summary().startswith("The caption of '0.png', '1.png' has ")
