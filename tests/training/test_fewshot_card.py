"""The card of a few-shot run: true to its report, and valid for any words."""

import ast
import json
import re
from dataclasses import asdict

import pytest
import torch
import yaml
from PIL import Image

from pipelines.fewshot.metric_values import Interval
from pipelines.fewshot.metrics import interval_over_seeds, score
from pipelines.fewshot.target_layers import TargetLayers
from training.fewshot.card import card as card_with
from training.fewshot.card import write_card as write_card_with
from training.fewshot.figures import card_figures as figures_with
from training.runs.fewshot_files import FewShotReport

CLASSES = ["red star", "cat", "grey dog"]
ODD_CLASSES = ["a | b", "<script>alert(1)</script>", "{count} *x* `y` $z$\n---\nlicense: mine"]
METHODS = ("zeroshot", "pixels", "nora")
LABELS = torch.arange(3).repeat(8)
TARGETS = TargetLayers("both", ["q", "k", "v"], "last-2")
COSTS = {
    "zeroshot": {"num_trainable_parameters": 0, "stored_bytes": 2400},
    "pixels": {"num_trainable_parameters": 9219, "stored_bytes": 36_976},
    "nora": {"num_trainable_parameters": 1234, "stored_bytes": 56_789},
}


def trial_of(method, shots, seed, classes, right):
    """A trial that classifies `right` of its test images correctly."""
    confident = torch.linspace(1, 3, len(LABELS))[:, None]
    logits = torch.nn.functional.one_hot((LABELS + (torch.arange(len(LABELS)) >= right)) % 3, 3) * confident
    return {
        "shots": shots,
        "seed": seed,
        "method": method,
        "folder": f"trials/{shots}-shots/seed-{seed}/{method}",
        "split_sha256": "0" * 64,
        "setting": {},
        "scale": 1.0,
        "scale_reason": None,
        "seconds": 12.25,
        "peak_memory": 300 * 2**20,
        "temperature": 0.5,
        "validation": {"top1": 0.5, "zero_shot_top1": 0.25, "count": 12},
        "test": score(logits, LABELS, classes).to_json(),
        "calibrated": score(logits, LABELS, classes, 0.5).to_json(),
        "new_classes": None,
        **COSTS[method],
    }


def row_of(trials):
    """One method at one number of shots, over its seeds."""
    top1 = [one["test"]["top1"] for one in trials]
    return {
        **{
            name: trials[0][name]
            for name in ("shots", "method", "seconds", "peak_memory", "num_trainable_parameters", "stored_bytes")
        },
        "num_seeds": len(trials),
        "top1": top1[0] if len(trials) == 1 else asdict(interval_over_seeds([one["value"] for one in top1])),
        "calibration_error": 0.125,
        "calibrated_calibration_error": 0.0625,
        "new_classes": None,
        "harmonic_mean": None,
    }


def report_with(right=None, classes=CLASSES, shots=(4,), seeds=(0, 1), methods=METHODS, representative="nora"):
    """A report of runs with the given number of 24 test images classified right, by method and seed."""
    right = {"zeroshot": (8, 10), "pixels": (12, 14), "nora": (22, 23)} | (right or {})
    trials = [
        trial_of(method, count, seed, classes, right[method][index])
        for count in shots
        for index, seed in enumerate(seeds)
        for method in methods
    ]
    report = {
        "version": 2,
        "dataset": {"name": "'/home/me/my pets'", "classes": classes, "new_classes": [], "images": 96, "duplicates": []},
        "model": "mini",
        "pretrained": None,
        "templates": ["a photo of a {}."],
        "shots": list(shots),
        "seeds": list(seeds),
        "methods": list(methods),
        "trials": trials,
        "summary": [
            row_of([one for one in trials if (one["shots"], one["method"]) == (count, method)])
            for count in shots
            for method in methods
        ],
        "classifier": f"trials/{max(count for count in shots if count != 'all')}-shots/seed-0/{representative}",
    }
    return json.loads(json.dumps(report))


def card_of(report, target_layers=None):
    return card_with(FewShotReport.from_json(report), target_layers, figures=[])


def card_figures(report):
    return figures_with(FewShotReport.from_json(report))


def write_card(folder, report, target_layers=None):
    write_card_with(folder, FewShotReport.from_json(report), target_layers)


def cells(line):
    return [cell.strip() for cell in line.strip("|").split("|")]


def tables_of(card):
    """Every table, as rows of cells."""
    return [list(map(cells, block.splitlines())) for block in re.findall(r"(?:^\|.*\|\n)+", card, re.M)]


def test_the_card_names_the_data_the_method_and_the_target_layers():
    card = card_of(report_with(), TARGETS)
    opening = re.search(r"# Few-shot image classifier with 3 classes.*?\n\n(.*?)\n\n## ", card, re.S)[1].replace("\n", " ")
    accuracy = Interval(**report_with()["trials"][2]["test"]["top1"]).as_share()
    for expected in (
        "The CLIP model mini on my pets, 96 images. Classes: red star, cat, grey dog.",
        "Trained on 4 shots per class; the seeds 0, 1 each give another split.",
        r"Prompts: a photo of a \{\}.",
        "Loading this run gives **nora**, 4 shots, seed 0: 1,234 trainable parameters, 56,789 bytes, 12 seconds to fit.",
        "It adapts q, k, v of both encoders, layers: last-2.",
        "chosen on 12 validation images; it was evaluated once, at the end, on 24 test images.",
        f"Accuracy: {accuracy}.",
    ):
        assert expected in opening
    assert "/home/me" not in card


def test_the_results_list_every_method_by_number_of_shots():
    report = report_with(shots=(1, 4))
    (found,) = tables_of(card_of(report))
    assert len(found) == 2 + 2 * 3
    for line, row in zip(found[2:], report["summary"], strict=True):
        costs = COSTS[row["method"]]
        accuracy = Interval(**row["top1"]).as_share()
        numbers = [f"{costs['num_trainable_parameters']:,}", f"{costs['stored_bytes']:,}"]
        assert line == [str(row["shots"]), row["method"], accuracy, "0.125", "0.062", *numbers, "12.2", "300"]


@pytest.mark.parametrize(("seeds", "words"), [((0, 1), "Means over 2 seeds with Student's"), ((0,), "One seed with Wilson's")])
def test_the_card_names_the_kind_of_its_intervals(seeds, words):
    assert words in card_of(report_with(seeds=seeds))


def plain(card):
    """Without line breaks and quotes' marks."""
    return card.replace("\n> ", " ").replace("\n", " ")


@pytest.mark.parametrize(("right", "above"), [((24, 24), True), ((16, 16), False), ((8, 8), False)])
def test_the_control_is_beaten_only_if_the_intervals_do_not_overlap(right, above):
    # At 13 of 24, one run's interval reaches from 35 to 72%: 16 of 24 are more, but no proof.
    report = report_with({"nora": right, "pixels": (13, 13)}, seeds=(0,))
    found, control = (Interval(**report["summary"][index]["top1"]) for index in (2, 1))
    assert (found.low > control.high) == above
    card = plain(card_of(report))
    assert ("**With 4 shots, no adapter's interval lies above that of the control.**" in card) != above
    assert ("With 4 shots, the intervals of these methods lie above that of the control `pixels`" in card) == above
    assert f"nora {found.as_share()}" in card
    assert control.as_share() in card


def test_each_number_of_shots_is_compared_with_its_control():
    report = report_with({"nora": (24,), "pixels": (6,)}, shots=(1, 4), seeds=(0,))
    report["summary"][1]["top1"] = {"value": 1.0, "low": 0.9, "high": 1.0}
    card = plain(card_of(report))
    assert "**With 1 shot, no adapter's interval" in card
    assert "With 4 shots, the intervals of these methods" in card


def test_a_missing_control_is_mentioned():
    card = plain(card_of(report_with(methods=("zeroshot", "nora"))))
    assert "The control `pixels`, a logistic regression on raw pixels, was not run" in card
    assert "was not run" not in plain(card_of(report_with(methods=("zeroshot",), representative="zeroshot")))


def test_scales_below_1_duplicates_and_held_out_classes_are_listed_if_there_are_any():
    report = report_with()
    card = card_of(report)
    assert not re.search("^## (Adapters with|Duplicates|Held-out)", card, re.M)
    scaled = next(one for one in report["trials"] if (one["method"], one["seed"]) == ("nora", 1))
    scaled["scale_reason"] = "On 12 images *less* is more."
    report["dataset"] |= {"duplicates": [f"{index} <b>" for index in range(25)], "new_classes": ["boat", "tea_pot"]}
    for one in report["trials"]:
        if one["method"] == "nora":
            one["new_classes"] = {
                "top1": {"value": 0, "low": 0, "high": 0},
                "zero_shot_top1": 0.25 + 0.5 * one["seed"],
                "harmonic_mean": 0,
                "count": 9,
            }
    report["summary"][2] |= {"new_classes": {"value": 0.5, "low": 0.25, "high": 0.75}, "harmonic_mean": 0.625}
    card = card_of(report)
    assert "- nora, 4 shots, seed 1: On 12 images \\*less\\* is more." in card
    assert "- 19 &lt;b&gt;\n- And 5 more." in card
    assert "2 classes, classified among themselves by their prompts alone: boat, tea\\_pot." in card
    assert tables_of(card)[1][2:] == [["4", "nora", "50.0% (25.0% to 75.0%)", "50.0%", "62.5%"]]


def test_held_out_classes_that_no_method_can_classify_are_mentioned():
    report = report_with(methods=("pixels",), representative="pixels")
    report["dataset"]["new_classes"] = ["boat"]
    assert "No method of this run can classify held-out classes." in card_of(report)


def test_the_figures_show_the_classifier_that_is_loaded(tmp_path):
    report = report_with({"zeroshot": (3, 9), "nora": (20, 23)}, shots=(1, 4, "all"))
    figures = card_figures(report)
    assert list(figures) == ["confusion", "reliability", "per_class", "comparison"]
    representative = next(one for one in report["trials"] if one["folder"] == report["classifier"])
    counts = [int(text.get_text()) for text in figures["confusion"].axes[0].texts]
    assert counts == [count for row in representative["test"]["confusion"] for count in row]
    curves = [text.get_text() for text in figures["reliability"].axes[0].get_legend().get_texts()]
    errors = [representative[part]["calibration_error"] for part in ("test", "calibrated")]
    assert curves == [f"uncalibrated, ECE {errors[0]:.3f}", f"calibrated (temperature 0.50), ECE {errors[1]:.3f}"]
    zero_shot = next(one for one in report["trials"] if one["folder"] == "trials/4-shots/seed-0/zeroshot")
    drawn = [sorted(line.get_xdata()) for line in figures["per_class"].axes[0].lines]
    assert drawn == [sorted(one["test"]["per_class"].values()) for one in (zero_shot, representative)]
    assert [label.get_text() for label in figures["comparison"].axes[0].get_xticklabels()] == ["1", "4"]
    write_card(tmp_path, report)
    linked = re.findall(r"!\[.+\]\((.+)\)", (tmp_path / "README.md").read_text())
    assert linked == [f"figures/{name}.png" for name in figures]
    for path in linked:
        assert Image.open(tmp_path / path).format == "PNG"


def test_comparing_figures_need_something_to_compare():
    assert list(card_figures(report_with(methods=("pixels", "nora")))) == ["confusion", "reliability"]
    assert list(card_figures(report_with(methods=("zeroshot",), representative="zeroshot"))) == ["confusion", "reliability"]
    assert "comparison" not in card_figures(report_with(shots=("all", 4)))


@pytest.mark.parametrize("classes", [CLASSES, ODD_CLASSES])
def test_header_and_tables_and_code_are_valid_whatever_the_classes_are_called(classes):
    report = report_with(classes=classes)
    report["dataset"]["new_classes"] = classes
    card = card_of(report)
    header = yaml.safe_load(re.match(r"---\n(.*?)\n---\n", card, re.S)[1])
    assert header == {
        "library_name": "open_clip",
        "pipeline_tag": "zero-shot-image-classification",
        "tags": ["open_clip", "clip", "few-shot", "zeroshot", "pixels", "nora"],
    }
    assert "<script>" not in card
    assert len(re.findall("^---$", card, re.M)) == 2
    ast.parse(re.search(r"```python\n(.*?)\n```", card, re.S)[1])
    for table in tables_of(card):
        assert len(set(map(len, table))) == 1


@pytest.mark.parametrize(("representative", "open_to_names"), [("nora", True), ("zeroshot", True), ("pixels", False)])
def test_only_classifiers_by_prompts_are_described_as_open(representative, open_to_names):
    card = card_of(report_with(representative=representative))
    assert ("with_classes(" in card) == open_to_names
    assert ("pipeline_tag: zero-shot-image-classification" in card) == open_to_names


def test_the_limits_count_the_test_images():
    card = card_of(report_with())
    assert (
        "24 test images, 8 in the smallest class: one more correct image is 4.2% of the accuracy and 12% of that\n  class" in card
    )


def test_a_class_without_test_images_is_named_and_counted_as_0():
    report = report_with()
    for one in report["trials"]:
        for part in ("test", "calibrated"):
            one[part]["confusion"][2] = [0, 0, 0]
            one[part]["per_class"][CLASSES[2]] = None
    card = card_of(report)
    assert "24 test images, 0 in the smallest class and 8 in the smallest of the others" in card
    assert f"**Classes without test images: {CLASSES[2]}.**" in card
    assert "without test images" not in card_of(report_with())


def test_unused_files_are_listed_on_the_card():
    report = report_with()
    assert "## How the dataset was read" not in card_of(report)
    report["dataset"]["notes"] = ["3 files with the suffix .txt are not used: 3 in class 'a_b'."]
    assert "- 3 files with the suffix .txt are not used: 3 in class 'a\\_b'." in card_of(report)


def test_the_card_states_the_terms_of_the_built_in_model_and_no_path_of_a_local_one(tmp_path):
    assert "ImageNet's terms" in card_of(report_with())
    (tmp_path / "secret").mkdir()
    (tmp_path / "secret" / "weights.safetensors").touch()
    report = report_with() | {"model": "ViT-B-16", "pretrained": str(tmp_path / "secret" / "weights.safetensors")}
    card = card_of(report)
    assert r"The CLIP model ViT\-B\-16 \(weights.safetensors\) on" in card
    assert "secret" not in card
    assert "ImageNet" not in card


def test_the_same_report_gives_the_same_files(tmp_path):
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
        write_card(tmp_path / name, report_with(shots=(1, 4)), TARGETS)
    files = [path.relative_to(tmp_path / "a") for path in sorted((tmp_path / "a").rglob("*")) if path.is_file()]
    assert len(files) == 5
    for file in files:
        assert (tmp_path / "a" / file).read_bytes() == (tmp_path / "b" / file).read_bytes()
