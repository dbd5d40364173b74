"""The recipes with NoRA's forms: resumed bit for bit, and without exports if the adapter is no change of weights."""

import re

import pytest
from image_sets import class_files, write_files
from subject_runs import are_equal, parameters

from training import fewshot_nora
from training.options.fewshot import parse_fewshot_options
from training.runs.card_text import CARD

FEWSHOT = "--shots 1 --seeds 0 --method nora --rank 4 --inner_r 2 --num_subspaces 2 --export lora merged --report_to none"
FEWSHOT += " --min_train_steps 2 --iterations_per_shot 1 --train_batch_size 2 --views 1"


FORMS = [
    "--inner_form block_diagonal --inner_blocks 2 --inner_init orthogonal --preserve_output --outer_scaling mean",
    "--inner_form sparse_low_rank --sparse_entries 9 --inner_init uniform --preserve_output --outer_scaling split",
    "--num_subspaces 3 --dropout 0.3 --outer_scaling none",
]


@pytest.mark.parametrize("form", FORMS)
def test_a_run_that_was_interrupted_ends_with_the_same_bits(trainer, tmp_path, form):
    flags = [*form.split(), "--learning_rate", "0.1"]
    run = trainer.train(tmp_path / "run", *flags)
    assert not are_equal(parameters(run, 0), parameters(run))
    resumed = trainer.resume(run, tmp_path / "resumed", *flags)
    assert are_equal(parameters(resumed), parameters(run))


def test_a_mixture_of_subspaces_is_trained_without_exports_and_its_card_loads_the_native_files(trainer, tmp_path, monkeypatch):
    run = trainer.run(tmp_path / "run", "--num_subspaces", "2", "--certify")
    folders = {path.name for path in run.path.iterdir()}
    assert "adapter" in folders
    assert not folders & {"diffusers", "kohya", "certificate.json"}
    code = re.search(r"```python\n(.*?)\n```\n", (run.path / CARD).read_text(), re.S)[1]
    loading, _, generating = code.rpartition("\n")
    assert generating.startswith("pipe(")
    (run.path / trainer.model.name).symlink_to(trainer.model)
    monkeypatch.chdir(run.path)
    names = {}
    exec(loading, names)
    assert names["pipe"].get_active_adapters() == ["subject"]


def test_a_mixture_of_subspaces_learns_classes_without_exports(random_clip, tmp_path, caplog):
    folders = write_files(tmp_path / "classes", class_files({"cats": 6, "dogs": 6}))
    places = ["--model", str(random_clip), "--data_dir", str(folders), "--output_dir", str(tmp_path / "run")]
    fewshot_nora.main(parse_fewshot_options([*FEWSHOT.split(), *places]))
    assert (tmp_path / "run" / "trials/1-shots/seed-0/nora/adapter/full").is_dir()
    assert not (tmp_path / "run" / fewshot_nora.EXPORTED).exists()
    assert "This adapter is a mixture of subspaces" in caplog.text
