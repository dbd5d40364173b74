"""Errors on the page: one sentence with the remedy; the log has the details."""

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


def show_errors(handler: Callable[Arguments, Result]) -> Callable[Arguments, Result]:
    """Wrap an event handler (a function, generator or coroutine), so that the page shows its errors as one sentence.

    An InputError is an error of the user and names the remedy. Any other error is logged under a short number that the page
    shows. A generator that is closed, for example by a cancelled event, ends as it would without the wrapper.
    """
    if inspect.isgeneratorfunction(handler):

        @functools.wraps(handler)
        def wrapped(*arguments: Arguments.args, **named: Arguments.kwargs) -> Generator:
            with _plain_errors():
                return (yield from handler(*arguments, **named))

    elif inspect.iscoroutinefunction(handler):

        @functools.wraps(handler)
        async def wrapped(*arguments: Arguments.args, **named: Arguments.kwargs) -> Result:
            with _plain_errors():
                return await handler(*arguments, **named)

    else:

        @functools.wraps(handler)
        def wrapped(*arguments: Arguments.args, **named: Arguments.kwargs) -> Result:
            with _plain_errors():
                return handler(*arguments, **named)

    return wrapped


@contextmanager
def _plain_errors() -> Iterator[None]:
    try:
        yield
    except InputError as error:
        raise gr.Error(html.escape(str(error), quote=False), title="That does not work yet", print_exception=False) from error
    except gr.Error:
        raise
    except Exception as error:
        # The browser must not see a traceback.
        number = secrets.token_hex(3)
        logger.exception("error %s", number)
        sentence = f"Internal error {number}. Your runs and images are not affected. The server's log has the details."
        raise gr.Error(sentence, title="Error", print_exception=False) from error
