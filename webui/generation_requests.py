"""Generation requests from the page and the API, before they are checked against models."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from pipelines.errors import InputError
from webui.adapters import FILE, reference_of

# Rows of further adapters on the page.
MIXED = 3
STEPS, GUIDANCE = 25, 4.0


@dataclass(frozen=True)
class GenerationRequest:
    """Images to draw.

    Args:
        run_id, step, strength: the adapter; without a run the base model alone.
        mixed: references of further adapters and their strengths.
        prompt, negative_prompt: what to show, and what to keep away from.
        count, seed: how many images; the first one's seed, to which each further one adds 1.
        with_base: whether to draw what the base model makes of the same seeds, too.
        steps, guidance: denoising steps, and how strongly the prompt is followed.
    """

    run_id: str | None
    step: int | None
    strength: float
    prompt: str
    mixed: tuple[tuple[str, float], ...] = ()
    negative_prompt: str = ""
    count: int = 1
    seed: int = 0
    with_base: bool = False
    steps: int = STEPS
    guidance: float = GUIDANCE

    @classmethod
    def from_page(cls, values: Sequence[Any]) -> GenerationRequest:
        """From the values of the page's fields, in the order of this class, the rows of `mixed` last.

        Raises: InputError for a field that is empty or no number.
        """
        run_id, step, strength, prompt, negative, count, seed, with_base, steps, guidance, *rows = values
        references, strengths = rows[:MIXED], rows[MIXED:]
        mixed = [(each, number("Strength", of)) for each, of in zip(references, strengths, strict=True) if each]
        return cls(
            run_id=run_id,
            step=None if step is None else integer("Step", step),
            strength=number("Strength", strength),
            prompt=str(prompt or ""),
            mixed=tuple(mixed),
            negative_prompt=str(negative or ""),
            count=integer("Images", count),
            seed=integer("Seed", seed),
            with_base=bool(with_base),
            steps=integer("Steps", steps),
            guidance=number("Guidance", guidance),
        )

    @property
    def references(self) -> list[tuple[str, float]]:
        """All adapters and their strengths, the run's first."""
        adapters = [] if self.run_id is None or self.step is None else [(reference_of(self.run_id, self.step), self.strength)]
        return [*adapters, *self.mixed]


def number(name: str, value: Any) -> float:
    """`value` as a finite number.

    Raises: InputError naming the field if it is none.
    """
    if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
        raise InputError(f"{name} must be a number, got {'nothing' if value is None else repr(value)}. Write one.")
    return float(value)


def integer(name: str, value: Any) -> int:
    """`value` as a whole number.

    Raises: InputError naming the field if it is none.
    """
    if not number(name, value).is_integer():
        raise InputError(f"{name} must be a whole number, got {value!r}. Write one without a fraction.")
    return int(value)


def run_in(settings: dict[str, Any]) -> tuple[str | None, int | None, float, list[tuple[str, float]]]:
    """From an image's settings: the run, step and strength that the page is to show, and the adapters mixed in."""
    used = [(str(each["reference"]), float(each["strength"])) for each in settings.get("adapters", [])]
    run_id, step, strength = None, None, 0.0
    if used and not used[0][0].startswith(f"{FILE}@"):
        (reference, strength), *used = used
        run_id, _, step_text = reference.partition("@")
        step = int(step_text)
    return run_id, step, strength, used
