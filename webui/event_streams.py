"""The part of the page that opens a new event stream when one is closed while an event is pending."""

from __future__ import annotations

from pathlib import Path

import gradio as gr

from webui.app_context import QUIET

SCRIPT = Path(__file__).with_suffix(".js")
# For `launch`: in the page's head, so that it is there before the first event.
HEAD = f"<script>{SCRIPT.read_text()}</script>"


def build() -> None:
    """Put the button that the script clicks into the open page."""
    gr.Button(visible="hidden", elem_id="reopen-event-stream").click(lambda: None, **QUIET)
