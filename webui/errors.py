"""Errors on the page: one plain sentence with what to do; the log has the rest."""

from __future__ import annotations

import functools
import html
import logging
import secrets
from collections.abc import Callable
from typing import ParamSpec, TypeVar

import gradio as gr

from pipelines.errors import InputError

Arguments, Result = ParamSpec("Arguments"), TypeVar("Result")
logger = logging.getLogger(__name__)


def in_plain_words(handler: Callable[Arguments, Result]) -> Callable[Arguments, Result]:
    """Wrap an event's handler, so that whatever it raises is shown as one sentence.

    An InputError is the user's to mend and says how. Anything else is ours: it goes to the log under a short number that the
    page shows.
    """

    @functools.wraps(handler)
    def wrapped(*arguments: Arguments.args, **named: Arguments.kwargs) -> Result:
        try:
            return handler(*arguments, **named)
        except InputError as error:
            raise gr.Error(html.escape(str(error)), title="That does not work yet", print_exception=False) from error
        except gr.Error:
            raise
        except Exception as error:
            # The boundary to the browser: nothing of a traceback may be shown there.
            number = secrets.token_hex(3)
            logger.exception("error %s", number)
            sentence = f"Something went wrong in the app itself; nothing of yours is lost. Its log has the reason under {number}."
            raise gr.Error(sentence, title="Error", print_exception=False) from error

    return wrapped
