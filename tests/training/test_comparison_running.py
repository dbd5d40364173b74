"""Running cells: resuming, failing, stopping, several at once, and a Ray worker that is killed."""

import os
import signal
import sys
import threading
import time
from pathlib import Path

import psutil
import pytest
import stand_in_recipe

from pipelines.errors import InputError
from training.comparison.running import LOG, MAX_ATTEMPTS, run_cell
from training.comparison.workers import LocalWorkers, RayWorkers, devices, workers_of
from training.options.arena import ArenaOutputOptions
from training.runs.arena_files import CellRecord

STEPS = 3


def record_of(folder, *flags, steps=STEPS):
    command = [sys.executable, stand_in_recipe.__file__, "--steps", str(steps), "--output_dir", str(folder), *flags]
    return CellRecord("subject", "toy", "lora", "final", 1e-3, 0, command, "running")


def run(folder, *flags, **options):
    return run_cell(folder, record_of(folder, *flags, **options), {}, threading.Event())


def steps_of(folder):
    path = folder / stand_in_recipe.COUNTED
    return path.read_text().split() if path.exists() else []


def wait_until(condition, seconds=300):
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.05)


def test_a_cell_runs_its_command_and_records_the_end(tmp_path):
    record = run(tmp_path)
    assert (record.state, record.reason, record.attempts) == ("done", None, 1)
    assert CellRecord.read(tmp_path) == record
    assert steps_of(tmp_path) == ["1", "2", "3"]


def test_a_finished_cell_is_not_run_again(tmp_path):
    run(tmp_path)
    record = run(tmp_path)
    assert (record.state, record.attempts) == ("done", 0)
    assert steps_of(tmp_path) == ["1", "2", "3"]


def test_a_failing_cell_records_what_it_printed_last_and_is_not_tried_again(tmp_path):
    record = run(tmp_path, "--fail")
    assert (record.state, record.reason, record.attempts) == ("failed", "error: rank must be at least 1", 1)


def test_a_killed_process_is_started_again_and_resumes(tmp_path):
    record = run(tmp_path, "--die")
    assert (record.state, record.attempts) == ("done", 2)
    assert steps_of(tmp_path) == ["1", "2", "3"]


def test_a_process_that_is_killed_again_and_again_fails(tmp_path):
    command = [sys.executable, "-c", "import os, signal; os.kill(os.getpid(), signal.SIGKILL)"]
    record = CellRecord("subject", "toy", "lora", "final", 1e-3, 0, command, "running")
    ended = run_cell(tmp_path, record, {}, threading.Event())
    assert (ended.state, ended.attempts) == ("failed", MAX_ATTEMPTS)
    assert ended.reason == f"exit code {-signal.SIGKILL}"


def test_closing_the_workers_stops_their_processes_and_leaves_the_cells_unfinished(tmp_path):
    workers = LocalWorkers([{}, {}])
    futures = [workers.submit(tmp_path / name, record_of(tmp_path / name, steps=10_000)) for name in "ab"]
    wait_until(lambda: all(steps_of(tmp_path / name) for name in "ab"))
    processes = [psutil.Process(CellRecord.read(tmp_path / name).pid) for name in "ab"]
    workers.close()
    assert [future.result().state for future in futures] == ["running", "running"]
    assert not any(process.is_running() for process in processes)


def test_a_cell_whose_process_outlived_its_arena_is_waited_for(tmp_path):
    first = threading.Thread(target=run, args=(tmp_path,))
    first.start()
    wait_until(lambda: (tmp_path / LOG).exists() and CellRecord.read(tmp_path) is not None)
    second = run(tmp_path)
    first.join()
    assert second.state == "done"
    assert steps_of(tmp_path) == ["1", "2", "3"]


def test_workers_of_a_machine_without_gpu_share_its_cores(monkeypatch):
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    monkeypatch.setattr("torch.cuda.device_count", lambda: 0)
    monkeypatch.setattr("torch.get_num_threads", lambda: 8)
    assert devices(4) == [{"OMP_NUM_THREADS": "2"}] * 4
    assert devices(None) == [{"OMP_NUM_THREADS": "8"}]


def test_each_worker_gets_a_gpu_of_those_that_are_visible(monkeypatch):
    monkeypatch.setattr("torch.cuda.device_count", lambda: 2)
    monkeypatch.setattr("torch.cuda.is_available", lambda: True)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "3,5")
    assert devices(None) == [{"CUDA_VISIBLE_DEVICES": "3"}, {"CUDA_VISIBLE_DEVICES": "5"}]


def test_accelerate_sets_the_number_of_workers(monkeypatch):
    monkeypatch.setattr("torch.cuda.device_count", lambda: 0)
    monkeypatch.setenv("WORLD_SIZE", "3")
    assert len(devices(None)) == 3


def test_ray_that_is_not_installed_is_named(monkeypatch):
    monkeypatch.setitem(sys.modules, "ray", None)
    with pytest.raises(InputError, match="pip install ray"), workers_of(ArenaOutputOptions(ray_address="auto")):
        pass


@pytest.mark.slow(30)
def test_a_killed_ray_worker_loses_nothing(tmp_path):
    """Of a cluster of two nodes one is killed, with the process of its cell. The other node resumes the cell."""
    ray = pytest.importorskip("ray")
    cluster_utils = pytest.importorskip("ray.cluster_utils")
    root = str(Path(stand_in_recipe.__file__).parents[2])
    os.environ["PYTHONPATH"] = os.pathsep.join([root, str(Path(stand_in_recipe.__file__).parent)])
    cluster = cluster_utils.Cluster()
    cluster.add_node(num_cpus=0)
    nodes = [cluster.add_node(num_cpus=1) for _ in range(2)]
    try:
        ray.init(address=cluster.address, log_to_driver=False)
        workers = RayWorkers(ray, ArenaOutputOptions())
        assert workers.count == 2
        folders = [tmp_path / str(index) for index in range(4)]
        hold = tmp_path / "hold"
        futures = [workers.submit(folder, record_of(folder, "--hold", str(hold))) for folder in folders]
        wait_until(lambda: sum(len(steps_of(folder)) == 1 for folder in folders) == 2)
        processes = [psutil.Process(CellRecord.read(folder).pid) for folder in folders if steps_of(folder)]
        cluster.remove_node(nodes[0], allow_graceful=False)
        wait_until(lambda: sum(process.is_running() for process in processes) == 1)
        hold.touch()
        records = [future.result(timeout=120) for future in futures]
        assert [record.state for record in records] == ["done"] * 4
        assert [steps_of(folder) for folder in folders] == [["1", "2", "3"]] * 4
        assert sorted(record.attempts for record in records) == [1, 1, 1, 2]
    finally:
        ray.shutdown()
        cluster.shutdown()
