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


def test_messages_of_the_project_are_plain_and_warnings_have_their_level(logger, capsys):
    with configure_logging():
        logger.info("All is well.")
        logger.warning("Too little %s.", "light")
        logging.getLogger("another.library").info("chatter")
    assert capsys.readouterr().err == "All is well.\nwarning: Too little light.\n"


def test_logging_is_restored_afterwards(logger, capsys):
    own = logging.getLogger("training")
    before = (own.level, own.propagate, list(own.handlers), list(warnings.filters))
    with pytest.raises(ZeroDivisionError), configure_logging():
        raise ZeroDivisionError
    assert (own.level, own.propagate, list(own.handlers), list(warnings.filters)) == before
    logger.info("unheard")
    assert capsys.readouterr().err == ""


def test_intended_warnings_about_two_adapters_are_hidden_and_others_are_not(recwarn):
    with configure_logging():
        warnings.warn("Already found a `peft_config` attribute in the model.", stacklevel=1)
        warnings.warn("another", stacklevel=1)
    assert [str(warning.message) for warning in recwarn] == ["another"]
