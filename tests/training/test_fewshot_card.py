"""The card of a few-shot run: true to its report, and valid for any words."""

import ast
import json
import re
from dataclasses import asdict

import pytest
import torch
import yaml
from PIL import Image

from pipelines.fewshot.metrics import Interval, interval_over_seeds, score
from training.fewshot.card import card as card_with
from training.fewshot.card import write_card
from training.fewshot.figures import card_figures

CLASSES = ["red star", "cat", "grey dog"]
ODD_CLASSES = ["a | b", "<script>alert(1)</script>", "{count} *x* `y` $z$\n---\nlicense: mine"]
METHODS = ("zeroshot", "pixels", "nora")
LABELS = torch.arange(3).repeat(8)
OPTIONS = {"target_layers": {"encoders": "both", "projections": ["q", "k", "v"], "layers": "last-2"}}
TOLD = {
    "zeroshot": {"trained_numbers": 0, "stored_bytes": 2400},
    "pixels": {"trained_numbers": 9219, "stored_bytes": 36_976},
    "nora": {"trained_numbers": 1234, "stored_bytes": 56_789},
}


def member_of(method, shots, seed, classes, right):
    """A member that `right` of its test images are classified right by."""
    confident = torch.linspace(1, 3, len(LABELS))[:, None]
    logits = torch.nn.functional.one_hot((LABELS + (torch.arange(len(LABELS)) >= right)) % 3, 3) * confident
    return {
        "shots": shots,
        "seed": seed,
        "method": method,
        "folder": f"members/{shots}-shots/seed-{seed}/{method}",
        "split_sha256": "0" * 64,
        "setting": {},
        "strength": 1.0,
        "guard": None,
        "seconds": 12.25,
        "peak_memory": 300 * 2**20,
        "temperature": 0.5,
        "validation": {"top1": 0.5, "zero_shot_top1": 0.25, "count": 12},
        "test": score(logits, LABELS, classes).as_dict(),
        "calibrated": score(logits, LABELS, classes, 0.5).as_dict(),
        "new_classes": None,
        **TOLD[method],
    }


def row_of(members):
    """One method at one number of shots, over its seeds."""
    top1 = [one["test"]["top1"] for one in members]
    return {
        **{name: members[0][name] for name in ("shots", "method", "seconds", "peak_memory", "trained_numbers", "stored_bytes")},
        "runs": len(members),
        "top1": top1[0] if len(members) == 1 else asdict(interval_over_seeds([one["value"] for one in top1])),
        "calibration_error": 0.125,
        "calibrated_calibration_error": 0.0625,
        "new_classes": None,
        "harmonic_mean": None,
    }


def report_with(right=None, classes=CLASSES, shots=(4,), seeds=(0, 1), methods=METHODS, shown="nora"):
    """A report of runs in which so many of 24 test images are classified right, by method and seed."""
    right = {"zeroshot": (8, 10), "pixels": (12, 14), "nora": (22, 23)} | (right or {})
    members = [
        member_of(method, own, seed, classes, right[method][place])
        for own in shots
        for place, seed in enumerate(seeds)
        for method in methods
    ]
    report = {
        "format": 1,
        "set": {"name": "'/home/me/my pets'", "classes": classes, "new_classes": [], "pictures": 96, "copies": []},
        "model": "mini",
        "pretrained": None,
        "templates": ["a photo of a {}."],
        "shots": list(shots),
        "seeds": list(seeds),
        "methods": list(methods),
        "members": members,
        "summary": [
            row_of([one for one in members if (one["shots"], one["method"]) == (own, method)])
            for own in shots
            for method in methods
        ],
        "classifier": f"members/{max(own for own in shots if own != 'all')}-shots/seed-0/{shown}",
    }
    return json.loads(json.dumps(report))


def card_of(report, options=None):
    return card_with(report, options, figures=[])


def cells(line):
    return [cell.strip() for cell in line.strip("|").split("|")]


def tables_of(card):
    """Every table, as rows of cells."""
    return [list(map(cells, block.splitlines())) for block in re.findall(r"(?:^\|.*\|\n)+", card, re.M)]


def test_the_card_says_what_was_learned_from_what():
    card = card_of(report_with(), OPTIONS)
    told = re.search(r"# A classifier of 3 classes.*?\n\n(.*?)\n\n## ", card, re.S)[1].replace("\n", " ")
    accuracy = Interval(**report_with()["members"][2]["test"]["top1"]).as_share()
    for expected in (
        "The CLIP model mini on my pets, 96 images. Classes: red star, cat, grey dog.",
        "Learned from 4 shots of each class, with the seeds 0, 1,",
        r"Prompts: a photo of a \{\}.",
        "Loading this run gives **nora**, 4 shots, seed 0: 1,234 trained numbers, 56,789 bytes, 12 seconds.",
        "It adapts q, k, v of both encoders, layers: last-2.",
        "chosen on 12 other images; 24 more were tested on, once, at the end.",
        f"Accuracy: {accuracy}.",
    ):
        assert expected in told
    assert "/home/me" not in card


def test_the_methods_stand_side_by_side_by_shots():
    report = report_with(shots=(1, 4))
    (found,) = tables_of(card_of(report))
    assert len(found) == 2 + 2 * 3
    for line, row in zip(found[2:], report["summary"], strict=True):
        told = TOLD[row["method"]]
        accuracy = Interval(**row["top1"]).as_share()
        numbers = [f"{told['trained_numbers']:,}", f"{told['stored_bytes']:,}"]
        assert line == [str(row["shots"]), row["method"], accuracy, "0.125", "0.062", *numbers, "12.2", "300"]


@pytest.mark.parametrize(("seeds", "words"), [((0, 1), "Means over 2 seeds; Student's"), ((0,), "One seed; Wilson's")])
def test_the_card_says_what_its_intervals_are_of(seeds, words):
    assert words in card_of(report_with(seeds=seeds))


def plain(card):
    """Without line breaks and quotes' marks."""
    return card.replace("\n> ", " ").replace("\n", " ")


@pytest.mark.parametrize(("right", "above"), [((24, 24), True), ((16, 16), False), ((8, 8), False)])
def test_the_card_says_whether_the_control_is_beaten_by_whole_intervals(right, above):
    # At 13 of 24, one run's interval reaches from 35 to 72%: 16 of 24 are more, but no proof.
    report = report_with({"nora": right, "pixels": (13, 13)}, seeds=(0,))
    found, control = (Interval(**report["summary"][place]["top1"]) for place in (2, 1))
    assert (found.low > control.high) == above
    card = plain(card_of(report))
    assert ("**With 4 shots no adapted method's interval lies above that of the control.**" in card) != above
    assert ("With 4 shots, above the control `pixels`" in card) == above
    assert f"nora {found.as_share()}" in card
    assert control.as_share() in card


def test_each_number_of_shots_is_held_against_its_own_control():
    report = report_with({"nora": (24,), "pixels": (6,)}, shots=(1, 4), seeds=(0,))
    report["summary"][1]["top1"] = {"value": 1.0, "low": 0.9, "high": 1.0}
    card = plain(card_of(report))
    assert "**With 1 shot no adapted method's interval" in card
    assert "With 4 shots, above the control" in card


def test_a_run_without_the_control_says_that_it_has_none():
    card = plain(card_of(report_with(methods=("zeroshot", "nora"))))
    assert "The control `pixels`, a logistic regression on raw pixels, was not run" in card
    assert "was not run" not in plain(card_of(report_with(methods=("zeroshot",), shown="zeroshot")))


def test_guards_copies_and_classes_held_out_are_told_where_there_are_any():
    report = report_with()
    card = card_of(report)
    assert not re.search("^## (Where|Copies|Classes held out)", card, re.M)
    guarded = next(one for one in report["members"] if (one["method"], one["seed"]) == ("nora", 1))
    guarded["guard"] = "On 12 images *less* is more."
    report["set"] |= {"copies": [f"{place} <b>" for place in range(25)], "new_classes": ["boat", "tea_pot"]}
    for one in report["members"]:
        if one["method"] == "nora":
            one["new_classes"] = {"top1": {}, "zero_shot_top1": 0.25 + 0.5 * one["seed"], "harmonic_mean": 0, "count": 9}
    report["summary"][2] |= {"new_classes": {"value": 0.5, "low": 0.25, "high": 0.75}, "harmonic_mean": 0.625}
    card = card_of(report)
    assert "- nora, 4 shots, seed 1: On 12 images \\*less\\* is more." in card
    assert "- 19 &lt;b&gt;\n- And 5 more." in card
    assert "2 classes, told apart among themselves by their names alone: boat, tea\\_pot." in card
    assert tables_of(card)[1][2:] == [["4", "nora", "50.0% (25.0% to 75.0%)", "50.0%", "62.5%"]]


def test_classes_held_out_that_no_method_can_name_are_told_too():
    report = report_with(methods=("pixels",), shown="pixels")
    report["set"]["new_classes"] = ["boat"]
    assert "No method of this run can tell classes apart that it was not shown." in card_of(report)


def test_the_figures_are_those_of_the_classifier_that_is_loaded(tmp_path):
    report = report_with({"zeroshot": (3, 9), "nora": (20, 23)}, shots=(1, 4, "all"))
    figures = card_figures(report)
    assert list(figures) == ["confusion", "reliability", "per_class", "comparison"]
    shown = next(one for one in report["members"] if one["folder"] == report["classifier"])
    counts = [int(text.get_text()) for text in figures["confusion"].axes[0].texts]
    assert counts == [count for row in shown["test"]["confusion"] for count in row]
    curves = [text.get_text() for text in figures["reliability"].axes[0].get_legend().get_texts()]
    errors = [shown[part]["calibration_error"] for part in ("test", "calibrated")]
    assert curves == [f"as trained, ECE {errors[0]:.3f}", f"with the temperature 0.50, ECE {errors[1]:.3f}"]
    zero_shot = next(one for one in report["members"] if one["folder"] == "members/4-shots/seed-0/zeroshot")
    drawn = [sorted(line.get_xdata()) for line in figures["per_class"].axes[0].lines]
    assert drawn == [sorted(one["test"]["per_class"].values()) for one in (zero_shot, shown)]
    assert [label.get_text() for label in figures["comparison"].axes[0].get_xticklabels()] == ["1", "4"]
    write_card(tmp_path, report)
    linked = re.findall(r"!\[.+\]\((.+)\)", (tmp_path / "README.md").read_text())
    assert linked == [f"figures/{name}.png" for name in figures]
    for path in linked:
        assert Image.open(tmp_path / path).format == "PNG"


def test_figures_that_compare_need_something_to_compare():
    assert list(card_figures(report_with(methods=("pixels", "nora")))) == ["confusion", "reliability"]
    assert list(card_figures(report_with(methods=("zeroshot",), shown="zeroshot"))) == ["confusion", "reliability"]
    assert "comparison" not in card_figures(report_with(shots=("all", 4)))


@pytest.mark.parametrize("classes", [CLASSES, ODD_CLASSES])
def test_header_and_tables_and_code_are_valid_whatever_the_classes_are_called(classes):
    report = report_with(classes=classes)
    report["set"]["new_classes"] = classes
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


@pytest.mark.parametrize(("shown", "open_to_names"), [("nora", True), ("zeroshot", True), ("pixels", False)])
def test_only_classifiers_by_prompts_are_told_to_take_new_classes(shown, open_to_names):
    card = card_of(report_with(shown=shown))
    assert ("with_classes(" in card) == open_to_names
    assert ("pipeline_tag: zero-shot-image-classification" in card) == open_to_names


def test_the_limits_count_the_test_images():
    card = card_of(report_with())
    assert "24 test images, 8 of the class that has fewest: one more that is right is 4.2% of all, and\n  12% of that" in card


def test_a_class_without_test_images_is_named_and_counted_as_0():
    report = report_with()
    for one in report["members"]:
        for part in ("test", "calibrated"):
            one[part]["confusion"][2] = [0, 0, 0]
            one[part]["per_class"][CLASSES[2]] = None
    card = card_of(report)
    assert "24 test images, 0 of the class that has fewest, and 8 of the class that has fewest of the others" in card
    assert f"**Without test images: {CLASSES[2]}.**" in card
    assert "Without test images" not in card_of(report_with())


def test_what_was_not_used_stands_on_the_card():
    report = report_with()
    assert "## What was read" not in card_of(report)
    report["set"]["notes"] = ["3 files with the suffix .txt are not used: 3 in class 'a_b'."]
    assert "- 3 files with the suffix .txt are not used: 3 in class 'a\\_b'." in card_of(report)


def test_the_terms_of_the_built_in_model_are_told_and_a_local_model_by_its_own_name(tmp_path):
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
        write_card(tmp_path / name, report_with(shots=(1, 4)), OPTIONS)
    files = [path.relative_to(tmp_path / "a") for path in sorted((tmp_path / "a").rglob("*")) if path.is_file()]
    assert len(files) == 5
    for file in files:
        assert (tmp_path / "a" / file).read_bytes() == (tmp_path / "b" / file).read_bytes()
