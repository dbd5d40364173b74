"""Filters for warnings of libraries that do not apply here. All other warnings are shown."""

from __future__ import annotations

import logging
import re
import warnings

# By logger. Only messages that match the pattern are dropped.
POINTLESS = {
    # Logged even for an empty list, whenever a diffusers model is moved to another dtype.
    "diffusers.models.modeling_utils": re.compile(r"should be kept in float32: \[\]"),
    # Logged on import. The kernel is optional: without it, the products of 4-bit weights are computed another way.
    "bitsandbytes.backends.cpu.ops": re.compile(r"^Failed to load CPU gemm_4bit_forward from kernels-community"),
    # Logged for a LoRA that changes only some layers of a kind: PEFT also adds the others, which change nothing. Reports of
    # other problems are shown.
    "transformers.integrations.peft": re.compile(
        r"(?s)\A(?!.*\b(?:UNEXPECTED|MISMATCH|CONVERSION)\b).*newly initialized because missing from the checkpoint"
    ),
}
# Raised by PEFT for every second adapter of a model, which is how adapters are combined.
POINTLESS_WARNINGS = (r"Already found a `peft_config` attribute",)


class _LeaveOut(logging.Filter):
    """Drops the records whose message a pattern matches."""

    def __init__(self, pattern: re.Pattern[str]) -> None:
        super().__init__()
        self.pattern = pattern

    def filter(self, record: logging.LogRecord) -> bool:
        """Whether `record` is shown."""
        return self.pattern.search(record.getMessage()) is None


def leave_out_pointless_warnings() -> None:
    """Drop the messages that match `POINTLESS` or `POINTLESS_WARNINGS` from now on; a second call has no effect."""
    for message in POINTLESS_WARNINGS:
        warnings.filterwarnings("ignore", message=message)
    for name, pattern in POINTLESS.items():
        logger = logging.getLogger(name)
        if not any(isinstance(one, _LeaveOut) for one in logger.filters):
            logger.addFilter(_LeaveOut(pattern))
