"""The event listeners of the page, called without a browser."""

from collections.abc import Callable
from typing import Any

import gradio as gr


def listener(page: gr.Blocks, part: str, name: str) -> Callable[..., Any]:
    """The listener `name` of the module `webui.screens.part`; its result must have a value per output, or be one skip."""
    module = f"webui.screens.{part}"
    own = [one for one in page.fns.values() if getattr(one.fn, "__module__", "") == module and one.fn.__name__ == name]
    assert own

    def called(*given: Any) -> Any:
        found, count = own[0].fn(*given), len(own[0].outputs)
        if found == gr.skip():
            return found
        if isinstance(found, dict) and found.keys() <= set(own[0].outputs):
            return [found.get(each, gr.skip()) for each in own[0].outputs]
        assert count == 1 or len(found) == count
        return found

    return called
