"""The screen Arena: what Start would do, the arena that it starts, and what the screen shows of one."""

import re
import shutil

import pytest
from arena_folders import arena_in, running_cell
from class_folders import colour_set
from listeners import listener
from playwright.sync_api import expect
from processes import kill_all_naming, standing_for_accelerate, wait_for
from run_folders import end_processes, process_of

from pipelines.errors import InputError
from pipelines.fewshot.loading import load_images
from training.arena import schedule_of
from training.options.arena import ArenaOptions
from training.options.command_line import options_from_flags
from training.runs.arena_files import ArenaReport
from training.runs.arena_results import PRIMARY, ranked
from training.runs.run_files import Launch, RunStatus
from webui import launching
from webui.arenas import ArenaPlan, known_words, photo_titles
from webui.datasets import Dataset
from webui.draft import EXAMPLE, Draft, RunSettings
from webui.page import build_page
from webui.runs import RunView
from webui.screens import train
from webui.screens.arena import DOWNLOADS, MOST_TICKS, charts, contents, round_ticks
from webui.screens.classify import check_free
from webui.screens.runs import cards, comparable
from webui.workspace import Settings, Workspace

PATIENCE = 120_000


@pytest.fixture
def workspace(tmp_path):
    return Workspace(tmp_path / "runs", tmp_path / "sets", is_local=True)


@pytest.fixture
def without_start(monkeypatch):
    """Nothing is started."""
    monkeypatch.setattr(launching, "_spawn", lambda *_: None)


def plan_of(workspace, **given):
    values = {"photos": [EXAMPLE], "words": "toy", "classes": [], "methods": ["lora", "nora"]}
    return ArenaPlan(workspace, **(values | {"unit": "steps", "budget": 200, "seeds": 2, "shots": [1, 2]} | given))


def started(workspace, plan):
    """The options that the command of a started arena reads."""
    path = workspace.runs.absolute() / plan.start()
    words = launching.arena_command(path)
    assert words[:3] == list(launching.ARENA)
    return options_from_flags(ArenaOptions, words[3:])


@pytest.mark.parametrize(
    "given",
    [
        {},
        {"photos": [EXAMPLE, EXAMPLE], "words": "toy, coffee mug", "unit": "seconds", "budget": 30},
        {"photos": [], "words": "", "classes": ["shapes"], "methods": ["zeroshot", "lora"]},
        {
            **{"photos": [EXAMPLE, EXAMPLE], "words": "toy, toy", "classes": ["shapes"], "methods": ["linear_probe", "nora"]},
            **{"unit": "seconds", "budget": 30},
        },
    ],
)
def test_start_says_how_many_runs_the_arena_plans(workspace, without_start, given):
    plan = plan_of(workspace, **given)
    (runs,) = re.findall(r"in (\d+) runs", plan.describe())
    schedule = schedule_of(started(workspace, plan))
    _, planned = schedule.progress()
    # With a budget of seconds, the runs of a sweep are planned when the pace is known.
    swept = 3 * sum(schedule.steps(task, one, name) is None for task, one in schedule.pairs() for name in task.datasets)
    assert int(runs) == planned + swept


def test_an_arena_has_the_photos_in_their_order_and_the_classes_by_their_names(workspace, without_start, tmp_path):
    classes = colour_set(workspace, tmp_path / "given")
    first = classes.content().classes[0]
    classes.rename_class(first.folder, "a red / mug")
    options = started(workspace, plan_of(workspace, photos=[EXAMPLE] * 2, words="toy, toy", classes=[classes.id], shots=[1]))
    assert options.data.class_words == ["toy=toy", "toy-2=toy"]
    (table,) = options.data.datasets
    labelled = load_images(table)
    assert "a red / mug" in labelled.classes
    parts = {classes.folder / image.file: image.part for one in classes.content().classes for image in one.images}
    assert {image.source.path: labelled.parts[image.name] for image in labelled.images} == parts
    assert schedule_of(options).tasks[0].datasets == ["toy", "toy-2"]


def test_the_classes_of_an_active_arena_cannot_be_changed(workspace, without_start, tmp_path):
    classes = colour_set(workspace, tmp_path / "given")
    path = workspace.runs / plan_of(workspace, photos=[], words="", classes=[classes.id], shots=[1]).start()
    RunStatus(state="running", **process_of("running")).write(path)
    with pytest.raises(InputError, match="A run is training on these images"):
        check_free(workspace, classes.folder)
    end_processes()
    check_free(workspace, classes.folder)


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"words": ""}, "class word for each chosen subject.*1 subject chosen, got 0 words"),
        ({"words": "toy=x"}, "one to four plain words.*got 'toy=x'"),
        ({"photos": ["../other"]}, "no longer exist"),
        ({"photos": [], "words": ""}, "Choose photos of a subject, labelled datasets, or both"),
        ({"methods": ["lora:instance_data_dir=/etc"]}, "methods must be among.*got 'lora:instance_data_dir"),
        ({"methods": ["zeroshot"]}, "Choose an adapter method"),
        ({"methods": []}, "Choose an adapter method"),
        ({"budget": 0}, "max_train_steps must be at least 1, got 0"),
        ({"classes": ["shapes"], "shots": []}, "shots must be"),
        ({"classes": ["shapes"], "shots": [400]}, "400 shots need 404 images of each class.*Choose fewer shots"),
    ],
)
def test_an_arena_that_cannot_start_says_why_and_writes_nothing(workspace, without_start, given, message):
    plan = plan_of(workspace, **given)
    for attempt in (plan.describe, plan.start):
        with pytest.raises(InputError, match=message):
            attempt()
    assert not workspace.runs.exists()


def test_the_class_words_of_photos_are_those_of_their_runs(workspace):
    few = Dataset(workspace.new_image_set())
    with few.change():
        pass
    draft = Draft(settings={"mine": RunSettings(class_word="dog")})
    assert known_words([EXAMPLE, "mine", "other"], draft) == "toy, dog, ?"
    assert photo_titles(workspace, draft) == {EXAMPLE: "Example: toy (5 photos)"}


def test_an_arena_is_stopped_and_goes_on_with_the_same_command(workspace, monkeypatch):
    monkeypatch.setattr(launching, "_with_launcher", standing_for_accelerate)
    run_id = plan_of(workspace).start()
    view = lambda: RunView(workspace.run(run_id))  # noqa: E731
    try:
        wait_for(lambda: view().state == "running")
        assert view().task == "arena"
        command = (view().record.path / "began").read_text()
        launching.stop(workspace, run_id)
        wait_for(lambda: view().state == "stopped" and view().record.process() is None)
        assert "Runs that have ended are not repeated. Resume continues with the others." in view().ending
        (view().record.path / "began").unlink()
        launching.resume(workspace, run_id)
        wait_for(lambda: view().state == "running")
        assert (view().record.path / "began").read_text() == command
        assert Launch.read(view().record.path).command == launching.arena_command(view().record.path.absolute())
    finally:
        kill_all_naming(workspace.runs)


def test_the_command_of_an_arena_has_this_python_environment(tmp_path):
    words = launching._with_launcher(launching.arena_command(tmp_path))
    assert words[1:4] == ["-P", "-m", "training.arena"]


@pytest.fixture(scope="module")
def arena(tmp_path_factory):
    """An arena that was started in a terminal, with results for both tasks."""
    return arena_in(tmp_path_factory.mktemp("arenas") / "runs" / "arena", seeds=2)


def test_an_arena_is_one_run_in_the_lists_and_is_not_compared_with_runs(arena, tmp_path):
    workspace = Workspace(arena.path.parent, tmp_path, is_local=True)
    assert workspace.run_ids() == ["arena"]
    view = RunView(arena)
    assert (view.task, view.title, view.actions) == ("arena", "toy, coffee mug, digits", ("delete",))
    assert "Arena ·" in cards([view], None)
    shutil.copytree(arena.path, tmp_path / "runs" / "a")
    shutil.copytree(arena.path, tmp_path / "runs" / "b")
    with pytest.raises(InputError, match="Choose runs of the same kind"):
        comparable(Workspace(tmp_path / "runs", tmp_path), ["a", "b"])
    assert train.contents(view)["next"].make().value == "See the comparison"


def test_the_screen_shows_verdict_tables_differences_and_failures(arena):
    shown = contents(RunView(arena), [RunView(arena)])
    report = shown["report"].make().value
    for words in (
        "has the best held-out loss on the subjects", "has the best top-1 on the labelled datasets at 16 shots",
        "Base model", "LoRA (rank 1)", "Differences to", "Adjusted p", "Held-out loss against parameters", "Top-1 by shots",
        "LoftQ on subjects", "loftq needs --quantize nf4", "Methods at 1 shot", "Every method was trained for 200 steps",
    ):  # fmt: skip
        assert words in report, words
    assert all(shown[name].make().visible for name in DOWNLOADS)


def test_a_chart_has_a_better_value_further_up_and_the_front_in_order_of_parameters(arena):
    report = ArenaReport.read(arena.path)
    (subjects,), (labelled, by_shots) = charts(report).values()
    for task, chart, shots in (("subject", subjects, None), ("few-shot", labelled, 16)):
        order = [one.variant for one in ranked(report.summaries, task, shots, PRIMARY[task])]
        heights = [chart.marks[variant][2] for variant in order]
        assert heights == sorted(heights, reverse=True)
        front = dict(chart.lines)["front"]
        assert front == sorted(front)
        assert set(front) == {(x, y) for css, x, y in chart.marks.values() if css == "front"}
    assert [text for text, _ in by_shots.x_ticks] == ["1", "2", "4", "8", "16"]


@pytest.mark.parametrize(("low", "high"), [(0.1, 0.2), (0.1843, 0.2190), (0, 1), (0.5, 0.5), (3.0, 4210.0)])
def test_the_ticks_of_an_axis_are_few_round_numbers_within_it(low, high):
    ticks = round_ticks(low, high)
    assert len(ticks) <= MOST_TICKS + 1
    assert all(low - 1e-9 <= tick <= high + 1e-9 for tick in ticks)
    assert len(ticks) >= 3 or low == high


def test_what_is_written_in_an_arena_is_escaped(tmp_path):
    nasty = "<script>alert(1)</script>"
    methods = {nasty: (1.0, 100), "lora": (0.9, 10)}
    arena = arena_in(tmp_path / "arena", seeds=1, methods=methods, failed={f"subject/{nasty}": nasty})
    shown = contents(RunView(arena), [RunView(arena)])
    html = shown["report"].make().value + shown["state"].make().value
    assert "<script" not in html
    assert "&lt;script&gt;" in html


def test_an_arena_without_a_report_shows_what_runs(tmp_path):
    arena = arena_in(tmp_path / "arena", state="running", seeds=1, **process_of("running"))
    (arena.path / ArenaReport.NAME).unlink()
    running_cell(arena.path)
    shown = contents(RunView(arena), [RunView(arena)])
    state = shown["state"].make().value
    end_processes()
    assert "NoRA on toy: trial with learning rate 0.01, seed 0" in state
    assert re.search(r"30% · run 12 of 40 · \d+ minutes left", state)
    assert not shown["report"].make().visible
    assert not shown["json"].make().visible


def test_a_report_that_cannot_be_read_is_a_warning(tmp_path):
    arena = arena_in(tmp_path / "arena", seeds=1)
    (arena.path / ArenaReport.NAME).write_text("{")
    assert "warning" in contents(RunView(arena), [RunView(arena)])["report"].make().value


def test_a_sheet_names_its_methods_only_when_they_are_asked_for(arena, tmp_path):
    page = build_page(Settings(runs_dir=arena.path.parent, sets_dir=tmp_path))
    show, reveal = (listener(page, "arena", name) for name in ("show_sheet", "show_key"))
    sheet = next(iter(contents(RunView(arena), [RunView(arena)])["sheet"].make().choices))[1]
    assert "LoRA" not in show(sheet, None)
    assert "LoRA" in reveal(sheet, None)
    for wrong in ("arena/../../x", "arena/", "other/toy-seed-0", None):
        with pytest.raises(InputError, match=r"no longer exists|does not exist"):
            show(wrong, None)


def test_without_an_arena_the_form_is_open():
    shown = contents(None, [])
    assert "Nothing has been compared yet" in shown["state"].make().value
    assert shown["form"].make().open


@pytest.mark.slow(30)
def test_an_arena_is_started_and_stopped_on_the_screen(app_server, page):
    server = app_server(script="tests/webui/stand_in_app.py")
    page.goto(f"{server.url}?tab=arena")
    expect(page.locator("#arena-plan")).to_contain_text("trainings of 200 steps in 40 runs", timeout=PATIENCE)
    page.locator("#arena-form [aria-label=Seeds]").fill("2")
    expect(page.locator("#arena-plan")).to_contain_text("in 16 runs", timeout=PATIENCE)
    page.click("#arena-start")
    expect(page.locator("#arena-state .chip")).to_have_text("running", timeout=PATIENCE)
    page.click("#arena-stop")
    expect(page.locator("#arena-state .chip")).to_have_text("stopped", timeout=PATIENCE)
    expect(page.locator("#arena-resume")).to_be_visible(timeout=PATIENCE)
