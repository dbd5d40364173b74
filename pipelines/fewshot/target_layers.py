"""The layers of a CLIP model that an adapter is added to."""

from __future__ import annotations

import re
from dataclasses import dataclass, field

from pipelines.errors import InputError
from pipelines.methods import method_named

IMAGE, TEXT = "image", "text"
ENCODERS = {IMAGE: (IMAGE,), TEXT: (TEXT,), "both": (IMAGE, TEXT)}
PROJECTIONS = ["q", "k", "v"]
ALL_PROJECTIONS = (*PROJECTIONS, "out")


@dataclass
class TargetLayers:
    """The attention layers of a CLIP model that an adapter is added to."""

    encoders: str = field(default="both", metadata={"help": "Which encoders to adapt: image, text or both."})
    projections: list[str] | None = field(
        default=None,
        metadata={
            "help": "Which projections of each attention layer to adapt: q, k, v, out. Default: the method's own, or q, k and v."
        },
    )
    layers: str = field(
        default="all", metadata={"help": "Which attention layers of an encoder to adapt: all, last-N, or A-B (counted from 0)."}
    )

    _argument_group_name = "target_layers"

    def __post_init__(self) -> None:
        if self.encoders not in ENCODERS:
            raise InputError(f"encoders must be one of {', '.join(ENCODERS)}, got {self.encoders!r}.")
        unknown = [name for name in self.projections or () if name not in ALL_PROJECTIONS]
        if unknown or self.projections == []:
            raise InputError(f"projections must be one or more of {', '.join(ALL_PROJECTIONS)}, got {unknown or 'none'}.")
        if not re.fullmatch(r"all|last-[1-9]\d*|\d+-\d+", self.layers):
            raise InputError(f"layers must be all, last-N or A-B, such as last-4 or 0-5, got {self.layers!r}.")

    def projections_of(self, method: str) -> list[str]:
        """The projections that `method` adapts."""
        return self.projections or list(method_named(method).defaults("few-shot", False).target_layers or PROJECTIONS)

    def indices(self, count: int) -> range:
        """The indices of the chosen layers out of `count` attention layers.

        Raises: InputError if a chosen layer does not exist.
        """
        if self.layers == "all":
            return range(count)
        first, last = self.layers.split("-")
        start, stop = (count - int(last), count) if first == "last" else (int(first), int(last) + 1)
        if not 0 <= start < stop <= count:
            raise InputError(
                f"layers must be in 0-{count - 1}, the {count} attention layers of the encoder, got {self.layers!r}."
            )
        return range(start, stop)
