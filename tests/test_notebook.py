"""The notebook in examples/ runs from its first cell to its last on the built-in models."""

import base64
import io

import nbformat
import pytest
from documented import ROOT
from nbclient import NotebookClient
from PIL import Image

from pipelines.built_in import import_path
from training.options import parse_options

NOTEBOOK = ROOT / "examples" / "nora_vision.ipynb"
# Assigned after the notebook's own parameters.
FEWER_STEPS = """
STEPS = SHOTS = INFERENCE_STEPS = 2
FEWSHOT_FLAGS = "--test_share 0.03 --min_train_steps 1 --iterations_per_shot 1 --report_to none"
TRAIN_FLAGS = (
    "--rank 4 --inner_r 2 --lr_warmup_steps 0 --validation_steps 2 --heldout_image none --num_candidate_images 0 --no_certify "
    "--report_to none --validation_prompt 'a photo of sks toy'"
)
"""
# Its commands run in the notebook's process: to import the libraries in three processes takes long.
IN_THIS_PROCESS = """
import shlex, sys
from accelerate.state import AcceleratorState
import nora_vision_cli

def run(command):
    AcceleratorState._reset_state(reset_partial_state=True)
    main = sys.modules["__main__"]
    program, *words = shlex.split(get_ipython().var_expand(command))
    assert program == "nora-vision" and not nora_vision_cli.main(words)
    sys.modules["__main__"] = main

get_ipython().system = run
"""


@pytest.fixture
def notebook():
    return nbformat.read(NOTEBOOK, as_version=4)


def cell_tagged(notebook, tag):
    (cell,) = (cell for cell in notebook.cells if tag in cell.metadata.get("tags", ()))
    return cell


def images_in(cell):
    """The images that a cell displays."""
    data = [output.data["image/png"] for output in cell.outputs if "image/png" in output.get("data", ())]
    return [Image.open(io.BytesIO(base64.b64decode(image))) for image in data]


def test_the_notebook_is_stored_without_outputs(notebook):
    nbformat.validate(notebook)
    code = [cell for cell in notebook.cells if cell.cell_type == "code"]
    assert code
    assert [cell.source for cell in code if cell.outputs or cell.execution_count is not None] == []


@pytest.mark.parametrize("use_sdxl", [False, True])
def test_the_trainer_accepts_the_flags_of_the_notebook(notebook, use_sdxl):
    parameters = cell_tagged(notebook, "parameters").source.replace("USE_SDXL = False", f"USE_SDXL = {use_sdxl}")
    variables = {}
    exec(f"{parameters}\n{cell_tagged(notebook, 'flags').source}", variables)
    options = parse_options(variables["shlex"].split(variables["flags"]))
    assert options.data.instance_prompt == variables["PROMPT"]
    assert options.optimisation.max_train_steps == variables["STEPS"]
    assert options.model.pretrained_model_name_or_path.startswith("stabilityai/" if use_sdxl else "mini-sdxl")


@pytest.mark.slow(25)
def test_the_notebook_trains_loads_and_classifies(notebook, tmp_path, monkeypatch):
    parameters = cell_tagged(notebook, "parameters")
    parameters.source += FEWER_STEPS + IN_THIS_PROCESS
    for name, value in import_path().items():
        monkeypatch.setenv(name, value)
    NotebookClient(notebook, timeout=300, resources={"metadata": {"path": tmp_path}}).execute()

    shown = [image for cell in notebook.cells if cell.cell_type == "code" for image in images_in(cell)]
    before_after, generated, confusion, digit = shown
    assert min(before_after.size) > 64
    assert generated.size == (3 * 192, 192)
    panels = [generated.crop((192 * index, 0, 192 * index + 192, 192)).tobytes() for index in range(3)]
    assert len({*panels}) == 3
    assert min(confusion.size) > 64
    assert digit.size == (64, 64)
    assert (tmp_path / "runs" / "subject" / "kohya").is_dir()
