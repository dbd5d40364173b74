"""Options of the page: the same as on the command line, checked one by one, without access to the machine for guests."""

import dataclasses
import typing

import pytest

from pipelines.built_in import BUILT_IN_MODEL
from pipelines.errors import InputError
from training.options import parse_options
from training.options.fewshot import parse_fewshot_options
from training.options.values import KINDS, built, changed, default_of, flags, groups
from webui.form_schema import MACHINE_FIELDS, checked, form_fields, validated
from webui.workspace import Workspace

PARSERS = {"subject": parse_options, "classify": parse_fewshot_options}
# Valid values where not every value of the type is valid; NEEDED has the options that must be set with them.
FITTING = {
    "instance_prompt": "a photo of -sks \"dog\"'s; $HOME\n*", "class_prompt": "-a dog", "validation_prompt": ["a b", "", "c=d"],
    "rank": 12, "resolution": 64, "aspect_ratio_buckets": "64,64", "size_conditioning": "image",
    "method": "dora", "inner_init": "gaussian", "inner_form": "parallel", "inner_blocks": 2, "num_subspaces": 2,
    "outer_scaling": "split", "outer_slice": "2/3", "calibration": "base", "inner_dtype": "int8", "weighting": "huber",
    "basis": "mixed", "gradient_scale": "gradient", "outer_dtype": "base",
    "target_modules": ["to_q", "to_v"], "lr_scheduler": "linear", "optimizer": "Muon", "text_encoder_lr": [1e-05, 2.5e-4],
    "quantize": "nf4", "mixed_precision": "bf16", "prior_generation_precision": "fp32", "report_to": "none",
    "hub_model_id": "a/b", "adam_beta1": 0.5, "adam_beta2": 0.1 + 0.2, "ema_decay": 0.5, "dropout": 0.125,
    "prediction_type": "v_prediction",
    "class_names": ["c00=-a=b", "c01=é 猫"], "templates": ["a {}", "b {}"], "shots": ["4", "all"], "seeds": [3, 1],
    "test_share": 1 / 3, "crop_scale": [0.25, 0.75], "encoders": "image", "projections": ["q", "v"], "layers": "last-1",
    "export": ["lora", "merged"], "excluded_images": ["00.jpg"], "lora_plus_ratio": 4.0, "heldout_image": "none",
}  # fmt: skip
NEEDED = {
    "text_encoder_lr": {"adapter": {"train_text_encoder": True}},
    "stop_text_encoder_training": {"adapter": {"train_text_encoder": True}},
    "hub_model_id": {"validation": {"push_to_hub": True}},
    "loftq_start": {"model": {"quantize": "nf4"}},
}
# The same for options of the same group.
NEEDED_BESIDE = {
    "inner_blocks": {"inner_form": "block_diagonal"},
    "sparse_entries": {"inner_form": "sparse_low_rank"},
    "outer_slice": {"basis": "weight"},
}
FOLDERS = ("data_dir", "instance_data_dir", "class_data_dir", "cache_dir")


def every_field():
    for task in KINDS:
        for group, fields in groups(task).items():
            for field in fields.values():
                if field.name not in ("output_dir", "resume_from_checkpoint", "hub_token", "dataset"):
                    yield task, group, field


def another(task, field, folder):
    """A value of the field other than its default."""
    if field.name in FOLDERS:
        return str(folder)
    if field.name == "method" and task == "classify":
        return ["lora", "nora"]
    if field.name in FITTING:
        return FITTING[field.name]
    kind = next(kind for kind in (*typing.get_args(field.type), field.type) if isinstance(kind, type))
    return {bool: not default_of(field), int: 5, float: 0.35, str: "text"}[kind]


def built_of(workspace, task, values):
    return validated(workspace, task, values)[1]


@pytest.fixture
def local(tmp_path):
    return Workspace(tmp_path / "runs", tmp_path / "sets", is_local=True)


@pytest.fixture
def guest(tmp_path):
    return Workspace(tmp_path / "runs", tmp_path / "sets", "anna", is_local=False, base_models=("owner/model",))


@pytest.mark.parametrize(("task", "group", "field"), [pytest.param(*one, id=f"{one[0]}-{one[2].name}") for one in every_field()])
def test_every_option_has_the_same_value_on_the_command_line(task, group, field, local, tmp_path):
    values = {name: dict(fields) for name, fields in NEEDED.get(field.name, {}).items()}
    values.setdefault(group, {})[field.name] = another(task, field, tmp_path)
    values[group] |= NEEDED_BESIDE.get(field.name, {})
    if field.name == "instance_data_dir":
        values[group]["instance_prompt"] = "a photo of sks dog"
    kept = checked(local, task, values)
    assert field.name in kept[group]
    assert PARSERS[task](flags(task, kept)) == built(task, kept)


@pytest.mark.parametrize("task", KINDS)
def test_defaults_make_no_flags_and_only_optional_fields_default_to_none(task, local):
    defaults = {group: {name: default_of(field) for name, field in fields.items()} for group, fields in groups(task).items()}
    assert flags(task, checked(local, task, defaults)) == []
    for fields in groups(task).values():
        for field in fields.values():
            assert type(None) not in typing.get_args(field.type) or default_of(field) is None


def test_a_boolean_that_defaults_to_true_is_switched_off_by_its_no_flag(local):
    assert flags("subject", {"validation": {"certify": False}, "adapter": {"train_text_encoder": True}}) == [
        "--no_certify", "--train_text_encoder",
    ]  # fmt: skip


def test_an_optional_boolean_has_three_values(local):
    for value, words in ((True, ["--rescale_betas_zero_snr"]), (False, ["--rescale_betas_zero_snr", "False"]), (None, [])):
        values = checked(local, "subject", {"model": {"rescale_betas_zero_snr": value}})
        assert flags("subject", values) == words
        assert parse_options(words).model.rescale_betas_zero_snr is value
        text = {True: "true", False: "false"}.get(value)
        assert checked(local, "subject", {"model": {"rescale_betas_zero_snr": text}}) == values
    (field,) = [each for each in form_fields("subject", True)["model"] if each.name == "rescale_betas_zero_snr"]
    assert field.choices == (("on", "true"), ("off", "false"))


@pytest.mark.parametrize("name", [str(BUILT_IN_MODEL), "/gone/assets/mini-sdxl", "mini-sdxl"])
def test_guests_may_use_the_built_in_model_of_any_checkout(guest, name):
    assert checked(guest, "subject", {"model": {"pretrained_model_name_or_path": name}}) == {}
    assert changed("subject", {"model": {"pretrained_model_name_or_path": name}}) == {}


def test_flags_of_several_options_parse_to_the_same_options(local):
    values = {"optimisation": {"max_train_steps": 40, "learning_rate": 1e-05}, "data": {"center_crop": False}}
    values |= {"output": {"validation_prompt": ["a", "b"], "memory_fallback": False}, "validation": {"certify": False}}
    kept = checked(local, "subject", values)
    assert parse_options(flags("subject", kept)) == built_of(local, "subject", values)


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"optimization": {}}, "The options have no group 'optimization'"),
        ({"optimisation": {"max_train_step": 3}}, "no option 'max_train_step'. Did you mean 'max_train_steps'"),
        ({"optimisation": {"max_train_steps": "3x"}}, "Training steps .--max_train_steps. must be a valid integer.* got '3x'"),
        ({"optimisation": {"max_train_steps": 3.5}}, "must be a valid integer"),
        ({"optimisation": {"max_train_steps": True}}, "must be a number, got True"),
        ({"optimisation": {"max_train_steps": 10**400}}, "must be less than or equal to 2147483647"),
        ({"optimisation": {"max_train_steps": None}}, "must be a valid integer, got None"),
        ({"optimisation": {"max_train_steps": 0}}, "Training steps .--max_train_steps. must be at least 1"),
        ({"optimisation": {"learning_rate": float("nan")}}, "Learning rate .--learning_rate. must be .* got nan"),
        ({"optimisation": {"learning_rate": float("inf")}}, "Learning rate .--learning_rate. must be .* got inf"),
        ({"optimisation": {"text_encoder_lr": 3.0}}, "must be a valid list, got 3.0"),
        ({"output": {"validation_prompt": []}}, "must have at least 1 item"),
        ({"output": {"validation_prompt": ["a", {}]}}, "must be a valid string"),
        ({"output": {"validation_prompt": ["a\0"]}}, "contains a null character"),
        ({"data": {"instance_prompt": "\ud800"}}, "must be a valid string"),
        ({"data": {"instance_prompt": "a" * 5000}}, "must have at most 4000 characters"),
        ({"data": {"instance_prompt": ["a"]}}, "must be a valid string"),
        ({"data": {"center_crop": "perhaps"}}, "Centre crop .--center_crop. must be a valid boolean"),
        ({"model": {"quantize": "int8"}}, "Quantisation .--quantize. must be 'nf4', got 'int8'"),
        ({"adapter": {"method": "magic"}}, "Adapter method .--method. must be one of"),
        ({"adapter": {"inner_r": 64, "rank": 4}}, "inner_r"),
        ({"adapter": 3}, "must be a mapping by group and name"),
        ([], "The options must be a mapping"),
        ({"output": {"output_dir": "/elsewhere"}}, "output_dir cannot be set: the app"),
        ({"output": {"resume_from_checkpoint": "latest"}}, "resume_from_checkpoint cannot be set: the app"),
        ({"validation": {"push_to_hub": True, "hub_token": "secret"}}, "hub_token cannot be set: the app"),
    ],
)
def test_an_invalid_value_is_refused_with_its_name(values, message, local):
    with pytest.raises(InputError, match=message):
        built_of(local, "subject", values)


def test_floats_without_a_fraction_and_integer_shots_are_accepted(local):
    assert checked(local, "subject", {"optimisation": {"max_train_steps": 40.0}}) == {"optimisation": {"max_train_steps": 40}}
    assert checked(local, "classify", {"data": {"shots": [4, 8]}}) == {"data": {"shots": ["4", "8"]}}


def test_a_text_never_becomes_another_flag(local):
    values = {"output": {"validation_prompt": ["a", "--output_dir=/elsewhere"]}}
    with pytest.raises(InputError, match="must not begin with a hyphen"):
        flags("subject", checked(local, "subject", values))
    alone = checked(local, "subject", {"output": {"validation_prompt": ["--output_dir=/elsewhere"]}})
    options = parse_options(flags("subject", alone))
    assert (options.output.output_dir, options.output.validation_prompt) == (None, ["--output_dir=/elsewhere"])


def test_an_unknown_task_is_refused(local):
    with pytest.raises(InputError, match="task must be one of subject, classify"):
        built_of(local, "pretrain", {})


@pytest.mark.parametrize(("task", "group", "field"), [pytest.param(*one, id=f"{one[0]}-{one[2].name}") for one in every_field()])
def test_guests_cannot_set_options_that_refer_to_the_machine(task, group, field, guest, tmp_path):
    value = another(task, field, tmp_path)
    if field.name in MACHINE_FIELDS:
        with pytest.raises(InputError, match=r"on this server|uploaded here|does not offer"):
            checked(guest, task, {group: {field.name: value}})
    else:
        assert checked(guest, task, {group: {field.name: value}}) == {group: {field.name: value}}


def test_all_machine_fields_exist():
    known = {name for task in KINDS for fields in groups(task).values() for name in fields}
    assert known >= MACHINE_FIELDS


def test_guests_may_use_only_their_uploaded_images_and_the_offered_base_models(guest, tmp_path):
    own = guest.new_image_set()
    words = {"instance_prompt": "a photo of sks dog"}
    assert built_of(guest, "subject", {"data": {"instance_data_dir": str(own), **words}}).data.instance_data_dir == str(own)
    assert built_of(guest, "classify", {"data": {"data_dir": str(own)}}).data.data_dir == str(own)
    link = guest.sets / "link"
    link.symlink_to(tmp_path)
    for wrong in (guest.sets, own / "..", own / "deeper", guest.sets / "none", link, "/etc"):
        with pytest.raises(InputError, match=r"uploaded here|no longer exist"):
            built_of(guest, "subject", {"data": {"instance_data_dir": str(wrong), **words}})
    assert built_of(guest, "subject", {"model": {"pretrained_model_name_or_path": "owner/model"}})
    with pytest.raises(InputError, match=r"model 'other/model'\. It offers the built-in model, owner/model"):
        built_of(guest, "subject", {"model": {"pretrained_model_name_or_path": "other/model"}})
    clip = dataclasses.replace(guest, base_models=("open_clip:ViT-B-16/openai",))
    assert built_of(clip, "classify", {"model": {"model": "ViT-B-16", "pretrained": "openai"}})
    with pytest.raises(InputError, match="does not offer the base model 'open_clip:ViT-B-16/laion'"):
        built_of(clip, "classify", {"model": {"model": "ViT-B-16", "pretrained": "laion"}})


@pytest.mark.parametrize("name", ["pictures.csv", "pictures.zip"])
def test_the_page_refuses_files_as_the_dataset_of_a_classifier(local, tmp_path, name):
    (tmp_path / name).write_text("path,label\n/etc/passwd,a\n")
    with pytest.raises(InputError, match="data_dir must be a folder"):
        built_of(local, "classify", {"data": {"data_dir": str(tmp_path / name)}})


def test_folders_become_absolute_paths(local, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert checked(local, "subject", {"data": {"class_data_dir": "dogs"}})["data"]["class_data_dir"] == str(tmp_path / "dogs")


@pytest.mark.parametrize(
    ("task", "given"),
    [
        ("subject", "--method lora --max_train_steps 40 --no_certify --validation_prompt a b --learning_rate 1e-4 --snr_gamma 5"),
        ("subject", ""),
        ("classify", "--shots 2 4 --seeds 0 --method nora lora --rank 12"),
    ],
)
def test_a_terminal_run_is_repeated_from_its_options_that_differ_from_the_defaults(task, given, local):
    options = PARSERS[task](given.split())
    values = changed(task, options.to_dict())
    assert built(task, checked(local, task, values)) == options
    assert sum(len(fields) for fields in values.values()) == given.count("--")
