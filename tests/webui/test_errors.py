"""An error of a handler is one sentence on the page, whether the handler returns, yields or awaits."""

import asyncio

import gradio as gr
import pytest
from processes import apart

from pipelines.errors import InputError
from webui.context import show_errors


def returning(error):
    def handler():
        raise error

    return show_errors(handler)


def yielding(error):
    def handler():
        yield 1
        raise error

    wrapped = show_errors(handler)
    return lambda: list(wrapped())


def awaiting(error):
    async def handler():
        await asyncio.sleep(0)
        raise error

    wrapped = show_errors(handler)
    return lambda: apart(wrapped())


@pytest.mark.parametrize("kind", [returning, yielding, awaiting])
def test_an_input_error_is_shown_with_names_escaped(kind):
    with pytest.raises(gr.Error, match=r"&lt;b&gt; is too large\. Shrink it\."):
        kind(InputError("<b> is too large. Shrink it."))()


@pytest.mark.parametrize("kind", [returning, yielding, awaiting])
def test_any_other_error_is_shown_as_a_number_of_the_log(kind, caplog):
    with pytest.raises(gr.Error, match=r"Internal error [0-9a-f]{6}") as raised:
        kind(ValueError("/secret/path"))()
    assert "secret" not in str(raised.value)
    assert "/secret/path" in caplog.text


@pytest.mark.parametrize("kind", [returning, yielding, awaiting])
def test_an_error_for_the_page_is_not_changed(kind):
    with pytest.raises(gr.Error, match="as it is"):
        kind(gr.Error("as it is"))()


def test_closing_a_wrapped_generator_closes_the_handler_without_an_error():
    closed = []

    @show_errors
    def handler():
        try:
            yield 1
            yield 2
        finally:
            closed.append(True)

    events = handler()
    assert next(events) == 1
    events.close()
    assert closed
