"""The results on the screen Use: the generated images, and the files of the adapter with what to do with them."""

from __future__ import annotations

import functools
import json
import tempfile
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import gradio as gr

from pipelines.built_in import is_built_in
from pipelines.errors import InputError
from pipelines.methods import DEFAULT, method_named
from pipelines.subject.generation_request import GenerationRequest
from pipelines.subject.usage import comfyui_workflow, python_code
from training.runs.naming import default_title
from webui import generation
from webui.context import QUIET, AppContext
from webui.generation import LAYOUTS, GeneratedImages, Layout
from webui.inference_worker import WORKER
from webui.render import CRISP_SIDE, in_cache, macros, parts
from webui.runs import RunView
from webui.workspace import Workspace

# With a delay, until the button has its new file and the card is on the page.
SAVE = """() => { setTimeout(() => {
  document.querySelector('#use-file').click();
  document.querySelector('#use-code')?.scrollIntoView({block: 'nearest', behavior: 'smooth'});
}, 200); }"""
# The format of the demo model's files, which those programs cannot use.
KOHYA = ("kohya's format", "A LoRA file in the format of kohya's scripts, for the demo model alone.")
ALL, FAVOURITES = "All images", "Favourites"
GALLERY_SIZE = 48
HINT = parts.note("Click an image to see its settings, vary it or delete it. Its file contains the settings.")
NO_IMAGES = parts.empty("No images yet", "Generated images appear here, newest first. They stay when you close the page.")
NO_FAVOURITES = parts.empty("No favourites yet", "Click an image and mark it as a favourite.")
LORA_LAYOUTS = ("diffusers", "kohya")
DEMO = (
    "This adapter was trained on the demo model, and its files fit the demo model alone. To use your subject in ComfyUI, A1111 "
    "or with SDXL in diffusers, train on SDXL."
)
use = macros("use.html")


class Gallery:
    """The user's generated images, and what can be done with the selected one."""

    def __init__(self, context: AppContext) -> None:
        self.context, self.selected = context, gr.State(None)
        self.filter = gr.Radio([ALL, FAVOURITES], value=ALL, show_label=False, container=False, elem_id="use-filter")
        looks = {"columns": 3, "object_fit": "contain", "height": "auto", "format": "png", "buttons": ["download", "fullscreen"]}
        self.gallery = gr.Gallery(show_label=False, elem_id="use-gallery", **looks)
        self.details = gr.HTML(elem_id="use-details")
        with gr.Row(visible=False, elem_classes="buttons", elem_id="use-selected") as self.actions:
            self.again = gr.Button("Reuse these settings", size="sm", min_width=150, elem_id="use-again")
            self.vary = gr.Button("Variations", size="sm", min_width=90, elem_id="use-vary")
            self.favourite = gr.Button("Favourite", size="sm", min_width=90, elem_id="use-favourite")
            self.delete = gr.Button("Delete", size="sm", min_width=90, elem_id="use-delete")
        self.outputs = [self.gallery, self.details]
        changed = [*self.outputs, self.actions, self.favourite]
        gr.on([context.page.load, self.filter.input], self._show, self.filter, self.outputs, trigger_mode="always_last", **QUIET)
        self.gallery.select(self._select, None, [self.selected, *changed[1:]], **QUIET)
        gr.on([self.favourite.click, self.delete.click], self._change, [self.selected, self.filter], changed, **QUIET)

    def newest(self, workspace: Workspace, only_favourites: bool) -> dict[Any, Any]:
        """The gallery with the user's newest images and their settings as captions, and the hint below it."""
        images = GeneratedImages.of(workspace).newest(only_favourites)[:GALLERY_SIZE]
        items = [_item(path, path.stat().st_mtime_ns, generation.is_favourite(path)) for path in images]
        if any(not Path(cached).exists() for cached, *_ in items):
            _item.cache_clear()
            return self.newest(workspace, only_favourites)
        value = [(cached, caption) for cached, caption, _ in items]
        classes = ["captioned", *["pixel"] * all(side <= CRISP_SIDE for *_, side in items)]
        gallery = gr.Gallery(value=value, visible=bool(items), elem_classes=classes, selected_index=None)
        return {self.gallery: gallery, self.details: HINT if items else NO_FAVOURITES if only_favourites else NO_IMAGES}

    def _show(self, which: str, request: gr.Request) -> dict[Any, Any]:
        return self.newest(self.context.settings.workspace(request), which == FAVOURITES)

    def _select(self, event: gr.SelectData, request: gr.Request) -> dict[Any, Any]:
        images = GeneratedImages.of(self.context.settings.workspace(request))
        path = images.find(Path(str(event.value["image"]["path"])).name)
        return {self.selected: path.name, self.details: use.details(generation.settings_of(path)[0]), **self._actions(path)}

    def _change(self, event: gr.EventData, name: str, which: str, request: gr.Request) -> dict[Any, Any]:
        """Delete the selected image, or mark it as a favourite or no longer."""
        workspace = self.context.settings.workspace(request)
        path = GeneratedImages.of(workspace).find(name)
        (generation.delete_image if event.target._id == self.delete._id else generation.toggle_favourite)(path)
        return {**self.newest(workspace, which == FAVOURITES), **self._actions(path)}

    def _actions(self, path: Path) -> dict[Any, Any]:
        """The buttons for the selected image, hidden if it was deleted."""
        label = "Not a favourite" if generation.is_favourite(path) else "Favourite"
        return {self.actions: gr.Row(visible=path.exists()), self.favourite: gr.Button(label)}


@functools.lru_cache(maxsize=4096)
def _item(path: Path, changed: int, favourite: bool) -> tuple[str, str, int]:
    """The cached copy of an image, its settings in one line, and its width in pixels."""
    settings, side = generation.settings_of(path)
    used = " + ".join(f"{each['name']} x {each['scale']:g}" for each in settings["adapters"]) or "base model"
    return in_cache(path), f"{'★ ' * favourite}{settings['prompt']}; {used}; seed {settings['seed']}", side


class Files:
    """The downloads of the adapter, and the card of the last one."""

    def __init__(self, context: AppContext) -> None:
        self.context = context
        gr.Markdown("### Download\nThe adapter at the selected step, or all chosen adapters merged, each at its weight.")
        self.formats = gr.HTML(elem_id="use-formats")
        self.layout = gr.Radio([(name, layout) for layout, (name, _) in LAYOUTS.items()], label="Format", elem_id="use-layout")
        with gr.Row(elem_classes="buttons"):
            self.download = gr.Button("Download", variant="primary", scale=0, min_width=160, elem_id="use-download")
            self.merge = gr.Button("Merge and download", scale=0, min_width=240, elem_id="use-merge")
        self.file = gr.DownloadButton("Download", elem_id="use-file", elem_classes=["unseen"])
        self.card = gr.HTML(visible=False, elem_id="use-card")
        self.workflow = gr.DownloadButton("Download the ComfyUI workflow", size="sm", visible=False, elem_id="use-workflow")
        self.code = gr.Code(language="python", label="Python", interactive=False, visible=False, elem_id="use-code")
        self.outputs = [self.formats, self.layout, self.card, self.workflow, self.code]

    def updates(self, view: RunView) -> dict[Any, Any]:
        """The formats that a run's adapters have, and the size and the use of each."""
        layouts = generation.layouts_of(view.record)
        names = {layout: KOHYA if layout == "kohya" and _is_demo(view) else LAYOUTS[layout] for layout in layouts}
        rows = [(*names[layout], size) for layout, size in layouts.items()]
        default = next((layout for layout in ("kohya", "full") if layout in layouts), None)
        choices = [(name, layout) for layout, (name, _) in names.items()]
        return {
            self.formats: use.formats(rows, warnings_of(view)),
            self.layout: gr.Radio(choices=choices, value=default),
            **{each: type(each)(visible=False) for each in (self.card, self.workflow, self.code)},
        }

    def wire(self, inputs: set[Any], request_of: Callable[[Workspace, Mapping[Any, Any], str], GenerationRequest]) -> None:
        """Create a file when a button is pressed, show what to do with it, and let the browser download it.

        Args:
            inputs: the components whose values `request_of` makes a request of, with a prompt for an empty field.
        """
        self.request_of = request_of
        triggers, outputs = [self.download.click, self.merge.click], [self.file, self.card, self.workflow, self.code]
        on_device = {"concurrency_limit": 1, "concurrency_id": "files", "api_visibility": "private"}
        created = gr.on(triggers, self._save, {self.layout, *inputs}, outputs, show_progress_on=[self.download], **on_device)
        created.success(None, js=SAVE, api_visibility="private")

    def _save(self, given: dict[Any, Any], event: gr.EventData, request: gr.Request) -> list[Any]:
        workspace, is_merged = self.context.settings.workspace(request), event.target._id == self.merge._id
        view, step, layout = RunView(workspace.run(given[self.context.run])), given[self.context.step], given[self.layout]
        wanted = self.request_of(workspace, given, view.prompt)
        stem = f"{view.file_stem(step)}{'-merged' * is_merged}"
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder) / file_name(stem, layout)
            if not is_merged:
                WORKER.call("adapter_file", workspace, wanted.adapters[0], layout, path)
            elif layout in LORA_LAYOUTS:
                WORKER.call("merge", wanted, path, layout)
            else:
                names = " or ".join(repr(LAYOUTS[each][0]) for each in LORA_LAYOUTS)
                raise InputError(f"Merged adapters are a LoRA file, got the format {LAYOUTS[layout][0]!r}. Choose {names}.")
            used = wanted.adapters[0].model_copy(update={"scale": 1.0} if is_merged else {})
            card = _card(view, wanted.model_copy(update={"adapters": (used,)}), layout, path)
            return [gr.DownloadButton(value=in_cache(path)), *card]


def _card(view: RunView, wanted: GenerationRequest, layout: Layout, path: Path) -> list[Any]:
    """Updates of the card, the workflow and the code for a downloaded file."""
    is_demo, is_native = _is_demo(view), layout not in LORA_LAYOUTS
    card = use.card(path.name, layout, default_title(view.options, view.task), f"{wanted.adapters[0].scale:g}", is_demo)
    workflow = gr.DownloadButton(visible=False)
    if layout == "kohya" and not is_demo:
        saved = path.with_name(f"{path.stem}-comfyui.json")
        saved.write_text(json.dumps(comfyui_workflow(wanted, path.name), indent=2), encoding="utf-8")
        workflow = gr.DownloadButton(value=in_cache(saved), visible=True)
    code = python_code(wanted, path.stem if is_native else path.name, is_native)
    return [gr.HTML(card, visible=True), workflow, gr.Code(code, visible=True)]


def _is_demo(view: RunView) -> bool:
    return is_built_in(str(view.chosen("model", "pretrained_model_name_or_path")))


def warnings_of(view: RunView) -> list[str]:
    """What a user must know of a run's adapter: what its files fit, how exact they are, and what its weight does."""
    method, share = method_named(view.chosen("adapter", "method") or DEFAULT), view.status.expected_left_out
    approximate = f"LoRA files of this adapter are an approximation: about {share or 0:.0%} of the weight change was left out."
    notes = [DEMO if _is_demo(view) else None, approximate if share else None, method.export_note, method.scale_note]
    return [" ".join(note.split()) for note in notes if note is not None]


def file_name(stem: str, layout: Layout) -> str:
    """The name of a downloaded file: that of a LoRA file, or of a zip with a folder of the same name."""
    return {"kohya": f"{stem}.safetensors", "diffusers": f"{stem}-diffusers.safetensors"}.get(layout, f"{stem}-{layout}.zip")
