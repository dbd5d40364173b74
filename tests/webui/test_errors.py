"""An error of a listener is one sentence on the page, whether the listener returns or yields."""

import gradio as gr
import pytest
from processes import apart

from pipelines.errors import InputError
from webui.context import Page


def returning(error):
    raise error


def yielding(error):
    yield 1
    raise error


def happens(listener, error):
    """An event of a page, until the listener raises `error`."""

    async def event():
        iterator = None
        while True:
            iterator = (await page.call_function(0, [error], iterator=iterator))["iterator"]

    with Page() as page:
        gr.Button().click(listener, gr.State(), gr.State())
    apart(event())


@pytest.mark.parametrize("listener", [returning, yielding])
def test_an_input_error_is_shown_with_names_escaped(listener):
    with pytest.raises(gr.Error, match=r"&lt;b&gt; is too large\. Shrink it\."):
        happens(listener, InputError("<b> is too large. Shrink it."))


@pytest.mark.parametrize("listener", [returning, yielding])
def test_any_other_error_is_shown_as_a_number_of_the_log(listener, caplog):
    with pytest.raises(gr.Error, match=r"Internal error [0-9a-f]{6}") as raised:
        happens(listener, ValueError("/secret/path"))
    assert "secret" not in str(raised.value)
    assert "/secret/path" in caplog.text


@pytest.mark.parametrize("listener", [returning, yielding])
def test_an_error_for_the_page_is_not_changed(listener):
    with pytest.raises(gr.Error, match="as it is"):
        happens(listener, gr.Error("as it is"))
