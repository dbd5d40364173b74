"""What a run says on the terminal, and that nothing of it stays after the run."""

import logging
import warnings

import pytest
from accelerate.logging import get_logger

from training.engine.console import configure_logging

NAME = "training.something"


@pytest.fixture
def logger():
    return get_logger(NAME)


def test_own_messages_are_said_plainly_and_warnings_named(logger, capsys):
    with configure_logging():
        logger.info("All is well.")
        logger.warning("Too little %s.", "light")
        logging.getLogger("another.library").info("chatter")
    assert capsys.readouterr().err == "All is well.\nwarning: Too little light.\n"


def test_afterwards_everything_is_as_it_was(logger, capsys):
    own = logging.getLogger("training")
    before = (own.level, own.propagate, list(own.handlers), list(warnings.filters))
    with pytest.raises(ZeroDivisionError), configure_logging():
        raise ZeroDivisionError
    assert (own.level, own.propagate, list(own.handlers), list(warnings.filters)) == before
    logger.info("unheard")
    assert capsys.readouterr().err == ""


def test_of_two_adapters_on_one_model_only_what_is_meant_is_left_unsaid(recwarn):
    with configure_logging():
        warnings.warn("Already found a `peft_config` attribute in the model.", stacklevel=1)
        warnings.warn("another", stacklevel=1)
    assert [str(warning.message) for warning in recwarn] == ["another"]
