"""The API through a real server: start, follow, stop and list runs, generate and classify images.

The runs have a stand-in trainer; the adapter for generation is written by the test.
"""

import zipfile
from pathlib import Path

import pytest
from class_folders import COLOURS, colour_folder, coloured
from gradio_client import Client, handle_file
from gradio_client.exceptions import AppError
from PIL import Image
from processes import wait_for
from small_runs import small_run, untrained_classifier
from stand_in_trainer import BEGAN, TOTAL, UNTIL

from pipelines.images import read_settings
from webui.workspace import Workspace

ENDPOINTS = {"/start", "/status", "/stop", "/list", "/generate", "/classify"}
CLASSIFY = {"data": {"shots": ["2"], "templates": ["a photo of a {}"]}, "method": {"method": ["linear_probe"]}}


def quick(model):
    """Options of a subject run of four steps."""
    return {
        "model": {"pretrained_model_name_or_path": str(model)},
        "data": {"instance_prompt": "a star", "heldout_image": "none"},
        "adapter": {"rank": 4, "inner_r": 2},
        "optimisation": {"max_train_steps": 4},
        "output": {"validation_prompt": ["a star"], "validation_steps": 4, "report_to": "none"},
        "validation": {"certify": False},
    }


@pytest.fixture(scope="module")
def server(app_server):
    return app_server(script="tests/webui/stand_in_app.py")


@pytest.fixture(scope="module")
def client(server, tmp_path_factory):
    return Client(server.url, verbose=False, download_files=str(tmp_path_factory.mktemp("downloads")))


@pytest.fixture(scope="module")
def zipped(tmp_path_factory):
    """A zip with a folder of eight images for each of three colours."""
    path = tmp_path_factory.mktemp("zip") / "colours.zip"
    with zipfile.ZipFile(path, "w") as packed:
        for name in COLOURS:
            for place in range(8):
                packed.writestr(f"{name}/{place}.png", coloured(name, place))
    return path


@pytest.fixture(scope="module")
def started(client, tiny_model, images_dir, zipped):
    """Three runs: an adapter for generation, a classifier, and a queued run."""
    photos = [handle_file(path) for path in sorted(images_dir.iterdir())]
    subject = client.predict("subject", quick(tiny_model), photos, api_name="/start")
    classes = client.predict("classify", CLASSIFY, [handle_file(zipped)], api_name="/start")
    waiting = client.predict("subject", quick(tiny_model), [], api_name="/start")
    return subject, classes, waiting


@pytest.fixture(scope="module")
def drawer(server, tiny_model):
    """A finished run with an adapter for generation."""
    return small_run(server.runs, tiny_model, "20260101-000001-drawer").path.name


@pytest.fixture(scope="module")
def classifier(server, tmp_path_factory):
    """A finished run whose classifier is the built-in model without training."""
    workspace = Workspace(server.runs, server.uploads, is_local=True)
    images = colour_folder(tmp_path_factory.mktemp("pictures"), 4)
    return untrained_classifier(workspace, images, {name: name for name in COLOURS}).path.name


@pytest.fixture(scope="module")
def stopped(client, started):
    """The state of the third run before it was stopped in the queue, and its status once it has ended."""
    before = client.predict(started[2], api_name="/stop")
    return before, wait_for(lambda: has_ended(client, started[2]))


def has_ended(client, run):
    """The status of the run when it has ended; None before."""
    status = client.predict(run, api_name="/status")
    return None if status["state"] in ("queued", "starting", "running") else status


def began(run):
    """The arguments of the stand-in in a run's directory; None before it starts."""
    return (run / BEGAN).read_text() if (run / BEGAN).exists() else None


def refused(client, match, *values, **named):
    with pytest.raises(AppError, match=match):
        client.predict(*values, **named)


def test_only_the_named_endpoints_can_be_called(client):
    api = client.view_api(return_format="dict", print_info=False)
    assert set(api["named_endpoints"]) == ENDPOINTS
    assert not api["unnamed_endpoints"]
    assert [each["parameter_name"] for each in api["named_endpoints"]["/generate"]["parameters"]][:3] == ["run", "prompt", "seed"]


def test_a_queued_run_is_stopped_before_it_starts(stopped, server, started):
    before, told = stopped
    assert before in ("queued", "starting")
    assert (told["state"], told["step"]) == ("stopped", None)
    assert not (server.runs / started[2] / "options.json").exists()


def test_a_run_is_followed_to_its_end(client, server, started, stopped):
    run = server.runs / started[0]
    assert client.predict(started[0], api_name="/status")["state"] in ("starting", "running")
    (run / UNTIL).write_text(str(TOTAL))
    told = wait_for(lambda: has_ended(client, started[0]))
    assert (told["state"], told["step"], told["total"], told["steps"][-1]) == ("done", TOTAL, TOTAL, TOTAL), told
    words = (run / BEGAN).read_text().split()
    assert words[words.index("--max_train_steps") + 1] == "4"
    assert len(list(Path(words[words.index("--instance_data_dir") + 1]).glob("*.png"))) == 3


def test_a_classifier_is_started_with_the_uploaded_zip(client, server, started, stopped):
    (server.runs / started[0] / UNTIL).write_text(str(TOTAL))
    words = wait_for(lambda: began(server.runs / started[1])).split()
    folders = [path for path in Path(words[words.index("--data_dir") + 1]).iterdir() if path.is_dir()]
    assert [len(list(folder.glob("*.png"))) for folder in folders] == [8, 8, 8]


def test_images_are_generated_with_a_run(client, drawer):
    settings = {"seed": 3, "scale": 0.5, "step": 4, "steps": 2, "negative_prompt": "fog"}
    first, again = (client.predict(drawer, "a star at night", **settings, api_name="/generate") for _ in range(2))
    assert Image.open(first).size == (16, 16)
    assert Image.open(first).tobytes() == Image.open(again).tobytes()
    said = read_settings(Path(first))
    given = (said["prompt"], said["seed"], said["num_inference_steps"], said["negative_prompt"])
    assert given == ("a star at night", 3, 2, "fog")
    assert [(each["reference"], each["scale"]) for each in said["adapters"]] == [(f"{drawer}@4", 0.5)]


def test_images_are_classified_with_a_run(client, classifier, tmp_path):
    images = [tmp_path / "unseen.png", tmp_path / "broken.png"]
    images[0].write_bytes(coloured("sea", 99))
    images[1].write_bytes(b"no image")
    good, bad = client.predict(classifier, [handle_file(path) for path in images], api_name="/classify")
    assert good["class"] in COLOURS
    assert sum(share for _, share in good["top"]) == pytest.approx(1, abs=1e-3)
    assert "broken.png" in bad["error"]
    assert good["image"] == "unseen.png"


def test_a_size_and_a_sampler_can_be_chosen(client, drawer):
    path = client.predict(drawer, "a star", steps=2, size=[64, 72], sampler="DDIM", api_name="/generate")
    assert Image.open(path).size == (64, 72)
    assert read_settings(Path(path))["sampler"] == "DDIM"
    refused(client, "Sampler must be one of Euler", drawer, "a star", sampler="Magic", api_name="/generate")
    refused(client, "multiples of 8", drawer, "a star", size=[3, 5], api_name="/generate")


def test_all_runs_are_listed_newest_first(client, started):
    listed = client.predict(api_name="/list")
    assert [each["run"] for each in listed if each["run"] in started] == list(reversed(started))
    assert {each["task"] for each in listed} == {"subject", "classify"}


@pytest.mark.parametrize("run", ["../runs", "/etc", "..", "nobody", "a/b", ".", "", "x" * 300])
def test_no_run_id_leads_out_of_the_workspace(client, run):
    for name, more in (("/status", ()), ("/stop", ()), ("/generate", ("a star",)), ("/classify", ([],))):
        refused(client, "This run does not exist. Choose one from the list", run, *more, api_name=name)


def test_an_invalid_request_is_refused_with_a_message(client, started, tiny_model):
    run = started[0]
    refused(client, "optimisation.* has no option 'steps'", "subject", {"optimisation": {"steps": 1}}, [], api_name="/start")
    refused(client, "by group and name", "subject", {"data": 3}, [], api_name="/start")
    refused(client, "[Tt]ask must be one of", "paint", {}, [], api_name="/start")
    refused(client, "must be an uploaded file", "subject", {}, [{"path": "/etc/passwd"}], api_name="/start")
    refused(client, "must be an uploaded file", "subject", {}, ["/etc/passwd"], api_name="/start")
    refused(client, "one zip with a folder", "classify", {}, [handle_file(__file__)] * 2, api_name="/start")
    refused(client, "trained an adapter for generation", run, [], api_name="/classify")


def test_an_invalid_generation_request_is_refused_with_a_message(client, started, stopped, drawer):
    run = drawer
    refused(client, "prompt is empty", run, " ", api_name="/generate")
    refused(client, "Seed must be in \\[0", run, "a star", seed=-1, api_name="/generate")
    refused(client, "Adapter weight must be a number", run, "a star", scale="much", api_name="/generate")
    refused(client, "no longer exists", run, "a star", step=999, api_name="/generate")
    refused(client, "Steps must be in \\[1, 150", run, "a star", steps=100000, api_name="/generate")
    refused(client, "no saved adapter", started[2], "a star", api_name="/generate")
