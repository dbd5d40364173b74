"""The option of methods whose matrices consist of blocks."""

from __future__ import annotations

from dataclasses import dataclass

from pipelines.adapter_method import option
from pipelines.option_checks import at_least


@dataclass
class BlockSizeOptions:
    """Options of methods whose matrices consist of square blocks; None is replaced by the value in `TaskDefaults`."""

    block_size: int | None = option(
        None, "rows and columns of a block; must divide the sizes of the adapted layers", "Block size"
    )

    def __post_init__(self) -> None:
        at_least(self, 2, "block_size")


def block_misfit(block: int, **sizes: int) -> str | None:
    """Why blocks of `block` rows do not fit a layer with these sizes, by their names; None if they fit."""
    for name, size in sizes.items():
        if size % block:
            divisors = [divisor for divisor in range(2, size + 1) if size % divisor == 0]
            nearest = ", ".join(map(str, sorted(sorted(divisors, key=lambda divisor: abs(divisor - block))[:3])))
            return f"block_size must divide its {name} of {size}, got {block}. Choose a divisor such as {nearest}."
    return None
