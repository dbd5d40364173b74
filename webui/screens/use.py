"""The screen Use."""

from __future__ import annotations

import gradio as gr

from webui.shell import Shell


def build(shell: Shell) -> None:
    """Put the screen into the open tab."""
    gr.Markdown("Use")
