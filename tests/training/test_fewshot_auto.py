"""--method auto: the method is chosen on the validation images."""

from types import SimpleNamespace

import pytest
from image_sets import class_files, write_files
from test_fewshot_nora import COUNTS, options_for, report_in

from pipelines.adapter_options import AdapterOptions
from pipelines.methods import DEFAULT
from training.fewshot.report import validation_accuracies
from training.fewshot_nora import main
from training.options.fewshot import FewShotMethodOptions, parse_fewshot_options


def result(method, top1, count=10):
    return SimpleNamespace(method=method, validation=SimpleNamespace(top1=top1, count=count))


def test_the_accuracy_is_that_of_all_validation_images_and_the_adapter_wins_ties():
    results = [result("gda", 1.0), result("nora", 0.9), result("gda", 0.5, 30), result("nora", 0.7, 30)]
    assert validation_accuracies(results) == pytest.approx({"nora": 0.75, "gda": 0.625})
    tied = validation_accuracies([result("gda", 0.5), result("nora", 0.5)])
    assert max(tied, key=tied.__getitem__) == "nora"


@pytest.mark.parametrize("other", [1.0, 0.0])
def test_a_run_keeps_the_better_classifier(random_clip, tmp_path, monkeypatch, other):
    monkeypatch.setattr("training.fewshot.report.validation_accuracies", lambda results: {"nora": 0.5, "gda": other})
    flags = ("--shots", "2", "--seeds", "0", "--method", "auto", "--rank", "4", "--inner_r", "2", "--max_train_steps", "1")
    folders = write_files(tmp_path / "classes", class_files(COUNTS))
    main(options_for(random_clip, folders, tmp_path / "run", *flags))
    report = report_in(tmp_path / "run")
    chosen = "gda" if other else "nora"
    assert report["methods"] == ["gda", "nora"]
    assert report["classifier"].endswith(f"/{chosen}")
    sentence = f"was chosen by the accuracy on validation images: NoRA 50.0%, GDA {other:.1%}."
    assert sentence in (tmp_path / "run" / "README.md").read_text(encoding="utf-8")


def test_it_stands_alone(capsys):
    assert FewShotMethodOptions(method=["auto"]).adapters() == [DEFAULT]
    with pytest.raises(SystemExit):
        parse_fewshot_options(["--method", "auto", "lora"])
    assert "method must be auto, or one or more of zeroshot" in capsys.readouterr().err


def test_for_a_subject_it_is_the_default_method():
    assert AdapterOptions("auto") == AdapterOptions(DEFAULT)
