"""Which layers of a CLIP model an adapter is put on."""

from __future__ import annotations

import re
from dataclasses import dataclass, field

from pipelines.errors import InputError
from pipelines.methods import method_named

IMAGE, TEXT = "image", "text"
ENCODERS = {IMAGE: (IMAGE,), TEXT: (TEXT,), "both": (IMAGE, TEXT)}
PROJECTIONS = ["q", "k", "v"]


@dataclass
class AdapterPlaces:
    """Which layers of a CLIP model an adapter is put on."""

    encoders: str = field(default="both", metadata={"help": "Which encoders to adapt: image, text or both."})
    projections: list[str] | None = field(
        default=None,
        metadata={
            "help": "Which layers of every attention to adapt: q, k, v, out. q, k and v unless said, or the method's own choice."
        },
    )
    layers: str = field(
        default="all", metadata={"help": "Which of an encoder's attentions to adapt: all, last-N, or A-B, counted from 0."}
    )

    _argument_group_name = "places"

    def __post_init__(self) -> None:
        # Here, as open_clip takes a second to import and --help does without it.
        from pipelines.clip_attention import LAYERS

        if self.encoders not in ENCODERS:
            raise InputError(f"encoders must be one of {', '.join(ENCODERS)}, got {self.encoders!r}.")
        unknown = [name for name in self.projections or () if name not in LAYERS]
        if unknown or self.projections == []:
            raise InputError(f"projections must be some of {', '.join(LAYERS)}, got {unknown or 'none'}.")
        if not re.fullmatch(r"all|last-[1-9]\d*|\d+-\d+", self.layers):
            raise InputError(f"layers must be all, last-N or A-B, such as last-4 or 0-5, got {self.layers!r}.")

    def projections_of(self, method: str) -> list[str]:
        """The layers that `method` adapts."""
        return self.projections or list(method_named(method).defaults("few-shot", False).target_layers or PROJECTIONS)

    def indices(self, count: int) -> range:
        """The chosen ones of `count` attentions.

        Raises: InputError if there are not that many.
        """
        if self.layers == "all":
            return range(count)
        first, last = self.layers.split("-")
        start, stop = (count - int(last), count) if first == "last" else (int(first), int(last) + 1)
        if not 0 <= start < stop <= count:
            raise InputError(f"layers must lie in 0-{count - 1} of the {count} attentions of an encoder, got {self.layers!r}.")
        return range(start, stop)
