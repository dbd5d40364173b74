"""The stopwatch of the speed benchmark, on trainers whose speed is known."""

import importlib.util
import json
import sys
from pathlib import Path

import pytest

from pipelines.errors import InputError

PROGRAM = Path(__file__).parents[2] / "benchmarks" / "trainer_speed.py"
# Sleeps 20 ms a step in backward and 10 ms elsewhere, and takes steps before its own that are not to be counted.
TRAINER = """
import sys, time, torch
class Slow(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x): return x.clone()
    @staticmethod
    def backward(ctx, g):
        time.sleep(0.02)
        return g
weight = torch.nn.Parameter(torch.ones(3))
optimizer = torch.optim.AdamW([weight])
for step in range(3):
    time.sleep(0.2)
    optimizer.step()
for step in range(int(sys.argv[sys.argv.index("--max_train_steps") + 1])):
    time.sleep(0.01)
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


@pytest.mark.slow
def test_the_stopwatch_finds_the_steps_a_second_and_the_phases_of_a_known_trainer(benchmark, tmp_path):
    script = tmp_path / "train.py"
    script.write_text(TRAINER)
    found = benchmark.measured([str(script), "--max_train_steps", "15"], 15, tmp_path / "log.txt")
    assert found["milliseconds"]["backward"] >= 20
    assert found["milliseconds"]["everything else"] >= 10
    assert sum(found["milliseconds"].values()) == pytest.approx(1000 / found["steps_per_second"])
    assert found["milliseconds"]["everything else"] < 150


def test_steps_before_the_trainings_own_are_not_counted(benchmark):
    watch = benchmark.Stopwatch(steps=[0.0, 100.0, *(200.0 + step for step in range(10))])
    watch.calls = [("backward", 50.0, 90.0), *(("backward", 200.1 + step, 200.6 + step) for step in range(10))]
    found = watch.result(steps=10)
    assert found["steps_per_second"] == pytest.approx(1)
    assert found["milliseconds"] == {"backward": pytest.approx(500), "everything else": pytest.approx(500)}


def test_the_table_compares_medians(benchmark):
    def run(rate, **milliseconds):
        return {"steps_per_second": rate, "milliseconds": milliseconds}

    text = benchmark.table({"diffusers": [run(1, a=3), run(2, a=5), run(9, a=1)], "ours": [run(3, b=1)] * 3})
    assert "| steps a second, median | 2.00 (1.00 to 9.00) | 3.00 (3.00 to 3.00) |" in text
    assert "| a, ms a step | 3.0 | 0.0 |" in text
    assert "Ours does 1.50 times" in text


def test_both_sides_are_given_the_same_work(benchmark, tmp_path):
    (tmp_path / "script.py").write_text("")
    options = benchmark.BenchmarkOptions(str(tmp_path / "script.py"), own_flags="--snr_gamma 5")
    theirs, ours = benchmark.commands(options, tmp_path).values()
    shared = theirs[1:-2]
    assert ours[1 : 1 + len(shared)] == shared
    assert {"--resolution", "--train_batch_size", "--rank", "--max_train_steps"} <= set(shared)
    assert "--snr_gamma" in ours
    json.dumps(theirs)


def test_a_missing_script_is_named_with_where_to_get_it(benchmark):
    with pytest.raises(InputError, match=r"no file 'none\.py'.*examples/dreambooth"):
        benchmark.BenchmarkOptions("none.py")
