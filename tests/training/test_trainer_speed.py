"""The stopwatch of the speed benchmark, on trainers whose speed is known."""

import importlib.util
import os
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

from pipelines.errors import InputError

PROGRAM = Path(__file__).parents[2] / "benchmarks" / "trainer_speed.py"
# Its own work alone moves its clock; and it takes steps before its own that are not to be counted.
TRAINER = """
import sys, time, torch
clock = [0.0]
time.perf_counter = lambda clock=clock: clock[0]
class Slow(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x): return x.clone()
    @staticmethod
    def backward(ctx, g, clock=clock):
        clock[0] += {backward}
        return g
weight = torch.nn.Parameter(torch.ones(3))
optimizer = torch.optim.AdamW([weight])
for step in range(3):
    clock[0] += 0.25
    optimizer.step()
for step in range(int(sys.argv[sys.argv.index("--max_train_steps") + 1])):
    clock[0] += {elsewhere}
    Slow.apply(weight).sum().backward()
    optimizer.step()
"""


@pytest.fixture(scope="module")
def benchmark():
    """The benchmark as a module."""
    spec = importlib.util.spec_from_file_location("trainer_speed", PROGRAM)
    module = importlib.util.module_from_spec(spec)
    sys.modules["trainer_speed"] = module
    spec.loader.exec_module(module)
    return module


def trainer(benchmark, folder, name, **seconds):
    """A trainer that takes so many seconds a step, as a side of the benchmark."""
    script = folder / f"{name}.py"
    script.write_text(TRAINER.format(**seconds))
    return benchmark.Side([str(script), "--max_train_steps", "15"], before=3)


@pytest.mark.slow(20)
def test_the_stopwatch_finds_the_steps_a_second_and_the_phases_of_known_trainers(benchmark, tmp_path):
    seconds = {"a": {"elsewhere": 0.01, "backward": 0.02}, "b": {"elsewhere": 0.01, "backward": 0.05}}
    found = benchmark.measured({name: trainer(benchmark, tmp_path, name, **each) for name, each in seconds.items()}, tmp_path)
    for name, each in seconds.items():
        assert found[name]["steps_per_second"] == pytest.approx(1 / sum(each.values()))
        assert found[name]["milliseconds"]["backward"] == pytest.approx(1000 * each["backward"])
        assert found[name]["milliseconds"]["everything else"] == pytest.approx(1000 * each["elsewhere"])


def test_a_trainer_that_fails_is_named_with_what_it_said(benchmark, tmp_path):
    class Plain(benchmark.Side):
        """A program that is started without a stopwatch."""

        def start(self, log, turns):
            with log.open("w") as out:
                return subprocess.Popen([sys.executable, "-c", self.command[1]], stdout=out, stderr=subprocess.STDOUT)

    sides = {"good": Plain(["good.py", ""]), "bad": Plain(["bad.py", "raise SystemExit('no such flag')"])}
    with pytest.raises(RuntimeError, match=r"bad\.py failed: .*no such flag"):
        benchmark.measured(sides, tmp_path)


def test_two_sides_never_work_at_once(benchmark):
    (first_reads, second_writes), (second_reads, first_writes) = os.pipe(), os.pipe()
    both = (
        benchmark.AlternatingRuns(first_reads, first_writes, True),
        benchmark.AlternatingRuns(second_reads, second_writes, False),
    )
    at_work, seen = [], []

    def work(name, turns):
        watch = benchmark.Stopwatch(alternating=turns)
        watch.end_step(time.perf_counter())
        for _ in range(5):
            at_work.append(name)
            # Gives way to the other thread, if that is at work.
            time.sleep(0)
            seen.append(list(at_work))
            at_work.remove(name)
            watch.end_step(time.perf_counter())
        os.close(turns.writes)

    threads = [threading.Thread(target=work, args=pair) for pair in zip("ab", both, strict=True)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert seen == [["a"], ["b"]] * 5


class LongTurns:
    """The other side takes 1000 seconds at each of its turns."""

    begins = True

    def __init__(self, pass_time):
        self.wait = lambda: pass_time(1000)

    def give(self):
        """The other side is told nothing."""


def test_neither_steps_before_the_trainings_own_nor_the_other_sides_are_counted(benchmark, monkeypatch):
    now = 0.0

    def pass_time(seconds):
        nonlocal now
        now += seconds

    watch = benchmark.Stopwatch(before=2, alternating=LongTurns(pass_time))
    monkeypatch.setattr(benchmark.time, "perf_counter", lambda: now)
    for seconds in (100, 100, *[50] * benchmark.WARM_UP, *[1] * 9):
        watch.calls.append(("backward", now + 0.1 * seconds, now + 0.6 * seconds))
        pass_time(seconds)
        watch.end_step(now)
    found = watch.result()
    assert found["steps_per_second"] == pytest.approx(1)
    assert found["milliseconds"] == {"backward": pytest.approx(500), "everything else": pytest.approx(500)}


def test_one_step_during_which_the_disk_was_busy_changes_nothing(benchmark):
    steady = benchmark.Stopwatch(steps=[(float(k), k + 0.5) for k in range(20)])
    busy = benchmark.Stopwatch(steps=[*steady.steps[:10], (10.0, 19.0), *steady.steps[11:]])
    assert busy.result() == steady.result()


def test_the_table_compares_the_two_sides_of_each_run(benchmark):
    def run(rate, **milliseconds):
        return {"steps_per_second": rate, "milliseconds": milliseconds}

    theirs = [run(1, a=3), run(2, a=5), run(9, a=1)]
    ours = [run(1.5, b=1), run(4, b=1), run(9, b=1)]
    text = benchmark.table([{"diffusers": one, "ours": other} for one, other in zip(theirs, ours, strict=True)])
    assert "| steps per second, median | 2.00 (1.00 to 9.00) | 4.00 (1.50 to 9.00) |" in text
    assert "| a, ms per step | 3.0 | 0.0 |" in text
    assert "Ours does 1.50 times" in text
    assert "(1.50, 2.00, 1.00)" in text


def test_both_sides_are_given_the_same_work(benchmark, tmp_path):
    (tmp_path / "script.py").write_text("")
    options = benchmark.BenchmarkOptions(str(tmp_path / "script.py"), own_flags="--snr_gamma 5")
    theirs, ours = (side.command for side in benchmark.sides(options, tmp_path).values())
    shared = theirs[1 : theirs.index("--repeats")]
    assert ours[1 : 1 + len(shared)] == shared
    assert {"--resolution", "--train_batch_size", "--rank", "--max_train_steps", "--report_to"} <= set(shared)
    assert "--snr_gamma" in ours


def test_every_batch_of_the_script_is_full(benchmark, tmp_path):
    (tmp_path / "script.py").write_text("")
    options = benchmark.BenchmarkOptions(str(tmp_path / "script.py"), train_batch_size=3)
    command = benchmark.sides(options, tmp_path)["diffusers"].command
    assert int(command[command.index("--repeats") + 1]) % 3 == 0


def test_a_missing_script_is_named_with_where_to_get_it(benchmark):
    with pytest.raises(InputError, match=r"no file 'none\.py'.*examples/dreambooth"):
        benchmark.BenchmarkOptions("none.py")
