"""What all screens share: the run that is looked at, the tabs, and the clock that ticks while something is at work."""

from __future__ import annotations

from dataclasses import dataclass

import gradio as gr

from webui.settings import Settings
from webui.views import views
from webui.workspace import Workspace

POLL_SECONDS = 1.5
EMPTY_DRAFT = {"set": None, "preset": "Balanced", "options": {}}


@dataclass(frozen=True)
class Shell:
    """The frame around the screens.

    Args:
        page: the page.
        settings: what the server was started with.
        run: the id of the run that Train, Judge and Use are about.
        step: which of its steps Use draws with; Use places and fills it, Judge sets it.
        tabs: all screens, by the ids of `webui.page.SCREENS`.
        draft: what is being prepared for the next run, kept by the browser: {"set": id of its pictures or None, "options": the
            values that differ from the defaults, by group, "preset": its name}. Never what a run has become.
        class_draft: the same for the next classifier.
        clock: ticks every `POLL_SECONDS` while a run of the user's is at work, and stands still otherwise.
    """

    page: gr.Blocks
    settings: Settings
    run: gr.Dropdown
    step: gr.Dropdown
    tabs: gr.Tabs
    draft: gr.BrowserState
    class_draft: gr.BrowserState
    clock: gr.Timer

    @property
    def outputs(self) -> list[gr.Dropdown | gr.Tabs | gr.Timer]:
        """What `show` sets, in its order."""
        return [self.run, self.tabs, self.clock]

    def show(self, workspace: Workspace, run_id: str | None = None, tab: str | None = None) -> list[dict[str, object]]:
        """Updates of `outputs`: all runs of the workspace to choose from, `run_id` chosen, and the screen `tab` in front.

        Args:
            run_id: None for the one at work, else the newest.
            tab: None for the one that is there.
        """
        known = views(workspace)
        at_work = [view for view in known if view.is_active]
        if run_id not in [view.id for view in known]:
            run_id = next((view.id for view in [*at_work, *known]), None)
        choices = [(view.title, view.id) for view in known]
        in_front = gr.skip() if tab is None else gr.Tabs(selected=tab)
        return [gr.Dropdown(choices=choices, value=run_id), in_front, gr.Timer(active=bool(at_work))]
