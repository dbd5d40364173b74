"""The expert form: every option of a task in human words, what an empty field means, and errors at the fields."""

import re

import pytest

from pipelines.adapter_options import AdapterOptions
from pipelines.methods import DEFAULT, REFERENCE, equation_of, method_names
from training.options.fewshot import BASELINES, FewShotMethodOptions
from training.options.values import KINDS, groups
from webui import panel
from webui.draft import EXAMPLE, Draft, RunSettings
from webui.form_schema import GROUP_TITLES, MACHINE_FIELDS, NEVER, SET_BY_THE_PAGE, UNITS, WORDS, form_fields
from webui.tasks import PLANS, ClassifierPlan, SubjectPlan
from webui.workspace import Workspace


@pytest.fixture
def workspace(tmp_path):
    return Workspace(tmp_path / "runs", tmp_path / "sets", is_local=True)


def state(plan, workspace, **settings):
    return panel.form_state(plan(workspace, Draft(settings={EXAMPLE: RunSettings(**settings)})))


def fields_by_name(task, is_local=True):
    return {field.name: field for fields in form_fields(task, is_local).values() for field in fields}


@pytest.mark.parametrize("task", KINDS)
def test_the_form_has_every_option_that_the_page_does_not_set(task):
    shown = {(field.group, field.name) for fields in form_fields(task, True).values() for field in fields}
    every = {(group, name) for group, options in groups(task).items() for name in options}
    by_the_page = {(group, name) for group, names in SET_BY_THE_PAGE[task].items() for name in names}
    assert by_the_page <= every
    assert shown == {(group, name) for group, name in every - by_the_page if name not in NEVER}


@pytest.mark.parametrize("task", KINDS)
def test_guests_see_no_option_that_refers_to_the_machine(task):
    shown = fields_by_name(task, is_local=False).keys()
    assert not shown & MACHINE_FIELDS
    assert len(shown) > 10


@pytest.mark.parametrize("task", KINDS)
def test_labels_are_words(task):
    for fields in form_fields(task, True).values():
        for field in fields:
            assert "_" not in field.label
            assert field.help


def test_labels_and_units_are_those_of_options_that_exist():
    names = {name for task in KINDS for options in groups(task).values() for name in options}
    assert {*WORDS["labels"], *UNITS} <= names
    assert {*GROUP_TITLES} == {group for task in KINDS for group in groups(task)}


@pytest.mark.parametrize("plan", PLANS.values(), ids=PLANS)
def test_no_placeholder_is_a_path_of_the_machine(plan, workspace):
    texts = [text for text in state(plan, workspace)["base"].values() if isinstance(text, str)]
    assert len(texts) > 20
    assert [text for text in texts if re.search(r"(^|[ =])/\w", text)] == []


def test_an_empty_field_shows_what_the_preset_the_trainer_or_the_default_decides(workspace):
    shown = state(SubjectPlan, workspace, preset="Fast")
    assert shown["base"]["optimisation.max_train_steps"] == "160"
    assert shown["notes"]["optimisation.max_train_steps"].startswith("Fast: ")
    assert shown["base"]["optimisation.learning_rate"] == "0.001"
    assert shown["base"]["data.center_crop"] == "on"
    assert shown["base"]["adapter.method"] == "NoRA"
    assert "data.cache_dir" not in shown["base"]


def test_the_user_s_values_are_sent_only_to_be_shown_for_another_dataset_or_replaced_settings(workspace):
    draft = Draft(settings={EXAMPLE: RunSettings(options={"adapter": {"rank": "16"}})})
    before = panel.form_state(SubjectPlan(workspace, draft))
    edited = Draft(settings={EXAMPLE: RunSettings(options={"adapter": {"rank": "8"}})})
    assert panel.form_state(SubjectPlan(workspace, edited))["key"] == before["key"]
    replaced = draft.with_settings(EXAMPLE, RunSettings())
    assert panel.form_state(SubjectPlan(workspace, replaced))["key"] != before["key"]
    other = Draft(set=workspace.new_image_set().name, settings=draft.settings)
    assert panel.form_state(SubjectPlan(workspace, other))["key"] != before["key"]


@pytest.mark.parametrize(
    ("group", "field", "given", "message"),
    [
        ("optimisation", "max_train_steps", "0", "Training steps .--max_train_steps. must be at least 1, got 0"),
        ("optimisation", "max_train_steps", "2.5", "must be a valid integer"),
        ("optimisation", "learning_rate", "fast", "Learning rate .--learning_rate. must be a valid number.* got 'fast'"),
        ("adapter", "inner_r", "64", r"must be in \[1, r=32\], got 64"),
        ("adapter", "method", "qlora", "Adapter method .--method. must be one of"),
    ],
)
def test_an_error_stands_at_its_field_with_its_label(workspace, group, field, given, message):
    errors = state(SubjectPlan, workspace, options={group: {field: given}})["errors"]
    assert list(errors) == [f"{group}.{field}"]
    assert re.search(message, errors[f"{group}.{field}"])


def test_an_option_that_no_longer_exists_is_an_error_of_the_whole_form(workspace):
    errors = state(SubjectPlan, workspace, options={"optimisation": {"gone": "3"}})["errors"]
    assert "no option 'gone'" in errors[""]


def test_the_methods_are_chosen_by_their_names_the_default_first():
    one, several = fields_by_name("subject")["method"], fields_by_name("classify")["method"]
    names = [value for _, value in one.choices]
    assert (one.kind, several.kind) == ("choice", "choices")
    assert names[:2] == [DEFAULT, REFERENCE]
    assert sorted(names) == method_names()
    assert [value for _, value in several.choices] == [*BASELINES, *names]


def has(options, *methods):
    """The options that any of `methods` has."""
    return {name for name, option in options.method_options.items() if set(methods) & set(option.methods)}


def shown_for(task, group, methods):
    """The options of methods that the form shows for a run of `methods`."""
    return {field.name for field in form_fields(task, True)[group] if set(field.methods) & set(methods)}


@pytest.mark.parametrize("method", method_names())
def test_the_form_has_the_options_of_the_chosen_methods_and_explains_the_method(workspace, method):
    shown = state(SubjectPlan, workspace, options={"adapter": {"method": method}})
    assert shown["methods"] == [method]
    assert equation_of(method) in shown["notes"]["adapter.method"]
    assert shown_for("subject", "adapter", [method]) == has(AdapterOptions, method)
    assert shown_for("classify", "method", ["zeroshot", method]) == has(FewShotMethodOptions, method)


def test_without_a_choice_the_form_has_the_methods_of_the_preset(workspace):
    shown = state(ClassifierPlan, workspace)
    assert shown["methods"] == shown["base"]["method.method"] == ["zeroshot", "pixels", "linear_probe", DEFAULT]
    assert state(SubjectPlan, workspace)["methods"] == [DEFAULT]
