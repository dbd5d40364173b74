"""Errors on the page: one plain sentence with what to do; the log has the rest."""

from __future__ import annotations

import functools
import html
import inspect
import logging
import secrets
from collections.abc import Callable, Generator, Iterator
from contextlib import contextmanager
from typing import ParamSpec, TypeVar

import gradio as gr

from pipelines.errors import InputError

Arguments, Result = ParamSpec("Arguments"), TypeVar("Result")
logger = logging.getLogger(__name__)


def in_plain_words(handler: Callable[Arguments, Result]) -> Callable[Arguments, Result]:
    """Wrap an event's handler, a function, a generator or a coroutine, so that whatever it raises is shown as one sentence.

    An InputError is the user's to mend and says how. Anything else is ours: it goes to the log under a short number that the
    page shows. A generator that is closed, as a cancelled event is, ends as it would unwrapped.
    """
    if inspect.isgeneratorfunction(handler):

        @functools.wraps(handler)
        def wrapped(*arguments: Arguments.args, **named: Arguments.kwargs) -> Generator:
            with _said_plainly():
                return (yield from handler(*arguments, **named))

    elif inspect.iscoroutinefunction(handler):

        @functools.wraps(handler)
        async def wrapped(*arguments: Arguments.args, **named: Arguments.kwargs) -> Result:
            with _said_plainly():
                return await handler(*arguments, **named)

    else:

        @functools.wraps(handler)
        def wrapped(*arguments: Arguments.args, **named: Arguments.kwargs) -> Result:
            with _said_plainly():
                return handler(*arguments, **named)

    return wrapped


@contextmanager
def _said_plainly() -> Iterator[None]:
    try:
        yield
    except InputError as error:
        raise gr.Error(html.escape(str(error), quote=False), title="That does not work yet", print_exception=False) from error
    except gr.Error:
        raise
    except Exception as error:
        # The boundary to the browser: nothing of a traceback may be shown there.
        number = secrets.token_hex(3)
        logger.exception("error %s", number)
        sentence = f"Something went wrong in the app itself; nothing of yours is lost. Its log has the reason under {number}."
        raise gr.Error(sentence, title="Error", print_exception=False) from error
