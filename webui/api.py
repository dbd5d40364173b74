"""Named endpoints for programs: start, status, stop, list, generate, classify.

    from gradio_client import Client, handle_file
    client = Client("http://127.0.0.1:7860")
    run = client.predict("subject", {}, [handle_file("a.jpg"), handle_file("b.jpg")], api_name="/start")

No `from __future__ import annotations` here: Gradio reads the annotations for the schema of the endpoints.
"""

from pathlib import Path
from typing import Any, Literal

import gradio as gr
from gradio.processing_utils import save_file_to_cache
from gradio.utils import get_upload_folder

from pipelines.errors import InputError
from pipelines.subject.generation_request import GenerationRequest
from webui import launching, photo_uploads, uploads
from webui.context import AppContext, show_errors
from webui.datasets import Dataset
from webui.generation import reference_of, request_for, steps_of
from webui.inference_worker import WORKER
from webui.labelled_datasets import uploaded_classes
from webui.runs import RunView, views
from webui.workspace import Workspace

STATUS_FIELDS = ("phase", "step", "total", "seconds_left", "suggested_step")
MAX_FILES = 500


def build_api(context: AppContext) -> None:
    """Add the endpoints to the page that is being built."""
    for name, make in (("start", _start), ("status", _status_of), ("stop", _stop), ("list", _list_runs)):
        gr.api(show_errors(make(context)), api_name=name)
    # These run a model, so one call at a time is served and the others wait.
    for name, make in (("generate", _generate), ("classify", _classify)):
        gr.api(show_errors(make(context)), api_name=name, concurrency_limit=1, concurrency_id="device")


def _start(context: AppContext) -> Any:
    def start(
        task: Literal["subject", "classify"],
        options: dict,
        images: list[dict] | None = None,
        pictures: list[dict] | None = None,
        request: gr.Request = None,
    ) -> str:
        """Start a run. It waits in the queue while another run is active.

        Args:
            task: "subject" trains an adapter on one subject; "classify" trains a classifier.
            options: the values that differ from the defaults, by group and name, as in options.json of a run:
                {"data": {"instance_prompt": "a photo of sks dog"}, "optimisation": {"max_train_steps": 200}}.
            images: uploaded files, `[handle_file("a.jpg"), ...]`: photos of the subject, or one zip with a folder of images
                for each class; empty for the bundled example.
            pictures: deprecated; use images.
        Returns: the run's id.
        """
        workspace = context.settings.workspace(request)
        values = _with_images(workspace, task, _options(options), _files(_renamed(images, pictures, [])))
        return launching.start(workspace, task, values)

    return start


def _status_of(context: AppContext) -> Any:
    def status(run: str, request: gr.Request) -> dict:
        """The status of a run.

        Args:
            run: its id.
        Returns: {"run", "name", "task", "state", "phase", "step", "total", "seconds_left", "suggested_step", "reason", "steps",
            "actions"}; state is queued, starting, running, interrupted, stopped, failed or done; steps are those with a saved
            adapter.
        """
        return _status(RunView(context.settings.workspace(request).run(run)))

    return status


def _stop(context: AppContext) -> Any:
    def stop(run: str, request: gr.Request) -> str:
        """Stop a run. A queued run never starts; a training run saves a checkpoint first.

        Args:
            run: its id.
        Returns: the state of the run before.
        """
        workspace = context.settings.workspace(request)
        state = RunView(workspace.run(run)).state
        launching.stop(workspace, run)
        return state

    return stop


def _list_runs(context: AppContext) -> Any:
    def list_runs(request: gr.Request) -> list[dict]:
        """The status of all your runs, newest first."""
        return [_status(view) for view in views(context.settings.workspace(request))]

    return list_runs


def _generate(context: AppContext) -> Any:
    def generate(
        run: str,
        prompt: str,
        request: gr.Request,
        seed: int = 0,
        scale: float | None = None,
        step: int | None = None,
        negative_prompt: str = "",
        steps: int = 25,
        guidance: float = 4.0,
        strength: float | None = None,
    ) -> dict:
        """Generate an image with the adapter of a run.

        Args:
            run: its id.
            prompt: the prompt.
            seed: the same seed gives the same image.
            scale: the adapter's scale, 1 by default; 0 is the base model.
            step: the step of the adapter, one of "steps" of `status`; None for the recommended one.
            negative_prompt: what the image should not show.
            steps: denoising steps.
            guidance: guidance scale.
            strength: deprecated; use scale.
        Returns: the image, a PNG file that contains its settings.
        """
        workspace = context.settings.workspace(request)
        adapter = reference_of(run, _step(RunView(workspace.run(run)), step)), _renamed(scale, strength, 1.0), None
        given = {"prompt": prompt, "negative_prompt": negative_prompt, "seed": seed, "steps": steps, "guidance_scale": guidance}
        return _generated_file(workspace, request_for(workspace, [adapter], **given))

    return generate


def _renamed(value: Any, deprecated: Any, default: Any) -> Any:
    """The value of a parameter that also has a deprecated name."""
    return next((given for given in (value, deprecated) if given is not None), default)


def _generated_file(workspace: Workspace, request: GenerationRequest) -> dict:
    """The only image of a request, as Gradio serves it."""
    (path,) = (event for event in WORKER.stream("generate", workspace, request) if isinstance(event, Path))
    return gr.FileData(path=save_file_to_cache(path, get_upload_folder()), orig_name=path.name).model_dump()


def _step(view: RunView, step: Any) -> int:
    """The step whose adapter is used: `step`, or the recommended one for None.

    Raises: InputError if the run has no saved adapter.
    """
    chosen = steps_of(view.record).chosen if step is None else step
    if chosen is None or view.task != "subject":
        raise InputError("This run has no saved adapter yet. Wait until it has one, or choose another run.")
    return chosen


def _classify(context: AppContext) -> Any:
    def classify(
        run: str,
        images: list[dict] | None = None,
        pictures: list[dict] | None = None,
        request: gr.Request = None,
    ) -> list[dict]:
        """Classify images with the classifier of a run.

        Args:
            run: its id.
            images: uploaded files, `[handle_file("a.jpg"), ...]`.
            pictures: deprecated; use images.
        Returns: for each {"image", "class", "probability", "top": [[class, probability], ...]}, or {"image", "error"} for a
            file that cannot be read. "picture" is the old name of "image" and has the same value.
        """
        record = context.settings.workspace(request).run(run)
        if RunView(record).task != "classify":
            raise InputError("This run trained an adapter for generation. Choose a classifier.")
        rows = WORKER.call("classify", record, _files(_renamed(images, pictures, [])))
        return [{**row, "picture": row["image"]} for row in rows]

    return classify


def _status(view: RunView) -> dict[str, Any]:
    fields = {name: getattr(view.status, name) for name in STATUS_FIELDS}
    steps = [step for _, step in steps_of(view.record).choices] if view.task == "subject" else []
    summary = {"run": view.id, "name": view.name, "task": view.task, "state": view.state, "reason": view.reason}
    return {**summary, **fields, "steps": steps, "actions": list(view.actions)}


def _options(options: Any) -> dict[str, dict[str, Any]]:
    if not isinstance(options, dict) or not all(isinstance(fields, dict) for fields in options.values()):
        raise InputError('Options must be given by group and name, as in {"data": {"instance_prompt": "a photo of sks dog"}}.')
    return options


def _files(given: Any) -> list[Path]:
    """The paths of uploaded files.

    Raises: InputError for any other value, such as the path of another file on the server.
    """
    if not isinstance(given, list) or len(given) > MAX_FILES:
        raise InputError(f"Images must be a list of at most {MAX_FILES} uploaded files. Pass fewer images.")
    folder, files = Path(get_upload_folder()).resolve(), []
    for each in given:
        path = Path(str(each.get("path"))).resolve() if isinstance(each, dict) else None
        if path is None or not path.is_relative_to(folder) or not path.is_file():
            raise InputError("An image must be an uploaded file. Pass gradio_client.handle_file(path).")
        files.append(path)
    return files


def _with_images(
    workspace: Workspace, task: str, options: dict[str, dict[str, Any]], files: list[Path]
) -> dict[str, dict[str, Any]]:
    """The options, with a new dataset of the uploaded images if there are any.

    Raises: InputError if any image is refused, since a caller does not see which ones were skipped.
    """
    if not files:
        return options
    if task == "classify":
        return _with_classes(workspace, options, files)
    dataset = Dataset(workspace.new_image_set())
    added = photo_uploads.add_photos(dataset, files)
    if added.refused:
        raise InputError(added.refused[0])
    dataset.seal()
    return {**options, "data": {**options.get("data", {}), "instance_data_dir": str(dataset.folder.absolute())}}


def _with_classes(workspace: Workspace, options: dict[str, dict[str, Any]], files: list[Path]) -> dict[str, dict[str, Any]]:
    from webui import class_presets

    if len(files) != 1:
        raise InputError(f"Images for a classifier must be one zip with a folder per class, got {len(files)} files.")
    dataset = Dataset(workspace.new_image_set())
    added = uploads.add_zip(dataset, files[0])
    if added.refused:
        raise InputError(added.refused[0])
    classes = uploaded_classes(dataset)
    if not classes.is_ready:
        raise InputError(classes.warnings()[0])
    return class_presets.completed(classes, options, options)
