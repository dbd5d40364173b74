"""The screen Runs: all runs of the user and the actions on them; two to four of a kind side by side, and a prompt for all."""

from __future__ import annotations

from collections.abc import Hashable, Iterator, Mapping, Sequence
from itertools import chain
from pathlib import Path
from typing import Any

import gradio as gr
from markupsafe import Markup

from pipelines.errors import InputError
from training.runs.naming import LONGEST_TITLE, method_name, set_title
from training.subject.measured import Sample, sampled_steps, samples
from webui import launching
from webui.context import CHOOSING, QUIET, RELIST, AppContext, face
from webui.draft import Draft
from webui.form_schema import written
from webui.generation import AT_ONCE, generated, reference_of, request_for, steps_of
from webui.plots import COLOURS, Plot, line_plot, running_mean, value_tables
from webui.render import LazyUpdate, component, macros, parts, render, sample_image, text, thumbnail, updates
from webui.runs import RunView, accuracies, in_percent, series, views
from webui.screens import judge
from webui.screens.train import RESULTS
from webui.tasks import PLANS, Plan
from webui.workspace import Workspace

LABELS = {"open": "Open", "resume": "Resume", "stop": "Stop", "duplicate": "Duplicate as new", "delete": "Delete"}
INTRODUCTION = """<p>All runs, started here, in another browser or in a terminal. Select one to see its actions. One run trains
at a time; the others wait in the queue.</p>"""
ELSEWHERE = "The photos of this run are in another folder. Add them again; all other settings were copied."
MIN_RUNS, LETTERS = 2, "ABCD"
# By title, the column of each plot and how to read it.
PLOTS = {
    "Training loss": "The running mean of the loss on the photos. Compare the validation loss to choose a run.",
    **{title: hint for title, (_, hint) in judge.PLOTS.items() if title != "Memorisation"},
}
SMOOTHED = 1 / 16
LONGEST_VALUE = 120
# Options that differ for every run.
IGNORED_OPTIONS = frozenset({"output_dir", "resume_from_checkpoint", "cache_dir", "hub_token"})
NO_ADAPTER = "no saved adapter yet"
compare = macros("compare.html")


def build(context: AppContext) -> None:
    """Put the screen into the open tab."""
    _Runs(context)
    _Comparison(context)


class _Runs:
    """The list of runs and the actions on the selected one."""

    def __init__(self, context: AppContext) -> None:
        self.context, self.settings = context, context.settings
        gr.HTML(INTRODUCTION)
        self.components: dict[str, Any] = {"list": gr.HTML(js_on_load=CHOOSING, elem_id="runs-list")}
        info = "It names the run and its files. Empty it to restore the default."
        limits = {"max_length": LONGEST_TITLE, "max_lines": 1, "visible": False}
        self.components["title"] = gr.Textbox(label="Title", info=info, elem_id="runs-title", **limits)
        with gr.Row(elem_classes="buttons"):
            for name, label in LABELS.items():
                looks = {"variant": {"open": "primary", "delete": "stop"}.get(name, "secondary"), "visible": False, "scale": 0}
                width = 200 if name == "duplicate" else 140
                self.components[name] = gr.Button(label, elem_id=f"runs-{name}", min_width=width, **looks)
        with gr.Group(visible=False, elem_id="runs-confirm") as self.confirm:
            self.question = gr.HTML(padding=True)
            with gr.Row(elem_classes="buttons"):
                sure = gr.Button("Delete permanently", variant="stop", elem_id="runs-delete-yes", scale=0, min_width=160)
                cancel = gr.Button("Cancel", elem_id="runs-delete-no", scale=0, min_width=140)
        # `asked` is the run that the confirmation is about, even if another one is selected meanwhile.
        self.selected, self.asked, self.seen = gr.State(None), gr.State(None), gr.State({})
        self._wire(sure, cancel)

    def _wire(self, sure: gr.Button, cancel: gr.Button) -> None:
        context, components, selected, asked = self.context, self.components, self.selected, self.asked
        seen = {"inputs": [selected, self.seen], "outputs": [*components.values(), self.seen]}
        refreshing = {"fn": self.refresh, **seen, **QUIET}
        context.refreshes["runs"].click(trigger_mode="always_last", **refreshing)
        chosen = [selected, asked, self.confirm, *context.outputs]
        components["list"].select(self.choose, None, chosen, **QUIET).then(**refreshing)
        title = components["title"]
        renamed = gr.on([title.submit, title.blur], self.rename, [selected, title], context.outputs, **QUIET)
        renamed.then(**refreshing).then(None, js=RELIST, **QUIET)
        drafts, clicks = [context.draft, context.class_draft], [components[name].click for name in LABELS if name != "delete"]
        acted = gr.on(clicks, self.act, [selected, *drafts], [*context.outputs, *drafts], api_visibility="private")
        acted.then(**refreshing)
        components["delete"].click(self.ask_first, selected, [asked, self.confirm, self.question], api_visibility="private")
        sure.click(self.delete, asked, chosen, api_visibility="private").then(**refreshing)
        cancel.click(lambda: (None, gr.Group(visible=False)), None, [asked, self.confirm], **QUIET)

    def refresh(self, run_id: str | None, seen: dict[str, Hashable], request: gr.Request) -> dict[Any, Any]:
        """What has changed in the list and of the selected run."""
        return updates(contents(self.settings.workspace(request), run_id), seen, self.components, self.seen)

    def choose(self, event: gr.EventData, request: gr.Request) -> list[Any]:
        """Select the clicked run."""
        run_id = event._data.get("run")
        return [run_id, None, gr.Group(visible=False), *self.context.show(self.settings.workspace(request), run_id)]

    def rename(self, run_id: str | None, title: str, request: gr.Request) -> list[Any]:
        """Give the selected run another title."""
        workspace = self.settings.workspace(request)
        if run_id is not None:
            set_title(workspace.run(run_id).path, title)
        return self.context.show(workspace, run_id)

    def act(self, event: gr.EventData, run_id: str | None, subject: Any, classes: Any, request: gr.Request) -> dict[Any, Any]:
        """Do what the clicked button says with the selected run."""
        workspace, context, tab, draft = self.settings.workspace(request), self.context, None, {}
        # An updated button has another id than the one in `components`.
        view, action = RunView(workspace.run(run_id)), event.target.elem_id.removeprefix("runs-")
        is_classifier = view.task == "classify"
        if action == "open":
            tab = "train" if view.task == "subject" and view.state != "done" else RESULTS[view.task][0]
        elif action == "duplicate":
            tab, stored = ("classify", context.class_draft) if is_classifier else ("check", context.draft)
            options = launching.duplicate(workspace, view.id)
            draft = {stored: draft_like(workspace, PLANS[view.task], classes if is_classifier else subject, options)}
        elif action == "resume":
            launching.resume(workspace, view.id)
        else:
            launching.stop(workspace, view.id)
            gr.Info("The run stops after the current step and saves a checkpoint.")
        return dict(zip(context.outputs, context.show(workspace, view.id, tab), strict=True)) | draft

    def ask_first(self, run_id: str | None, request: gr.Request) -> list[Any]:
        """Ask whether to delete the selected run."""
        view = RunView(self.settings.workspace(request).run(run_id))
        return [view.id, gr.Group(visible=True), render("runs_question.html", run=view)]

    def delete(self, run_id: str | None, request: gr.Request) -> list[Any]:
        """Delete the run that the confirmation is about."""
        workspace = self.settings.workspace(request)
        launching.delete(workspace, run_id)
        return [None, None, gr.Group(visible=False), *self.context.show(workspace)]


def contents(workspace: Workspace, run_id: str | None) -> dict[str, LazyUpdate]:
    """The list of runs, and the title and the buttons of the selected one."""
    runs = views(workspace)
    view = next((each for each in runs if each.id == run_id), None)
    allowed = () if view is None else ("open", *view.actions)
    # With the id, because the text of another run with the same title may have been edited.
    title = (None, "") if view is None else (view.id, view.title)
    return {
        "list": text(cards(runs, run_id)),
        "title": LazyUpdate(title, lambda: gr.Textbox(value=title[1], visible=view is not None)),
        **{name: component(gr.Button, name in allowed) for name in LABELS},
    }


def cards(runs: list[RunView], run_id: str | None) -> str:
    """The list of runs, with the selected one marked."""
    return render("runs.html", runs=runs, chosen=run_id, face=face)


def draft_like(workspace: Workspace, plan: type[Plan], stored: object, options: dict[str, dict[str, Any]]) -> dict[str, Any]:
    """The draft of another run with a run's options."""
    draft = plan.like(workspace, Draft.from_browser(stored), options)
    if draft.set is None and options.get("data", {}).get(plan.image_folder) is not None:
        gr.Warning(ELSEWHERE)
    return draft.to_browser()


class _Comparison:
    """Runs side by side: the components and the handlers of their events."""

    def __init__(self, context: AppContext) -> None:
        self.settings, self.listed = context.settings, gr.State(None)
        gr.HTML("<h2>Side by side</h2>")
        hint = f"Two to {len(LETTERS)} of the same kind: images, losses, scores and the options that differ."
        limits = {"multiselect": True, "max_choices": len(LETTERS)}
        self.chosen = gr.Dropdown(label="Runs to compare", info=hint, elem_id="runs-compare", **limits)
        small = {"scale": 0, "min_width": 140}
        with gr.Row(elem_classes="buttons"):
            show = gr.Button("Compare", variant="primary", elem_id="runs-compare-show", **small)
        self.compared = gr.HTML(visible=False, elem_id="runs-compared", elem_classes="compare")
        with gr.Row():
            colours = dict(zip(LETTERS, COLOURS, strict=True))
            self.plots = [line_plot(title, LETTERS, hint, colours, min_width=420) for title, hint in PLOTS.items()]
        named = {"open": False, "visible": False, "elem_id": "runs-compare-form"}
        with gr.Accordion("Generate one prompt with all of them", **named) as self.form:
            with gr.Row(equal_height=True):
                self.prompt = gr.Textbox(label="Prompt", elem_id="runs-compare-prompt", scale=4)
                named = {"precision": 0, "minimum": 0, "scale": 1, "min_width": 100, "elem_id": "runs-compare-seed"}
                seed = gr.Number(0, label="Seed", **named)
            with gr.Row(elem_classes="buttons"):
                generate = gr.Button("Generate", variant="primary", elem_id="runs-compare-generate", **small)
                cancel = gr.Button("Cancel", elem_id="runs-compare-cancel", **small)
            self.images = gr.HTML(visible=False, elem_id="runs-compare-images", elem_classes="compare")
        listed = [self.chosen, self.listed]
        context.refreshes["runs"].click(self.choices, self.listed, listed, trigger_mode="multiple", **QUIET)
        outputs = [self.compared, self.form, self.prompt, self.images, *self.plots]
        begun = show.click(self.compare, self.chosen, outputs, api_visibility="private")
        begun.success(self.plot, self.chosen, self.plots, **QUIET)
        given = [self.chosen, self.prompt, seed]
        started = generate.click(self.generate_all, given, self.images, api_visibility="private", **AT_ONCE)
        cancel.click(None, cancels=[started], api_visibility="private")

    def choices(self, before: Any, request: gr.Request) -> Any:
        """The runs, sent if they have changed."""
        now = [(view.label, view.id) for view in views(self.settings.workspace(request)) if view.task != "arena"]
        return gr.skip() if now == before else [gr.Dropdown(choices=now), now]

    def compare(self, ids: list[str] | None, request: gr.Request) -> dict[Any, Any]:
        """The comparison and the form below it; the plots become empty, since they show other runs only after that."""
        runs = comparable(self.settings.workspace(request), ids or [])
        is_subject = runs[0].task == "subject"
        return {
            self.compared: gr.HTML(value=comparison(runs), visible=True),
            self.form: gr.Accordion(visible=is_subject),
            self.prompt: str(runs[0].chosen("data", "instance_prompt") or "") if is_subject else gr.skip(),
            self.images: gr.HTML(value="", visible=False),
            **{plot: gr.LinePlot(value=None, visible=False) for plot in self.plots},
        }

    def plot(self, ids: list[str], request: gr.Request) -> list[Any]:
        """The plots of the compared runs."""
        return [plot.update().make() for plot in plots(comparable(self.settings.workspace(request), ids)).values()]

    def generate_all(self, ids: list[str] | None, prompt: str, seed: float | None, request: gr.Request) -> Iterator[Any]:
        """The images of the prompt so far."""
        workspace = self.settings.workspace(request)
        for table in generated_with_all(workspace, comparable(workspace, ids or []), prompt, int(seed or 0)):
            yield gr.HTML(value=table, visible=True)


def comparable(workspace: Workspace, ids: Sequence[str]) -> list[RunView]:
    """The runs with these ids.

    Raises: InputError if they are not two to four, one does not exist or cannot be read, or their tasks differ.
    """
    unique = list(dict.fromkeys(ids))
    if not MIN_RUNS <= len(unique) <= len(LETTERS):
        raise InputError(f"Choose {MIN_RUNS} to {len(LETTERS)} runs to compare, got {len(unique)}.")
    runs = [RunView(workspace.run(run_id)) for run_id in unique]
    if len({view.task for view in runs}) > 1 or runs[0].task == "arena":
        raise InputError("Only subject runs, or only classifiers, can be compared with each other. Choose runs of the same kind.")
    if errors := [view.metrics_error for view in runs if view.metrics_error]:
        raise InputError(" ".join(errors))
    return runs


def comparison(runs: Sequence[RunView]) -> Markup:
    """The letter of each run, images or accuracies, the options that differ, and the values of the plots for screen readers."""
    is_subject = runs[0].task == "subject"
    results = (_images(runs), None) if is_subject else (None, _accuracies(runs))
    letters = dict(zip(LETTERS, runs, strict=False))
    return compare.comparison(letters, *results, _differences(runs)) + value_tables([*plots(runs).values()])


def _images(runs: Sequence[RunView]) -> Markup:
    """Images of the same prompt and seed; empty if there are none."""
    steps = [_compared_step(view) for view in runs]
    by_run = [_samples(view, step) for view, step in zip(runs, steps, strict=True)]
    common = [key for key in by_run[0] if all(key in each for each in by_run)]
    return _by_prompt(steps, [(*key, [sample_image(each[key], key[0]) for each in by_run]) for key in common])


def _compared_step(view: RunView) -> int | None:
    """The step whose samples are compared: the recommended one, else the last; None without samples."""
    steps, recommended = sampled_steps(view.record), judge.recommended_step(view)
    return recommended if recommended in steps else max(steps, default=None)


def _samples(view: RunView, step: int | None) -> dict[tuple[str, int], Sample]:
    return {} if step is None else {(each.prompt, each.seed): each for each in samples(view.record, step)}


def _by_prompt(steps: Sequence[int | None], rows: Sequence[tuple[str, int, Sequence[str]]]) -> Markup:
    """A row for each prompt and seed, with a cell for each run; `steps` are those of the runs. Empty without rows."""
    names = ["" if step is None else f", step {step}" if step else ", base model" for step in steps]
    heads = ["", *(f"{letter}{name}" for letter, name in zip(LETTERS, names, strict=False))]
    return parts.table(heads, [[f"{prompt} (seed {seed})", *cells] for prompt, seed, cells in rows]) if rows else Markup("")


def plots(runs: Sequence[RunView]) -> dict[str, Plot]:
    """The plots by title, with a line for each run; empty ones for classifiers."""
    columns = [_columns(view) for view in runs]
    last = max((step for column in columns for values in column.values() for step in values), default=1)
    lines = {title: [sorted(column.get(title, {}).items()) for column in columns] for title in PLOTS}
    return {title: Plot(title, dict(zip(LETTERS, of_runs, strict=False)), (0.0, float(last))) for title, of_runs in lines.items()}


def _columns(view: RunView) -> dict[str, dict[int, float]]:
    if view.task == "classify":
        return {}
    losses = series(view).get("loss", [])
    return judge.columns(view) | {"Training loss": dict(running_mean(losses, max(1, round(len(losses) * SMOOTHED))))}


def _accuracies(runs: Sequence[RunView]) -> list[list[str]]:
    """A row for each method and number of shots, with the test accuracy of each run."""
    by_run = [{(row.method, row.shots): in_percent(row.top1) for row in accuracies(view)} for view in runs]
    keys = sorted({key for each in by_run for key in each}, key=str)
    return [[f"{method_name(key[0])}, {key[1]} images per class", *(each.get(key, "") for each in by_run)] for key in keys]


def _differences(runs: Sequence[RunView]) -> list[list[str]]:
    """A row for each option that differs."""
    flat = [dict(_options(view.options or view.launch_options)) for view in runs]
    rows = [[name, *(_value(each.get(name)) for each in flat)] for name in dict.fromkeys(chain(*flat))]
    return [row for row in rows if len(set(row[1:])) > 1]


def _options(options: Mapping[str, Any]) -> Iterator[tuple[str, Any]]:
    for group, fields in options.items():
        for name, value in fields.items() if isinstance(fields, dict) else ():
            if name not in IGNORED_OPTIONS:
                yield f"{group}: {name}", value


def _value(value: Any) -> str:
    """An option for people; of a path on this machine, only the name."""
    text = Path(value).name if isinstance(value, str) and Path(value).is_absolute() else written(value) or "default"
    return text if len(text) <= LONGEST_VALUE else f"{text[: LONGEST_VALUE - 1]}…"


def generated_with_all(workspace: Workspace, runs: Sequence[RunView], prompt: str, seed: int) -> Iterator[Markup]:
    """Generate `prompt` with the adapter of each run from the same seed; yields the table so far.

    Raises: InputError if an adapter or the prompt cannot be used.
    """
    steps = [steps_of(view.record).chosen for view in runs]
    cells = [NO_ADAPTER if step is None else parts.note("generating") for step in steps]
    for index, (view, step) in enumerate(zip(runs, steps, strict=True)):
        if step is None:
            continue
        request = request_for(workspace, [(reference_of(view.id, step), 1.0, None)], prompt=prompt, seed=seed)
        for event in generated(workspace, request):
            if isinstance(event, Path):
                cells[index] = parts.image(thumbnail(event), prompt, "pixel")
            yield _by_prompt(steps, [(prompt, seed, cells)])
