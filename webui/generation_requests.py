"""Generation requests of the page and the API, before the adapters and values are checked."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from pipelines.errors import InputError
from webui.adapters import FILE, reference_of

# The number of further adapters that the page has fields for.
MIXED = 3
STEPS, GUIDANCE_SCALE = 25, 4.0


@dataclass(frozen=True)
class GenerationRequest:
    """Images to generate.

    Args:
        run_id, step, scale: the run and the step of its adapter, and the adapter's scale; None for the base model alone.
        mixed: references of further adapters and their scales.
        prompt, negative_prompt: as in diffusers.
        count, seed: the number of images, and the seed of the first; each further image adds 1.
        with_base: also generate the same seeds with the base model alone.
        steps, guidance_scale: denoising steps, and the scale of classifier-free guidance.
    """

    run_id: str | None
    step: int | None
    scale: float
    prompt: str
    mixed: tuple[tuple[str, float], ...] = ()
    negative_prompt: str = ""
    count: int = 1
    seed: int = 0
    with_base: bool = False
    steps: int = STEPS
    guidance_scale: float = GUIDANCE_SCALE

    @classmethod
    def from_page(cls, values: Sequence[Any]) -> GenerationRequest:
        """From the values of the page's fields: in the order of this class, but the references and scales of `mixed` last.

        Raises: InputError if a numeric field is empty or not a number.
        """
        run_id, step, scale, prompt, negative, count, seed, with_base, steps, guidance_scale, *rows = values
        references, scales = rows[:MIXED], rows[MIXED:]
        mixed = [(each, number("Adapter weight", of)) for each, of in zip(references, scales, strict=True) if each]
        return cls(
            run_id=run_id,
            step=None if step is None else integer("Step", step),
            scale=number("Adapter weight", scale),
            prompt=str(prompt or ""),
            mixed=tuple(mixed),
            negative_prompt=str(negative or ""),
            count=integer("Images", count),
            seed=integer("Seed", seed),
            with_base=bool(with_base),
            steps=integer("Steps", steps),
            guidance_scale=number("Guidance scale", guidance_scale),
        )

    @property
    def references(self) -> list[tuple[str, float]]:
        """All adapters and their scales, the run's first."""
        adapters = [] if self.run_id is None or self.step is None else [(reference_of(self.run_id, self.step), self.scale)]
        return [*adapters, *self.mixed]


def number(name: str, value: Any) -> float:
    """`value` as a finite number.

    Raises: InputError naming the field if it is not one.
    """
    if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
        raise InputError(f"{name} must be a number, got {'nothing' if value is None else repr(value)}. Enter one.")
    return float(value)


def integer(name: str, value: Any) -> int:
    """`value` as an integer.

    Raises: InputError naming the field if it is not one.
    """
    if not number(name, value).is_integer():
        raise InputError(f"{name} must be a whole number, got {value!r}. Enter one without a fraction.")
    return int(value)


def adapter_fields(settings: dict[str, Any]) -> tuple[str | None, int | None, float, list[tuple[str, float]]]:
    """The run, step and scale, and the further adapters, from an image's settings."""
    used = [(str(each["reference"]), float(each["scale"])) for each in settings.get("adapters", [])]
    run_id, step, scale = None, None, 0.0
    if used and not used[0][0].startswith(f"{FILE}@"):
        (reference, scale), *used = used
        run_id, _, step_text = reference.partition("@")
        step = int(step_text)
    return run_id, step, scale, used
