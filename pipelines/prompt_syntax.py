"""Syntax of other programs in prompts, which is plain text here: A1111's LoRA tags and word weights."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Literal

Kind = Literal["lora", "weight"]
LORA_TAG = re.compile(
    r"<\s*(?:lora|lyco|hypernet)\s*:\s*(?P<name>[^:<>]+?)\s*(?::\s*(?P<scale>[^:<>]*?)\s*)?(?::[^<>]*)?>", re.IGNORECASE
)
# "(word:1.4)", but neither "(16:9)" nor brackets that A1111 takes as they are, after a backslash; and "((word))".
WEIGHT = re.compile(r"(?<!\\)\((?![\d\s]*:)[^()]*?[^()\\\s]\s*:\s*[+-]?(?:\d+\.?\d*|\.\d+)\s*\)|(?<!\\)\(\([^()]+\)\)")
NUMBER = re.compile(r"[+-]?(?:\d+\.?\d*|\.\d+)")
LONGEST = 60


@dataclass(frozen=True)
class ForeignSyntax:
    """A part of a prompt that other programs read as a command.

    Args:
        kind: a LoRA's tag, or a weight of words.
        text: the part.
        name, scale: of a LoRA; None where the tag has no number.
    """

    kind: Kind
    text: str
    name: str | None = None
    scale: str | None = None


def foreign_syntax(prompt: str) -> list[ForeignSyntax]:
    """The parts of `prompt` that A1111 would not read as text, in their order, LoRA tags first."""
    tags = [
        ForeignSyntax("lora", match[0], match["name"], match["scale"] if NUMBER.fullmatch(match["scale"] or "") else None)
        for match in LORA_TAG.finditer(prompt)
    ]
    return [*tags, *(ForeignSyntax("weight", match[0]) for match in WEIGHT.finditer(LORA_TAG.sub(" ", prompt)))]


def command_line_warnings(prompts: Iterable[str]) -> list[str]:
    """A sentence for each foreign part of prompts to generate images from, each once, with the options that do the same."""

    def lora(part: ForeignSyntax) -> str:
        scale = "" if part.scale is None else f" --scale {part.scale}"
        return f"To use a LoRA, give --adapter PATH/{part.name}.safetensors{scale}."

    return _warnings(prompts, lora)


def training_warnings(prompts: Iterable[str]) -> list[str]:
    """A sentence for each foreign part of prompts to train and validate with, each once."""
    return _warnings(prompts, lambda part: "Leave it out: training starts from the base model alone.")


def page_warnings(prompts: Iterable[str], remedy: str = "choose it under Use, with its scale") -> list[str]:
    """A sentence for each foreign part of prompts typed on the page, each once.

    Args:
        remedy: where an adapter is chosen there.
    """
    return _warnings(prompts, lambda part: f"To use a LoRA, {remedy}.")


def _warnings(prompts: Iterable[str], lora_remedy: Callable[[ForeignSyntax], str]) -> list[str]:
    parts = dict.fromkeys(part for prompt in prompts for part in foreign_syntax(prompt))
    remedies = {"lora": lora_remedy, "weight": lambda part: "Weights have no effect: leave them out, and say it in words."}
    return [
        f"{_shortened(part.text)!r} in a prompt is A1111's syntax and is read here as plain text. {remedies[part.kind](part)}"
        for part in parts
    ]


def _shortened(text: str) -> str:
    return text if len(text) <= LONGEST else f"{text[: LONGEST - 1]}…"
