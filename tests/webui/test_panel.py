"""The expert panel: a widget for every option, and a draft with only the values that the user changed."""

import gradio as gr
import pytest

from pipelines.errors import InputError
from pipelines.methods import DEFAULT, REFERENCE, equation_of, method_names, title_of
from training.options import SubjectOptions
from training.options.command_line import groups_of
from training.options.fewshot import BASELINES, FewShotOptions
from webui import class_presets, panel, presets
from webui.draft import SET_BY_THE_PAGE
from webui.work.form_schema import panel_fields
from webui.work.options import MACHINE_FIELDS, NEVER, default_of, fields_of
from webui.workspace import Workspace

PRESET = presets.Preset("Plain", "no time", "Nothing of its own.", ())
KINDS = {"subject": SubjectOptions, "classify": FewShotOptions}


@pytest.fixture
def workspace(tmp_path):
    return Workspace(tmp_path / "runs", tmp_path / "sets", is_local=True)


@pytest.fixture
def source():
    return panel.FieldSource(None, "subject", presets.SUBJECT, None, None, lambda workspace, draft, options: options)


def typed(group, field, shown, **kept):
    return {"preset": "Balanced", "options": {}, **kept, "typed": {group: {field: shown}}}


@pytest.mark.parametrize("task", KINDS)
def test_the_panel_has_every_option_that_the_page_does_not_set(task):
    shown = {(field.group, field.name) for fields in panel_fields(task, True).values() for field in fields}
    every = {(group, name) for group, kind in groups_of(KINDS[task]).items() for name in fields_of(kind)}
    by_the_page = {(group, name) for group, names in SET_BY_THE_PAGE[task].items() for name in names}
    assert by_the_page <= every
    assert shown == {(group, name) for group, name in every - by_the_page if name not in NEVER}


@pytest.mark.parametrize("task", KINDS)
def test_guests_see_no_option_that_refers_to_the_machine(task):
    shown = {field.name for fields in panel_fields(task, False).values() for field in fields}
    assert not shown & MACHINE_FIELDS
    assert "max_train_steps" in shown | {"max_train_steps"}
    assert len(shown) > 10


@pytest.mark.parametrize("task", KINDS)
def test_every_default_survives_display_and_reading(task):
    groups = groups_of(KINDS[task])
    for fields in panel_fields(task, True).values():
        for field in fields:
            default = default_of(fields_of(groups[field.group])[field.name])
            assert field.help
            # The name of an option may stand in its label before an explanation in brackets.
            assert "_" not in field.label.replace(f"{field.name} (", "")
            # An empty field of a list that must not be empty means the default.
            assert field.read(field.show(default)) == (None if default in ([], None) else default)


def test_a_value_is_stored_and_removed_when_it_is_the_default_again(source, workspace):
    kept = source.with_pending_input(workspace, typed("optimisation", "max_train_steps", "80"))
    assert kept["options"] == {"optimisation": {"max_train_steps": 80}}
    assert not kept["typed"]
    kept = source.with_pending_input(workspace, typed("optimisation", "max_train_steps", "400", options=kept["options"]))
    assert kept["options"] == {}


def test_a_value_is_compared_with_the_active_preset(source, workspace):
    steps = presets.preset_named(presets.SUBJECT, "Fast").options()["optimisation"]["max_train_steps"]
    kept = source.with_pending_input(workspace, typed("optimisation", "max_train_steps", str(steps), preset="Fast"))
    assert kept["options"] == {}
    kept = source.with_pending_input(workspace, typed("optimisation", "max_train_steps", "400", preset="Fast"))
    assert kept["options"] == {"optimisation": {"max_train_steps": 400}}


@pytest.mark.parametrize(
    ("group", "field", "shown", "message"),
    [
        ("optimisation", "max_train_steps", "0", "max_train_steps must be at least 1, got 0"),
        ("optimisation", "max_train_steps", "2.5", "must be a whole number"),
        ("optimisation", "learning_rate", "fast", "must be a number, got 'fast'"),
        ("adapter", "inner_r", "64", "inner_r"),
        ("adapter", "method", "qlora", "method must be one of"),
        ("optimisation", "max_train_steps", "", "must not be empty"),
        ("output", "output_dir", "/etc", "option 'output_dir' does not exist"),
        ("output", "__class__", "x", "does not exist"),
    ],
)
def test_a_wrong_value_is_refused_in_a_sentence(source, workspace, group, field, shown, message):
    before = typed(group, field, shown, options={"adapter": {"rank": 16}})
    with pytest.raises(InputError, match=message):
        source.with_pending_input(workspace, before)
    assert before["options"] == {"adapter": {"rank": 16}}


@pytest.mark.parametrize(
    ("group", "field", "shown", "value"),
    [
        ("optimisation", "learning_rate", "1e-4", 1e-4),
        ("data", "random_flip", True, True),
        ("adapter", "target_modules", "to_q\n to_v, to_k", ["to_q", "to_v", "to_k"]),
        ("model", "mixed_precision", "bf16", "bf16"),
        ("adapter", "method", "lora", "lora"),
    ],
)
def test_every_kind_of_widget_is_read(source, workspace, group, field, shown, value):
    assert source.with_pending_input(workspace, typed(group, field, shown))["options"] == {group: {field: value}}


def test_the_info_of_a_field_names_the_source_of_its_value(source, workspace):
    fields = {field.name: field for group in panel_fields("subject", True).values() for field in group}
    effective = panel._EffectiveValues.of(source, workspace, {"preset": "Fast", "options": {"adapter": {"rank": 16}}})
    assert "Changed (default: not set)." in effective.info(fields["rank"])
    assert "Preset Fast: " in effective.info(fields["max_train_steps"])
    assert effective.info(fields["random_flip"]).endswith(" Default.")
    assert effective.placeholder(fields["learning_rate"]) == "0.003 by default"


@pytest.mark.parametrize("task", KINDS)
def test_every_option_has_a_widget_of_its_kind(source, workspace, task):
    about = panel.FieldSource(None, task, presets.SUBJECT, None, None, lambda workspace, draft, options: {})
    effective = panel._EffectiveValues.of(about, workspace, {"preset": "Balanced", "options": {}})
    kinds = {"choices": gr.Dropdown, "bool": gr.Checkbox, "choice": gr.Dropdown}
    with gr.Blocks():
        for fields in panel_fields(task, True).values():
            for field in fields:
                widget = panel._widget(about, field, effective)
                assert type(widget) is kinds.get(field.kind, gr.Textbox)


def test_the_methods_are_chosen_by_their_names_the_default_first(workspace):
    (one,) = [field for field in panel_fields("subject", True)["adapter"] if field.name == "method"]
    (several,) = [field for field in panel_fields("classify", True)["method"] if field.name == "method"]
    names = [value for _, value in one.titled_choices()]
    assert names[:2] == [DEFAULT, REFERENCE]
    assert sorted(names) == method_names()
    assert several.kind == "choices"
    assert [value for _, value in several.titled_choices()] == [*BASELINES, *names]
    assert several.read(["zeroshot", "lora"]) == several.read("zeroshot\nlora") == ["zeroshot", "lora"]
    assert several.read([]) is None


@pytest.mark.parametrize("method", method_names())
def test_the_panel_explains_the_chosen_method_and_each_option_for_the_chosen_methods_only(source, method):
    effective = panel._EffectiveValues(source, PRESET, {"adapter": {"method": method}}, {})
    fields = {field.name: field for field in panel_fields("subject", True)["adapter"] if effective.applies(field)}
    assert equation_of(method).replace("*", "\N{ASTERISK OPERATOR}") in effective.info(fields["method"])
    # Only the first words of a text are titles of methods.
    told = [effective.info(field).partition(":")[0] for field in fields.values() if field.methods]
    assert set(told) <= {title_of(method)}


def test_the_widgets_of_several_methods_are_built_with_their_events(workspace):
    about = panel.FieldSource(None, "classify", class_presets.CLASSIFY, gr.State({}), None, lambda w, d, o: o)
    with gr.Blocks() as page:
        panel._create(about, {"preset": "Fast", "options": {}}, gr.State(), gr.Button(), workspace)
    (widget,) = [block for block in page.blocks.values() if getattr(block, "elem_id", "") == "classify-method-method"]
    assert widget.multiselect
    assert widget.value == ["zeroshot", "pixels", "linear_probe", DEFAULT]
    events = {event for function in page.fns.values() for block, event in function.targets if block == widget._id}
    assert events == {"input", "blur"}
