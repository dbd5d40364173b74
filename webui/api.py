"""What the page does, as named endpoints for programs: start, status, stop, list, generate, classify.

    from gradio_client import Client, handle_file
    client = Client("http://127.0.0.1:7860")
    run = client.predict("subject", {}, [handle_file("a.jpg"), handle_file("b.jpg")], api_name="/start")

Annotations are not put off here: gradio reads them to tell what an endpoint takes and gives.
"""

from collections.abc import Iterable
from pathlib import Path
from typing import Any, Literal

import gradio as gr
from gradio.processing_utils import save_file_to_cache
from gradio.utils import get_upload_folder

from pipelines.errors import InputError
from webui import launching, photo_uploads, uploads
from webui.adapters import steps_of
from webui.app_context import AppContext
from webui.errors import in_plain_words
from webui.generation_requests import GUIDANCE, STEPS, GenerationRequest, integer, number
from webui.views import RunView, views
from webui.workspace import Workspace

STATUS_FIELDS = ("phase", "step", "total", "seconds_left", "suggested_step")
MAX_FILES = 500


def build_api(context: AppContext) -> None:
    """Add the endpoints to the page that is being built."""
    on_device: dict[str, Any] = {"concurrency_limit": 1, "concurrency_id": "device"}
    for name, function in _of_runs(context).items():
        gr.api(in_plain_words(function), api_name=name)
    # They compute with a model: one at a time, the others wait.
    for name, function in (("generate", _generate(context)), ("classify", _classify(context))):
        gr.api(in_plain_words(function), api_name=name, **on_device)


def _of_runs(context: AppContext) -> dict[str, Any]:
    """The endpoints that only look at runs, or start and stop them."""

    def start(task: Literal["subject", "classify"], options: dict, images: list[dict], request: gr.Request) -> str:
        """Start a run; it waits for its turn where another one is at work.

        Args:
            task: "subject" learns to draw one subject; "classify" learns to tell classes of images apart.
            options: what differs from the defaults, by group and name, as in options.json of a run:
                {"data": {"instance_prompt": "a photo of sks dog"}, "optimisation": {"max_train_steps": 200}}.
            images: uploaded files, `[handle_file("a.jpg"), ...]`: photos of the subject, or one zip with a folder of images
                for each class; empty for the bundled example.
        Returns: the run's id.
        """
        workspace = context.settings.workspace(request)
        values = _with_images(workspace, task, _options(options), _files(images))
        return launching.start(workspace, task, values)

    def status(run: str, request: gr.Request) -> dict:
        """How a run is going.

        Args:
            run: its id.
        Returns: {"run", "name", "task", "state", "phase", "step", "total", "seconds_left", "suggested_step", "reason", "steps",
            "actions"}; state is queued, starting, running, interrupted, stopped, failed or done; steps are those whose adapters
            can be drawn with.
        """
        return _status(RunView(context.settings.workspace(request).run(run)))

    def stop(run: str, request: gr.Request) -> str:
        """Stop a run: a queued one never starts, one that trains saves what it has first.

        Args:
            run: its id.
        Returns: the state it was in.
        """
        workspace = context.settings.workspace(request)
        state = RunView(workspace.run(run)).state
        launching.stop(workspace, run)
        return state

    def list_runs(request: gr.Request) -> list[dict]:
        """All your runs, newest first, each as `status` tells it."""
        return [_status(view) for view in views(context.settings.workspace(request))]

    return {"start": start, "status": status, "stop": stop, "list": list_runs}


def _generate(context: AppContext) -> Any:
    def generate(
        run: str,
        prompt: str,
        request: gr.Request,
        seed: int = 0,
        strength: float = 1.0,
        step: int | None = None,
        negative_prompt: str = "",
        steps: int = STEPS,
        guidance: float = GUIDANCE,
    ) -> dict:
        """Draw an image with the adapter of a run.

        Args:
            run: its id.
            prompt: what to draw.
            seed: the same one draws the same image.
            strength: of the adapter; 0 is the base model.
            step: which of its adapters, one of "steps" of `status`; None for the suggested one.
            negative_prompt: what to keep away from.
            steps: denoising steps.
            guidance: how closely to follow the prompt.
        Returns: the image, a PNG file with all settings inside.
        """
        from webui.work import drawing

        workspace = context.settings.workspace(request)
        chosen = _step(RunView(workspace.run(run)), step)
        _check_texts(prompt, negative_prompt)
        generation_request = GenerationRequest(
            run_id=run,
            step=chosen,
            strength=number("strength", strength),
            prompt=prompt,
            negative_prompt=negative_prompt,
            seed=integer("seed", seed),
            steps=integer("steps", steps),
            guidance=number("guidance", guidance),
        )
        return _drawn_file(drawing.draw(workspace, generation_request))

    return generate


def _check_texts(*texts: Any) -> None:
    if not all(isinstance(text, str) for text in texts):
        raise InputError("The prompt must be a text. Write what the image is to show.")


def _drawn_file(events: Iterable[Any]) -> dict:
    """The one image that is drawn, as gradio serves it."""
    (path,) = (event for event in events if isinstance(event, Path))
    return gr.FileData(path=save_file_to_cache(path, get_upload_folder()), orig_name=path.name).model_dump()


def _step(view: RunView, step: Any) -> int:
    """The step to draw with: the one given, else the suggested one.

    Raises: InputError if the run has no adapter to draw with.
    """
    chosen = steps_of(view.record).chosen if step is None else integer("step", step)
    if chosen is None or view.task != "subject":
        raise InputError("This run has no adapter yet. Wait until it has kept one, or choose another run.")
    return chosen


def _classify(context: AppContext) -> Any:
    def classify(run: str, images: list[dict], request: gr.Request) -> list[dict]:
        """Tell what images show, with the classifier of a run.

        Args:
            run: its id.
            images: uploaded files, `[handle_file("a.jpg"), ...]`.
        Returns: for each {"picture", "class", "probability", "top": [[class, probability], ...]}, or {"picture", "error"} for
            one that cannot be read.
        """
        from webui.work import classify as classifying

        record = context.settings.workspace(request).run(run)
        if RunView(record).task != "classify":
            raise InputError("This run learned to draw, not to tell images apart. Choose a classifier.")
        return classifying.classify(record, _files(images))

    return classify


def _status(view: RunView) -> dict[str, Any]:
    fields = {name: view.status.get(name) for name in STATUS_FIELDS}
    steps = [step for _, step in steps_of(view.record).choices] if view.task == "subject" else []
    summary = {"run": view.id, "name": view.name, "task": view.task, "state": view.state, "reason": view.reason}
    return {**summary, **fields, "steps": steps, "actions": list(view.actions)}


def _options(options: Any) -> dict[str, dict[str, Any]]:
    if not isinstance(options, dict) or not all(isinstance(fields, dict) for fields in options.values()):
        raise InputError(
            'The options must be given by group and name, as in {"data": {"instance_prompt": "a photo of sks dog"}}.'
        )
    return options


def _files(given: Any) -> list[Path]:
    """The uploaded files that a client named; gradio has checked them too.

    Raises: InputError for anything else, such as a path on the server.
    """
    if not isinstance(given, list) or len(given) > MAX_FILES:
        raise InputError(f"The images must be a list of at most {MAX_FILES} uploaded files.")
    folder, files = Path(get_upload_folder()).resolve(), []
    for each in given:
        path = Path(str(each.get("path"))).resolve() if isinstance(each, dict) else None
        if path is None or not path.is_relative_to(folder) or not path.is_file():
            raise InputError("An image must be an uploaded file: give handle_file(path) of gradio_client.")
        files.append(path)
    return files


def _with_images(
    workspace: Workspace, task: str, options: dict[str, dict[str, Any]], files: list[Path]
) -> dict[str, dict[str, Any]]:
    """The options, about a new set of the uploaded images if there are any.

    Raises: InputError if any of them cannot be used; an API's caller does not see which were left out.
    """
    if not files:
        return options
    if task == "classify":
        return _with_classes(workspace, options, files)
    folder = workspace.new_image_set()
    added = photo_uploads.add_photos(folder, files)
    if added.refused:
        raise InputError(added.refused[0])
    from webui.image_dataset import SubjectDataset

    SubjectDataset(folder).seal()
    return {**options, "data": {**options.get("data", {}), "instance_data_dir": str(folder.absolute())}}


def _with_classes(workspace: Workspace, options: dict[str, dict[str, Any]], files: list[Path]) -> dict[str, dict[str, Any]]:
    from webui import class_presets, class_sets

    if len(files) != 1:
        raise InputError(f"Classes must be one zip with a folder of images for each class, got {len(files)} files.")
    folder = workspace.new_image_set()
    added = uploads.add_zip(folder, files[0])
    if added.refused:
        raise InputError(added.refused[0])
    classes = class_sets.find(workspace, folder.name)
    if not class_sets.is_ready(classes):
        raise InputError(class_sets.warnings(classes)[0])
    class_sets.update_split_after_upload(folder, added)
    return class_presets.completed(classes, options, options)
