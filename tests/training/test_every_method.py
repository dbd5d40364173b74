"""Both recipes train every adapter method, and each method's equation has a test."""

import json
from pathlib import Path

import pytest
import torch
from accelerate.state import AcceleratorState
from image_sets import class_files, write_files
from subject_runs import are_equal, parameters
from tiny_options import TINY, full_precision_methods

from pipelines.adapter_options import AdapterOptions
from pipelines.methods import method_named, method_names
from pipelines.peft_method import PeftMethod
from training import fewshot_nora
from training.options.fewshot import parse_fewshot_options

SMALL = [word for name, value in {"rank": 4, "inner_r": 2, **TINY}.items() for word in (f"--{name}", str(value))]
STEPS = "--max_train_steps 2 --checkpointing_steps 1 --lr_warmup_steps 0 --train_text_encoder"
FEWSHOT = "--shots 1 --seeds 0 --min_train_steps 2 --iterations_per_shot 1 --train_batch_size 2 --views 1 --report_to none"

# Tuners of PEFT have one test, which looks for the equation by the method's name.
EQUATIONS = {
    "adalora": "pipelines/test_adalora.py::test_a_layer_adds_s_B_e_A_x_and_scales_it_as_diffusers_does",
    "clip_svd": "pipelines/test_lora_starts.py::test_clip_svd_changes_the_singular_values_of_the_weight_and_nothing_else",
    "corda": "pipelines/test_lora_starts.py::test_corda_decomposes_the_weight_times_the_covariance_of_its_inputs",
    "dora": "pipelines/test_dora.py::test_the_output_is_that_of_the_equation",
    "dylora": "pipelines/test_dylora.py::"
    "test_within_a_step_all_layers_compute_alpha_over_b_times_the_product_of_the_first_b_components_and_all_after_it",
    "eva": "pipelines/test_lora_starts.py::test_eva_starts_from_the_singular_vectors_of_the_activations_and_a_zero_b",
    "loftq": "pipelines/test_quantization.py::test_loftq_starts_at_the_best_approximation_of_the_residual",
    "lora": "training/test_method_options.py::test_lora_adds_alpha_over_the_rank_or_its_root_times_b_a_in_a_layer_and_exports",
    "lora_ga": "pipelines/test_lora_starts.py::test_lora_ga_starts_from_singular_vectors_of_the_gradient",
    "lora_one": "pipelines/test_lora_one.py::test_the_initial_change_is_the_best_approximation_of_the_negative_gradient",
    "lora_xs": "pipelines/test_lora_starts.py::test_lora_xs_trains_one_square_matrix_between_the_singular_vectors",
    "milora": "pipelines/test_lora_starts.py::test_the_start_is_a_part_of_the_singular_value_decomposition",
    "nora": "nora_vision/test_layer.py::test_the_output_is_that_of_the_base_weight_plus_s_B_B1_A1_A",
    "olora": "pipelines/test_lora_starts.py::test_olora_starts_from_the_first_columns_of_q_and_rows_of_r",
    "pissa": "pipelines/test_lora_starts.py::test_the_start_is_a_part_of_the_singular_value_decomposition",
    "t_lora": "pipelines/test_t_lora.py::test_the_prediction_at_each_noise_level_is_that_of_lora_cut_to_the_rank_of_that_level",
    "tinylora": "pipelines/test_shared_state.py::test_tinylora_adds_the_singular_directions_times_a_random_combination",
    "unilora": "pipelines/test_shared_state.py::test_unilora_spreads_one_vector_over_all_factors_by_an_isometry",
    "vblora": "pipelines/test_shared_state.py::test_vblora_mixes_the_k_most_likely_vectors_of_the_bank_in_each_part_of_a_factor",
    "vera": "pipelines/test_vera.py::test_a_layer_adds_b_B_d_A_x_and_scales_it",
}


def test_the_equation_of_every_method_has_a_test():
    own = {name for name in method_names() if PeftMethod not in method_named(name).__bases__}
    assert own == EQUATIONS.keys()
    for place in EQUATIONS.values():
        file, _, name = place.partition("::")
        assert f"def {name}(" in (Path(__file__).parents[1] / file).read_text(encoding="utf-8")


@pytest.mark.parametrize("method", method_names())
def test_the_subject_recipe_trains_every_method(trainer, method, tmp_path):
    quantized = ["--quantize", "nf4"] if AdapterOptions(method=method).create().needs_quantization else []
    run = trainer.train(tmp_path / "run", "--method", method, *SMALL, *STEPS.split(), *quantized)
    losses = [line.values["loss"] for line in run.metrics() if "loss" in line.values]
    assert len(losses) == 2
    assert torch.isfinite(torch.tensor(losses)).all()
    assert not are_equal(parameters(run, 0), parameters(run))


def test_the_few_shot_recipe_trains_and_reports_every_method(random_clip, tmp_path):
    """But those that need a quantised model: tests/training/test_fewshot_nora.py has one."""
    AcceleratorState._reset_state(reset_partial_state=True)
    folders = write_files(tmp_path / "classes", class_files({"cats": 4, "dogs": 4}))
    places = ["--model", str(random_clip), "--data_dir", str(folders), "--output_dir", str(tmp_path / "run")]
    methods = full_precision_methods()
    fewshot_nora.main(parse_fewshot_options([*FEWSHOT.split(), *places, "--method", *methods, *SMALL]))
    report = json.loads((tmp_path / "run" / "report.json").read_text())
    assert [trial["method"] for trial in report["trials"]] == methods
    for method in methods:
        trial = tmp_path / "run" / "trials" / "1-shots" / "seed-0" / method
        assert len((trial / "metrics.jsonl").read_text().splitlines()) == 2
        assert (trial / "adapter" / "full" / "image" / "adapter_model.safetensors").is_file()
