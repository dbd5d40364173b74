"""The part of the page that opens a new event stream when one is closed while an event is pending."""

from __future__ import annotations

from pathlib import Path

import gradio as gr

from webui.context import QUIET

# For `launch`, which runs it when the page has loaded. A script in the head would have no nonce.
SCRIPT = Path(__file__).with_suffix(".js").read_text()


def build() -> None:
    """Put the button that the script clicks into the open page."""
    gr.Button(visible="hidden", elem_id="reopen-event-stream").click(lambda: None, **QUIET)
