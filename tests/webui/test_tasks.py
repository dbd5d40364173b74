"""Both tasks by the same verbs: settings by dataset, presets, the line beside Train, and duplicates."""

import json
import re
from dataclasses import replace
from functools import cache

import pytest
from class_folders import colour_set

from pipelines.adapter_options import AdapterOptions
from pipelines.errors import InputError
from pipelines.sample_subject import sample_images
from pipelines.subject.heldout import MIN_IMAGES_TO_HOLD_OUT, num_folds
from training.fewshot.plan import estimated_seconds
from training.options import NEW_SCENES
from training.options.data import SAMPLE_SUBJECT
from training.options.fewshot import FewShotOptimisationOptions, FewShotOptions, LabelledDataOptions
from training.options.values import default_of, groups, merged, without
from training.runs.run_files import LOADING, SAMPLING, DryRunReport
from webui import launching, tasks
from webui.datasets import EXAMPLE_SUBJECT, Dataset
from webui.draft import EXAMPLE, MAX_STORED, SAMPLE_CLASS, TRIGGER, Draft, RunSettings
from webui.form_schema import validated
from webui.labelled_datasets import MOST_STEPS, find_classes
from webui.tasks import PLANS, ClassifierPlan, SubjectPlan
from webui.uploads import add_images
from webui.workspace import Workspace

EVERY_PRESET = [(plan, preset) for plan in PLANS.values() for preset in plan.presets]
each_preset = pytest.mark.parametrize(
    ("plan", "preset"), EVERY_PRESET, ids=[f"{plan.task}-{preset.name}" for plan, preset in EVERY_PRESET]
)


@pytest.fixture
def workspace(tmp_path):
    return Workspace(tmp_path / "runs", tmp_path / "sets", is_local=True)


# They are rendered, which takes longer than all that a test does with them.
example_photos = cache(sample_images)


def photos_of(workspace, tmp_path, count):
    """The id of a dataset of so many photos."""
    dataset, paths = Dataset(workspace.new_image_set()), []
    for number in range(count):
        paths.append(tmp_path / f"{number}.png")
        example_photos()[number % 5].rotate(number).save(paths[-1])
    add_images(dataset, paths)
    return dataset.folder.name


def of_example(**settings):
    return Draft(settings={EXAMPLE: RunSettings(**settings)})


def test_without_changes_the_trainer_s_defaults_are_trained(workspace):
    assert EXAMPLE_SUBJECT == SAMPLE_SUBJECT
    assert (TRIGGER, SAMPLE_CLASS) == ("sks", "toy")
    assert validated(workspace, "subject", SubjectPlan(workspace, Draft()).values)[0] == {}


@pytest.mark.parametrize("kept", [None, "draft", 3, [], {"set": 3}, {"settings": {"a": {"options": "all"}}}])
def test_an_invalid_draft_of_the_browser_becomes_an_empty_one(kept):
    assert Draft.from_browser(kept) == Draft()


def test_a_draft_survives_the_round_trip_through_the_browser():
    settings = RunSettings("Fast", {"adapter": {"rank": "4"}}, "zxq", "dog", ["at sea"])
    draft = Draft("some-set", "other", 3.0, {"some-set": settings})
    assert Draft.from_browser(json.loads(json.dumps(draft.to_browser()))) == draft
    many = Draft(settings={str(number): settings for number in range(2 * MAX_STORED)})
    assert list(many.to_browser()["settings"])[-1] == str(2 * MAX_STORED - 1)
    assert len(many.to_browser()["settings"]) == MAX_STORED


def test_words_model_and_settings_belong_to_their_photos(workspace, tmp_path):
    duck, car = photos_of(workspace, tmp_path, 3), photos_of(workspace, tmp_path, 3)
    sdxl = {"model": {"pretrained_model_name_or_path": "stabilityai/stable-diffusion-xl-base-1.0"}}
    draft = Draft(set=duck, settings={duck: RunSettings("Fast", sdxl, "zxq", "duck")})
    assert SubjectPlan(workspace, draft).settings.kind == "duck"
    for other, word in ((car, ""), (None, "toy")):
        settings = SubjectPlan(workspace, replace(draft, set=other)).settings
        assert (settings.kind, settings.options, settings.trigger) == (word, {}, "sks")
        assert SubjectPlan(workspace, replace(draft, set=other)).preset.name == "Balanced"
    assert SubjectPlan(workspace, replace(replace(draft, set=car), set=duck)).settings.kind == "duck"


def test_a_copy_of_photos_keeps_their_settings_and_the_example_s_are_not_for_the_user_s_photos(workspace, tmp_path):
    duck = photos_of(workspace, tmp_path, 3)
    draft = Draft(set=duck, settings={duck: RunSettings(class_word="duck"), EXAMPLE: RunSettings(trigger="zxq")})
    assert SubjectPlan(workspace, draft.moved_to("copy")).settings.kind == "duck"
    assert SubjectPlan(workspace, replace(draft, set=None).moved_to("mine")).settings == RunSettings()


@each_preset
def test_a_preset_sets_existing_options_with_reasons_and_differs_from_the_defaults(plan, preset):
    for value in preset.values:
        group, _, name = value.option.partition(".")
        option = groups(plan.task)[group][name]
        assert value.below in (None, MIN_IMAGES_TO_HOLD_OUT)
        assert value.reason.endswith(".")
        assert len(value.reason) < 160
        assert preset.name == "Balanced" or value.value != default_of(option) or name == "shots"


@each_preset
@pytest.mark.parametrize("num_images", [3, 9])
def test_the_recipe_accepts_every_preset(plan, preset, num_images, workspace, tmp_path):
    key = photos_of(workspace, tmp_path, num_images) if plan is SubjectPlan else colour_set(workspace, tmp_path / "given").id
    draft = Draft(set=key, settings={key: RunSettings(preset.name, class_word="owl")})
    _, options = validated(workspace, plan.task, plan(workspace, draft).values)
    folder = options.data.instance_data_dir if plan is SubjectPlan else options.data.data_dir
    assert folder == str((workspace.sets / key).absolute())


def values_of(workspace, plan, draft, preset):
    settings = replace(draft.settings[draft.set], preset=preset.name)
    return plan(workspace, draft.with_settings(draft.set, settings)).values


@each_preset
def test_a_duplicate_has_the_run_s_preset_and_starts_the_same_run(plan, preset, workspace, tmp_path):
    key = photos_of(workspace, tmp_path, 4) if plan is SubjectPlan else colour_set(workspace, tmp_path / "given").id
    group, name = ("optimisation", "max_grad_norm")
    for changes in ({}, {group: {name: 0.5}}):
        before = Draft(set=key, settings={key: RunSettings(preset.name, changes, "zxq", "owl", ["at sea"])})
        started, _ = validated(workspace, plan.task, plan(workspace, before).values)
        again = plan.like(workspace, Draft(), started)
        settings = plan(workspace, again).settings
        assert validated(workspace, plan.task, plan(workspace, again).values)[0] == started
        # With few images, two presets of the classifier are the same.
        same = [each.name for each in plan.presets if values_of(workspace, plan, before, each) == plan(workspace, before).values]
        assert (settings.preset, settings.options) == (same[0], changes)
        if plan is SubjectPlan:
            assert (settings.trigger, settings.kind, settings.prompts[1:]) == ("zxq", "owl", ["a photo of zxq owl at sea"])


@pytest.mark.parametrize(("count", "heldout", "folds"), [(4, "none", 0), (5, "auto", 0)])
def test_fast_does_not_cross_validate(workspace, tmp_path, count, heldout, folds):
    key = photos_of(workspace, tmp_path, count)
    draft = Draft(set=key, settings={key: RunSettings("Fast", class_word="duck")})
    _, options = validated(workspace, "subject", SubjectPlan(workspace, draft).values)
    assert options.data.heldout_image == heldout
    assert num_folds(count, heldout) == folds


def test_the_ranks_of_best_are_for_the_default_method_alone(workspace):
    ranks = {}
    for method in ("nora", "auto", "lora"):
        plan = SubjectPlan(workspace, of_example(preset="Best", options={"adapter": {"method": method}}))
        ranks[method] = plan.checked[1].adapter.rank
        assert any(each.option == "adapter.rank" for each in plan.preset_values) == (method != "lora")
    assert ranks == {"nora": 48, "auto": 48, "lora": AdapterOptions("lora").rank}


def minutes(line):
    return int(re.search(r"about (\d+) min", line)[1])


def test_the_line_beside_train_says_what_it_will_do(workspace, tmp_path):
    assert SubjectPlan(workspace, of_example(preset="Fast")).describe() == "sks toy · Fast · demo model · about 80 seconds"
    changed = of_example(preset="Fast", options={"adapter": {"rank": "8"}, "optimisation": {"seed": "3"}})
    assert " · Fast · 2 settings changed · demo model · " in SubjectPlan(workspace, changed).describe()
    key = colour_set(workspace, tmp_path / "given").id
    line = ClassifierPlan(workspace, Draft(set=key)).describe()
    assert re.fullmatch(r"your classes · Fast · demo model · about \d+ (seconds|minutes?)", line)


def test_the_demo_model_is_said_to_take_as_long_as_the_line_beside_train_says(workspace):
    assert minutes(tasks.on_this_machine(True)) == minutes(SubjectPlan(workspace, Draft()).describe())


@pytest.mark.parametrize("changes", [{"min_train_steps": 800}, {"train_batch_size": 64}])
def test_the_estimate_of_a_classifier_grows_with_steps_batches_and_images(workspace, changes):
    def seconds(of_data, of_optimisation, key="shapes"):
        data = LabelledDataOptions(seeds=[0], **of_data)
        options = FewShotOptions(data=data, optimisation=FewShotOptimisationOptions(**of_optimisation))
        classes = find_classes(workspace, key)
        return estimated_seconds(options, len(classes.classes), classes.fewest, classes.num_tested)

    assert seconds({}, changes) > 1.5 * seconds({}, {})
    # The digits have more test images than the shapes, and one class more.
    assert seconds({}, {}) < seconds({}, {}, "digits") < seconds({"shots": ["16", "8"]}, {}, "digits")


def test_the_estimate_counts_cross_validation(workspace, tmp_path):
    lines = {}
    for count in (4, 5):
        key = photos_of(workspace, tmp_path, count)
        lines[count] = SubjectPlan(workspace, Draft(set=key, settings={key: RunSettings(class_word="duck")})).describe()
    assert minutes(lines[4]) >= 2 * minutes(lines[5])


@pytest.mark.parametrize(("accelerator", "words"), [(False, "hours on this CPU"), (True, "time not measured yet")])
def test_sdxl_takes_hours_on_a_cpu_and_is_not_guessed_elsewhere(workspace, monkeypatch, accelerator, words):
    monkeypatch.setattr(tasks, "gpu", lambda: ("A GPU", 80.0) if accelerator else None)
    model = {"pretrained_model_name_or_path": "stabilityai/stable-diffusion-xl-base-1.0"}
    assert (
        SubjectPlan(workspace, of_example(options={"model": model})).describe()
        == f"sks toy · Balanced · 1 setting changed · SDXL · {words}"
    )


def test_the_pace_is_that_of_the_newest_finished_run_with_the_model(workspace):
    _, options = validated(workspace, "subject", {"model": {"pretrained_model_name_or_path": "owner/model"}})
    path = workspace.new_run()
    (path / "options.json").write_text(json.dumps(options.to_dict()))
    status = {"state": "done", "plan": [{"name": LOADING, "seconds": 30.0}, {"name": SAMPLING, "seconds": 60.0}]}
    (path / "status.json").write_text(json.dumps(status))
    DryRunReport(1, 6.0, 1.0, 1, 1, 1, 1, None).write(path)
    line = SubjectPlan(workspace, of_example(options={"model": {"pretrained_model_name_or_path": "owner/model"}})).describe()
    # 400 steps of 6 seconds are 40 minutes.
    assert 50 < minutes(line) < 90


def test_a_run_s_options_are_checked_once_and_its_photos_sealed_only_if_they_are_valid(workspace, tmp_path, monkeypatch):
    checks = []
    for module in (tasks, launching):
        monkeypatch.setattr(module, "validated", lambda *given: checks.append(given) or validated(*given))
    monkeypatch.setattr(launching, "_spawn", lambda *given: None)
    key = photos_of(workspace, tmp_path, 3)
    steps = {count: {"optimisation": {"max_train_steps": count}} for count in ("0", "8")}
    drafts = {count: Draft(key, settings={key: RunSettings(options=steps[count], class_word="duck")}) for count in steps}
    with pytest.raises(InputError, match="must be at least 1, got 0"):
        SubjectPlan(workspace, drafts["0"]).start()
    assert not Dataset.of(workspace, key).content().is_sealed
    checks.clear()
    SubjectPlan(workspace, drafts["8"]).start()
    assert Dataset.of(workspace, key).content().is_sealed
    assert len(checks) == 1


def test_missing_words_photos_or_classes_are_named_instead(workspace, tmp_path):
    key = photos_of(workspace, tmp_path, 3)
    with pytest.raises(InputError, match="The class word under Check is empty"):
        SubjectPlan(workspace, Draft(set=key)).describe()
    with pytest.raises(InputError, match="There are no photos yet"):
        SubjectPlan(workspace, Draft(set=workspace.new_image_set().name)).start()
    with pytest.raises(InputError, match="must be at least 1, got 0"):
        SubjectPlan(workspace, of_example(options={"optimisation": {"max_train_steps": "0"}})).describe()


def test_a_scene_is_appended_to_the_prompt_unless_it_contains_the_trigger_word():
    settings = RunSettings(trigger="zxq", class_word="dog", scenes=["at sea", "a painting of zxq dog", "with zxqs"])
    dog = "a photo of zxq dog"
    assert settings.prompts == [dog, f"{dog} at sea", "a painting of zxq dog", f"{dog} with zxqs"]
    assert RunSettings(class_word="dog").scene_lines == "\n".join(NEW_SCENES)


def test_the_class_prompt_contains_the_class_word(workspace):
    draft = of_example(class_word="owl", options={"data": {"with_prior_preservation": "true"}})
    assert SubjectPlan(workspace, draft).values["data"]["class_prompt"] == "a photo of an owl"


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ({"trigger": "two words"}, "must be one word"),
        ({"trigger": "<b>"}, "must be one word"),
        ({"trigger": "toy", "class_word": "Toy"}, "are both 'toy'"),
        ({"class_word": ""}, "class word under Check is empty"),
        ({"class_word": "a b c d e"}, "one to four plain words"),
        ({"class_word": "-dog"}, "one to four plain words"),
        ({"class_word": "dog", "scenes": ["x"] * 12}, "At most 11 preview prompts"),
        ({"class_word": "dog", "scenes": ["x" * 301]}, "at most 300 characters"),
        ({"class_word": "dog", "scenes": ["--output_dir=/"]}, "not begin with a hyphen"),
    ],
)
def test_invalid_words_are_refused(words, message):
    with pytest.raises(InputError, match=message):
        RunSettings(**words).check_words()


def test_values_are_merged_and_removed_by_group():
    values = merged({"data": {"seed": 1, "a": 1}}, {"data": {"a": 2}, "output": {"b": 3}})
    assert values == {"data": {"seed": 1, "a": 2}, "output": {"b": 3}}
    assert without(values, {"output": ("b",), "data": ("seed",)}) == {"data": {"a": 2}}


def test_classifier_values_fit_the_number_of_images(workspace, tmp_path):
    dataset = colour_set(workspace, tmp_path / "given")
    classes = find_classes(workspace, dataset.id)
    # Four of six images are not test images: two for training and two for validation.
    for wanted, fitting in (("2", "2"), ("16", "all")):
        assert classes.fitted({"data": {"shots": [wanted]}}, {})["data"]["shots"] == [fitting]
    chosen = {"data": {"shots": ["3"]}}
    assert classes.fitted(chosen, chosen)["data"]["shots"] == ["3"]
    steps = find_classes(workspace, "digits").fitted({"data": {"shots": ["all"]}}, {})["optimisation"]
    assert steps["iterations_per_shot"] == MOST_STEPS // (174 - round(0.3 * 174))
