"""Prompts that exceed the tokenizers' limit and are truncated."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from transformers import PreTrainedTokenizerBase

from pipelines.file_names import display_path
from pipelines.subject.folder_entries import listed

CAPTION = "caption"
SHOWN_START, SHOWN_LENGTH = 40, 120


@dataclass(frozen=True)
class LongPrompt:
    """A prompt that is truncated.

    Args:
        role: "caption", "instance prompt", "class prompt" or "validation prompt".
        text: the prompt.
        num_tokens: its number of tokens, including the start and end tokens.
        max_tokens: the tokenizer's limit, including these two.
        cut: the end of `text` that is cut off.
        images: the images whose caption it is.
    """

    role: str
    text: str
    num_tokens: int
    max_tokens: int
    cut: str
    images: tuple[str, ...] = ()

    def summary(self) -> str:
        """One sentence for people."""
        start = self.text if len(self.text) <= SHOWN_START else f"{self.text[:SHOWN_START]}..."
        name = f"caption of {listed(self.images)}" if self.role == CAPTION else f"{self.role} {start!r}"
        cut = self.cut if len(self.cut) <= SHOWN_LENGTH else f"{self.cut[:SHOWN_LENGTH]}..."
        return (
            f"The {name} has {self.num_tokens} tokens, but the tokenizer's limit is {self.max_tokens}, including the start and "
            f"end tokens: {cut!r} is cut off. Shorten it."
        )


def long_prompts(
    tokenizers: Sequence[PreTrainedTokenizerBase], prompts: Mapping[str, str], captions: Iterable[tuple[Path, str]] = ()
) -> list[LongPrompt]:
    """The prompts that exceed the limit of one of `tokenizers`.

    Args:
        prompts: prompts other than captions, with the role of each.
        captions: images with their captions; a caption that is also in `prompts` has its role there.
    """
    images: dict[str, list[str]] = {}
    for path, text in captions:
        if text not in prompts:
            images.setdefault(text, []).append(display_path(path.name))
    roles = {**prompts, **dict.fromkeys(images, CAPTION)}
    return [
        LongPrompt(role, text, *cut, tuple(images.get(text, ())))
        for text, role in roles.items()
        if (cut := _cut(tokenizers, text)) is not None
    ]


def _cut(tokenizers: Sequence[PreTrainedTokenizerBase], text: str) -> tuple[int, int, str] | None:
    """The number of tokens of `text`, the limit, and the text cut off by the tokenizer that cuts most; None if none does."""
    cuts = [cut for tokenizer in tokenizers if (cut := _cut_by(tokenizer, text)) is not None]
    return max(cuts, key=lambda cut: len(cut[2]), default=None)


def _cut_by(tokenizer: PreTrainedTokenizerBase, text: str) -> tuple[int, int, str] | None:
    limit, special = tokenizer.model_max_length, tokenizer.num_special_tokens_to_add()
    # With `verbose`, the tokenizer would warn about the length itself.
    ids = tokenizer(text, add_special_tokens=False, verbose=False, return_offsets_mapping=tokenizer.is_fast)
    count = len(ids["input_ids"]) + special
    if count <= limit:
        return None
    read = limit - special
    if tokenizer.is_fast:
        return count, limit, text[ids["offset_mapping"][read][0] :].strip()
    return count, limit, tokenizer.decode(ids["input_ids"][read:])
