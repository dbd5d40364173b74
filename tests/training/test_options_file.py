"""Options from a file: what flags say wins, what nobody knows is refused, and a run's own file makes the run again."""

import json

import pytest

from pipelines.fewshot.target_layers import TargetLayers
from training.options import SubjectOptions, parse_options
from training.options.fewshot import FewShotOptions, parse_fewshot_options

MODEL = "owner/model"


def written(folder, values, name="options.json"):
    path = folder / name
    path.write_text(values if isinstance(values, str) else json.dumps(values))
    return ["--options_file", str(path)]


def test_resolved_options_parse_to_the_same_options(tmp_path):
    flags = "--method lora --rank 8 --learning_rate 1.25e-4 --instance_prompt=-dog --train_text_encoder --snr_gamma 5"
    flags += " --stop_text_encoder_training 3 --mixed_precision no --validation_prompt a b --output_dir elsewhere"
    for given in ([], flags.split(), ["--pretrained_model_name_or_path", MODEL, "--optimizer", "Prodigy"]):
        options = parse_options(given)
        assert parse_options(written(tmp_path, options.to_dict())) == options


def test_flags_take_precedence_over_the_file_in_any_order(tmp_path):
    file = written(
        tmp_path, {"rank": 7, "adapter": {"inner_r": 3}, "train_text_encoder": True, "target_modules": ["to_q", "to_v"]}
    )
    options = parse_options(["--rank", "9", *file, "--target_modules", "to_k", "--train_text_encoder", "false"])
    assert (options.adapter.rank, options.adapter.inner_r, options.adapter.train_text_encoder) == (9, 3, False)
    assert options.adapter.target_modules == ["to_k"]


def test_yaml_is_read_like_json_including_the_word_no_and_the_number_1e_4(tmp_path):
    text = """
    model:
      mixed_precision: no
      variant: null
    learning_rate: 1e-4
    use_ema: yes
    validation_prompt: ["a: b", "-c"]
    instance_prompt: "é"
    """
    options = parse_options(written(tmp_path, text, "options.yaml"))
    assert (options.model.mixed_precision, options.model.variant, options.optimisation.use_ema) == ("no", None, True)
    assert options.optimisation.learning_rate == 1e-4
    assert options.output.validation_prompt == ["a: b", "-c"]
    values = {"mixed_precision": "no", "learning_rate": 1e-4, "use_ema": True}
    assert parse_options(written(tmp_path, values | {"validation_prompt": ["a: b", "-c"], "instance_prompt": "é"})) == options


def test_the_file_of_a_run_starts_another_run(tmp_path):
    values = SubjectOptions().to_dict()
    values["output"] |= {"output_dir": "runs/first", "resume_from_checkpoint": "latest"}
    assert parse_options(written(tmp_path, values)).output.output_dir == "runs/first"
    (tmp_path / "status.json").write_text("{}")
    again = parse_options(written(tmp_path, values))
    assert (again.output.output_dir, again.output.resume_from_checkpoint) == (None, None)


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("options.json", '{"rnak": 3}', r"has an option 'rnak', which does not exist. Did you mean 'rank'?"),
        ("options.json", '{"adapter": {"learning": 3}}', "has an option 'learning', which does not exist."),
        ("options.json", '{"rank": ', "cannot be read"),
        ("options.yaml", "rank: [", "cannot be read"),
        ("options.json", "[1]", "must hold options by name, got list"),
        ("options.json", '{"rank": [1, 2]}', "The option 'rank'"),
        ("options.json", '{"rank": {"of": 2}}', "The option 'rank'"),
        ("options.json", '{"rank": "eight"}', "invalid int value: 'eight'"),
        ("options.json", '{"mixed_precision": "fp8"}', "invalid choice"),
        ("options.json", '{"rank": 0}', "rank must be at least 1, got 0"),
        ("options.txt", "rank: 3", "options_file must be a .json, .yaml, .yml file"),
        ("options.yaml", "rank: !!python/object/apply:os.getcwd []", "The option 'rank'"),
    ],
)
def test_a_file_that_cannot_be_used_ends_with_one_line_and_exit_code_two(name, content, message, tmp_path, capsys):
    with pytest.raises(SystemExit, match="2"):
        parse_options(written(tmp_path, content, name))
    assert message in capsys.readouterr().err.rpartition("error: ")[2]


def test_a_missing_file_is_named(tmp_path, capsys):
    with pytest.raises(SystemExit, match="2"):
        parse_options(["--options_file", str(tmp_path / "none.json")])
    assert "none.json' cannot be read" in capsys.readouterr().err


@pytest.mark.parametrize("name", ["options.json", "options.yaml"])
def test_a_file_of_a_newer_version_is_refused(tmp_path, capsys, name):
    (tmp_path / name).write_text('{"version": 1, "adapter": {"rank": 9}}')
    assert parse_options(["--options_file", str(tmp_path / name)]).adapter.rank == 9
    (tmp_path / name).write_text('{"version": 2, "adapter": {"rank": 9}}')
    with pytest.raises(SystemExit, match="2"):
        parse_options(["--options_file", str(tmp_path / name)])
    assert "options.json has version 2; this version of NoRA Vision reads versions up to 1" in capsys.readouterr().err


@pytest.mark.parametrize("encoding", ["utf-8-sig", "utf-16", "cp1252"])
@pytest.mark.parametrize("name", ["options.json", "options.yaml", "OPTIONS.JSON"])
def test_a_file_in_utf_8_with_or_without_a_byte_order_mark_is_read_and_other_encodings_are_refused(
    tmp_path, capsys, encoding, name
):
    (tmp_path / name).write_text('{"instance_prompt": "a caf\u00e9"}', encoding=encoding)
    given = ["--options_file", str(tmp_path / name)]
    if encoding == "utf-8-sig":
        assert parse_options(given).data.instance_prompt == "a caf\u00e9"
        return
    with pytest.raises(SystemExit):
        parse_options(given)
    assert "Save it as UTF-8" in capsys.readouterr().err


def test_the_options_of_another_tasks_run_name_its_script(tmp_path, capsys):
    for values, parse, script in (
        (FewShotOptions().to_dict(), parse_options, "fewshot_nora.py"),
        (SubjectOptions().to_dict(), parse_fewshot_options, "dreambooth_nora.py"),
    ):
        with pytest.raises(SystemExit):
            parse(written(tmp_path, values))
        assert f"Use it with training/{script}" in " ".join(capsys.readouterr().err.split())


def test_the_built_in_model_of_a_checkout_that_is_gone_is_the_built_in_one(tmp_path):
    values = SubjectOptions().to_dict()
    assert values["model"]["pretrained_model_name_or_path"] == "mini-sdxl"
    values["model"]["pretrained_model_name_or_path"] = "/gone/assets/mini-sdxl"
    assert parse_options(written(tmp_path, values)) == SubjectOptions()


def test_a_group_of_options_is_read_under_its_old_name(tmp_path):
    values = FewShotOptions(target_layers=TargetLayers(layers="last-1")).to_dict()
    values["places"] = values.pop("target_layers")
    assert parse_fewshot_options(written(tmp_path, values)).target_layers.layers == "last-1"


def test_a_list_of_numbers_in_a_file_is_read_as_numbers(tmp_path, capsys):
    options = FewShotOptions()
    assert parse_fewshot_options(written(tmp_path, options.to_dict())) == options
    with pytest.raises(SystemExit):
        parse_fewshot_options(written(tmp_path, {"seeds": ["one"]}))
    assert "The option 'seeds' in" in capsys.readouterr().err


def test_an_old_options_file_and_old_flags_make_the_same_options_as_new_ones(tmp_path):
    old = {"judging": {"judge_model": "base", "drawn_candidates": 3}, "output": {"ladder": False}, "crops_per_picture": 2}
    (tmp_path / "old.json").write_text(json.dumps(old))
    from_file = parse_options(["--options_file", str(tmp_path / "old.json"), "--size_conditioning", "picture"])
    flags = ["--judge_model", "base", "--drawn_candidates=3", "--no_ladder", "--crops_per_picture", "2"]
    from_flags = parse_options([*flags, "--size_conditioning=picture"])
    new = ["--image_scorer", "base", "--num_candidate_images=3", "--no_memory_fallback", "--crops_per_image", "2"]
    assert from_file == from_flags == parse_options([*new, "--size_conditioning", "image"])
