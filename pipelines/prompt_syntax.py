"""Detection of A1111's prompt syntax, LoRA tags and word weights, which is read as plain text here."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Literal

Kind = Literal["lora", "weight"]
LORA_TAG = re.compile(
    r"<\s*(?:lora|lyco|hypernet)\s*:\s*(?P<name>[^:<>]+?)\s*(?::\s*(?P<scale>[^:<>]*?)\s*)?(?::[^<>]*)?>", re.IGNORECASE
)
# "(word:1.4)" and "((word))", but not "(16:9)", and no brackets after a backslash.
WEIGHT = re.compile(r"(?<!\\)\((?![\d\s]*:)[^()]*?[^()\\\s]\s*:\s*[+-]?(?:\d+\.?\d*|\.\d+)\s*\)|(?<!\\)\(\([^()]+\)\)")
NUMBER = re.compile(r"[+-]?(?:\d+\.?\d*|\.\d+)")
LONGEST = 60


@dataclass(frozen=True)
class ForeignSyntax:
    """A part of a prompt that A1111 interprets.

    Args:
        kind: a LoRA tag, or a weight of words.
        text: the part of the prompt.
        name, scale: of a LoRA tag; `scale` is None if the tag has no number.
    """

    kind: Kind
    text: str
    name: str | None = None
    scale: str | None = None


def foreign_syntax(prompt: str) -> list[ForeignSyntax]:
    """The parts of `prompt` that A1111 interprets: LoRA tags first, then weights, each in order."""
    tags = [
        ForeignSyntax("lora", match[0], match["name"], match["scale"] if NUMBER.fullmatch(match["scale"] or "") else None)
        for match in LORA_TAG.finditer(prompt)
    ]
    return [*tags, *(ForeignSyntax("weight", match[0]) for match in WEIGHT.finditer(LORA_TAG.sub(" ", prompt)))]


def command_line_warnings(prompts: Iterable[str]) -> list[str]:
    """One warning for each distinct A1111 part of prompts to generate images from, with the options that do the same."""

    def lora(part: ForeignSyntax) -> str:
        scale = "" if part.scale is None else f" --scale {part.scale}"
        return f"To use a LoRA, give --adapter PATH/{part.name}.safetensors{scale}."

    return _warnings(prompts, lora)


def training_warnings(prompts: Iterable[str]) -> list[str]:
    """One warning for each distinct A1111 part of prompts to train and validate with."""
    return _warnings(prompts, lambda part: "Leave it out: training starts from the base model alone.")


def page_warnings(prompts: Iterable[str], remedy: str = "choose it under Use, with its scale") -> list[str]:
    """One warning for each distinct A1111 part of prompts that were typed on the page.

    Args:
        remedy: how to choose an adapter there.
    """
    return _warnings(prompts, lambda part: f"To use a LoRA, {remedy}.")


def _warnings(prompts: Iterable[str], lora_remedy: Callable[[ForeignSyntax], str]) -> list[str]:
    parts = dict.fromkeys(part for prompt in prompts for part in foreign_syntax(prompt))
    remedies = {"lora": lora_remedy, "weight": lambda part: "Weights have no effect: remove them, and use words for emphasis."}
    return [
        f"{_shortened(part.text)!r} in a prompt is A1111's syntax and is read here as plain text. {remedies[part.kind](part)}"
        for part in parts
    ]


def _shortened(text: str) -> str:
    return text if len(text) <= LONGEST else f"{text[: LONGEST - 1]}…"
