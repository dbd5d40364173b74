"""Log messages of a run on the terminal."""

from __future__ import annotations

import logging
import re
import warnings
from collections.abc import Iterator
from contextlib import contextmanager

from tqdm.contrib.logging import logging_redirect_tqdm

PROJECT_LOGGERS = ("training", "pipelines", "nora_vision")
RANK = re.compile(r"^\[RANK 0\] ")
# Warnings about several adapters in one model, which are intended.
IGNORED_WARNINGS = (r"Already found a `peft_config` attribute", r"Adapter .* was active which is now deleted")


class _Plain(logging.Formatter):
    """The message, with the level of warnings and errors, and without accelerate's prefix for the main process."""

    def format(self, record: logging.LogRecord) -> str:
        message = RANK.sub("", super().format(record))
        return message if record.levelno < logging.WARNING else f"{record.levelname.lower()}: {message}"


@contextmanager
def configure_logging() -> Iterator[None]:
    """A context in which the project's log messages go to the terminal, above progress bars."""
    handler = logging.StreamHandler()
    handler.setFormatter(_Plain())
    loggers = [logging.getLogger(name) for name in PROJECT_LOGGERS]
    before = [(logger.level, logger.propagate) for logger in loggers]
    for logger in loggers:
        logger.setLevel(logging.INFO)
        logger.addHandler(handler)
        logger.propagate = False
    try:
        with logging_redirect_tqdm(loggers), warnings.catch_warnings():
            for message in IGNORED_WARNINGS:
                warnings.filterwarnings("ignore", message=message)
            yield
    finally:
        for logger, (level, propagate) in zip(loggers, before, strict=True):
            logger.removeHandler(handler)
            logger.setLevel(level)
            logger.propagate = propagate
