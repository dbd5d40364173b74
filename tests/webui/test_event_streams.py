"""An event that is sent while Gradio closes the event stream gets its response."""

import asyncio

import gradio as gr
import pytest
from playwright.sync_api import expect
from starlette.middleware import Middleware

from webui.page import SCRIPT, reopens_event_stream


class SlowClosing:
    """Middleware: a page reads that its event stream is closed only after it has sent the next event."""

    def __init__(self, app):
        self._app = app

    async def __call__(self, scope, receive, send):
        async def sent(message):
            if b"close_stream" in message.get("body", b""):
                await asyncio.sleep(0.5)
            await send(message)

        await self._app(scope, receive, sent)


@pytest.fixture
def url():
    """The address of a page on which each click causes a chain of three events."""
    with gr.Blocks(analytics_enabled=False) as page:
        reopens_event_stream()
        number, text, copy = gr.State(0), gr.Textbox(), gr.Textbox(elem_id="copy")
        gr.Button("Count", elem_id="count").click(lambda value: value + 1, number, number)
        number.change(str, number, text)
        text.change(lambda value: f"{value} clicks", text, copy)
    _, address, _ = page.launch(
        head=f"<script>{SCRIPT}</script>",
        quiet=True,
        prevent_thread_lock=True,
        app_kwargs={"middleware": [Middleware(SlowClosing)]},
    )
    yield address
    page.close()


def test_no_event_is_left_without_a_response(url, new_page):
    page = new_page()
    page.goto(url)
    for count in (1, 2):
        page.locator("#count").click()
        expect(page.locator("#copy textarea")).to_have_value(f"{count} clicks", timeout=20_000)
