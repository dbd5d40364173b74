"""What a run says on the terminal."""

from __future__ import annotations

import logging
import re
import warnings
from collections.abc import Iterator
from contextlib import contextmanager

from tqdm.contrib.logging import logging_redirect_tqdm

OWN_LOGGERS = ("training", "pipelines", "nora_vision")
RANK = re.compile(r"^\[RANK 0\] ")
# An adapter beside the trained one is meant, wherever a run has two.
MEANT = (r"Already found a `peft_config` attribute", r"Adapter .* was active which is now deleted")


class _Plain(logging.Formatter):
    """The message alone: accelerate names the main process in each, which only says something of the others."""

    def format(self, record: logging.LogRecord) -> str:
        words = RANK.sub("", super().format(record))
        return words if record.levelno < logging.WARNING else f"{record.levelname.lower()}: {words}"


@contextmanager
def configure_logging() -> Iterator[None]:
    """Meanwhile the project's own messages go to the terminal, above any progress bar."""
    handler = logging.StreamHandler()
    handler.setFormatter(_Plain())
    loggers = [logging.getLogger(name) for name in OWN_LOGGERS]
    before = [(logger.level, logger.propagate) for logger in loggers]
    for logger in loggers:
        logger.setLevel(logging.INFO)
        logger.addHandler(handler)
        logger.propagate = False
    try:
        with logging_redirect_tqdm(loggers), warnings.catch_warnings():
            for message in MEANT:
                warnings.filterwarnings("ignore", message=message)
            yield
    finally:
        for logger, (level, propagate) in zip(loggers, before, strict=True):
            logger.removeHandler(handler)
            logger.setLevel(level)
            logger.propagate = propagate
