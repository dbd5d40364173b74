"""What an exported LoRA leaves out of a weight change whose rank is too high for it."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path

from .factors import Factors
from .files import FOREIGN_DTYPES, read_header
from .weight_change import EXPORT_RANK

# The key in a file's metadata.
LEFT_OUT = "nora_vision_left_out"


@dataclass(frozen=True)
class LeftOut:
    """Norms of what a LoRA file leaves out of the weight change, relative to those of the weight change.

    Args:
        overall: of all layers together.
        worst: of the worst layer.
        layer: the name of that layer.
    """

    overall: float
    worst: float
    layer: str

    @classmethod
    def of(cls, changes: Mapping[str, Factors]) -> LeftOut | None:
        """What the factors of all layers, by name, leave out; None if they are exact."""
        worst = max(changes, key=lambda name: changes[name].relative_error)
        if changes[worst].relative_error == 0:
            return None
        left_out, included = (sum(part(change) ** 2 for change in changes.values()) for part in (left_out_norm, norm))
        return cls((left_out / (left_out + included)) ** 0.5, changes[worst].relative_error, worst)

    @classmethod
    def read(cls, path: Path) -> LeftOut | None:
        """What the file at `path` leaves out, by its metadata; None if it is exact or of another program."""
        text = read_header(path, FOREIGN_DTYPES).metadata.get(LEFT_OUT)
        return None if text is None else cls(**json.loads(text))

    def metadata(self) -> dict[str, str]:
        """The entry in a file's metadata."""
        return {LEFT_OUT: json.dumps(asdict(self))}

    def __str__(self) -> str:
        return (
            f"it holds the best approximation of rank {EXPORT_RANK} or less and leaves out {self.overall:.1%} of the weight "
            f"change (Frobenius norm; worst layer: {self.layer}, {self.worst:.1%})"
        )


def norm(change: Factors) -> float:
    """The Frobenius norm of up (out, k) times down (k, in)."""
    up, down = change.up.flatten(1).double(), change.down.flatten(1).double()
    return max(float(((up.T @ up) * (down @ down.T)).sum()), 0.0) ** 0.5


def left_out_norm(change: Factors) -> float:
    """The Frobenius norm of what the factors leave out."""
    error = change.relative_error
    return 0.0 if error == 0 else norm(change) * error / (1 - error**2) ** 0.5
