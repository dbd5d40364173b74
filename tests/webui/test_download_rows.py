"""The download rows of Use."""

from run_folders import run_in

from webui.runs import RunView
from webui.screens.use_files import _of_layout


def test_only_lora_files_of_a_method_that_is_no_lora_are_called_approximations(tmp_path):
    exact = RunView(run_in(tmp_path / "exact", "done"))
    truncated = RunView(run_in(tmp_path / "truncated", "done", expected_left_out=0.64))
    for layout in ("compact", "full", "diffusers", "kohya"):
        assert "approximation" not in _of_layout(layout, 1, exact)
        is_lora = layout in ("diffusers", "kohya")
        assert ("about 64% of the weight change" in _of_layout(layout, 1, truncated)) == is_lora
