"""The page with an adapter that is no change of weights: it has no files for other programs."""

import pytest
from small_runs import small_run

from pipelines.errors import InputError
from webui.generation import find_adapter, layouts_of, request_for
from webui.inference_worker import WORKER
from webui.workspace import Workspace


@pytest.fixture(scope="module")
def workspace(tiny_model, tmp_path_factory):
    folder = tmp_path_factory.mktemp("workspace")
    small_run(folder / "runs", tiny_model, "mixture", "nora", num_subspaces=2)
    return Workspace(folder / "runs", folder / "sets", is_local=True)


def test_only_the_native_layouts_are_offered(workspace):
    assert layouts_of(workspace.run("mixture")).keys() == {"compact", "full"}


@pytest.mark.parametrize("step", [2, 4])
def test_a_file_for_another_program_is_refused_with_the_one_to_take(workspace, tmp_path, step):
    adapter = find_adapter(workspace, f"mixture@{step}")
    with pytest.raises(InputError, match=r"no file 'For diffusers'\. Download 'Full'"):
        WORKER.call("adapter_file", workspace, adapter, "diffusers", tmp_path / "a.safetensors")
    assert WORKER.call("adapter_file", workspace, adapter, "full", tmp_path / "a.zip").stat().st_size > 0


def test_it_cannot_be_merged_with_others(workspace, tmp_path):
    request = request_for(workspace, [("mixture@4", 1.0, None)], prompt="a star")
    with pytest.raises(InputError, match=r"cannot be merged into one file: .*is adapted by a mixture of subspaces"):
        WORKER.call("merge", request, tmp_path / "a.safetensors", "kohya")
