"""Warnings of libraries that say nothing about what is done here, left out of the terminal. All others are shown."""

from __future__ import annotations

import logging
import re

# By the logger that gives them. Each is left out for its words alone: the same logger's other warnings stay.
POINTLESS = {
    # Given for an empty list too, whenever a model of diffusers is moved to another precision.
    "diffusers.models.modeling_utils": re.compile(r"should be kept in float32: \[\]"),
    # On import; a kernel for 4-bit weights on some CPUs, without which they are multiplied another way.
    "bitsandbytes.backends.cpu.ops": re.compile(r"^Failed to load CPU gemm_4bit_forward from kernels-community"),
    # A LoRA that changes some layers of a kind alone: PEFT adds the others too, where they change nothing. A report that says
    # more than that is shown.
    "transformers.integrations.peft": re.compile(
        r"(?s)\A(?!.*\b(?:UNEXPECTED|MISMATCH|CONVERSION)\b).*newly initialized because missing from the checkpoint"
    ),
}


class _LeaveOut(logging.Filter):
    """Drops the records whose message a pattern matches."""

    def __init__(self, pattern: re.Pattern[str]) -> None:
        super().__init__()
        self.pattern = pattern

    def filter(self, record: logging.LogRecord) -> bool:
        """Whether `record` is shown."""
        return self.pattern.search(record.getMessage()) is None


def leave_out_pointless_warnings() -> None:
    """Have the loggers of `POINTLESS` leave out what its patterns match, from now on; a second call changes nothing."""
    for name, pattern in POINTLESS.items():
        logger = logging.getLogger(name)
        if not any(isinstance(one, _LeaveOut) for one in logger.filters):
            logger.addFilter(_LeaveOut(pattern))
