"""Where cells run: in processes of this machine, one or several at once, or on the workers of a Ray cluster."""

from __future__ import annotations

import os
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from queue import SimpleQueue
from threading import Event
from types import ModuleType
from typing import Protocol

import torch

from pipelines.errors import InputError
from training.comparison.running import run_cell
from training.options.arena import ArenaOutputOptions
from training.runs.arena_files import CellRecord
from training.runs.waiting import DEVICES

THREADS = "OMP_NUM_THREADS"
# How often Ray starts a cell again whose worker has died; it then goes on from its checkpoint.
RAY_RETRIES = 3


class Workers(Protocol):
    """Runs cells.

    Args:
        count: how many at once.
    """

    count: int

    def submit(self, folder: Path, record: CellRecord) -> Future[CellRecord]:
        """Begin to run a cell; the result is its record."""


@contextmanager
def workers_of(options: ArenaOutputOptions) -> Iterator[Workers]:
    """The workers of an arena; at the end of the context they have stopped.

    Raises: InputError if Ray is not installed or its cluster cannot be reached.
    """
    if options.ray_address is not None:
        with ray_cluster(options) as workers:
            yield workers
        return
    workers = LocalWorkers(devices(options.num_workers))
    try:
        yield workers
    finally:
        workers.close()


def devices(num_workers: int | None) -> list[dict[str, str]]:
    """The environment of each worker on this machine: a GPU each, or a share of the CPU's cores.

    Args:
        num_workers: None for one on each GPU, or one on the CPU. Under `accelerate launch`, the number of its processes.
    """
    count = num_workers or int(os.environ.get("WORLD_SIZE", "0")) or max(1, torch.cuda.device_count())
    if torch.cuda.is_available():
        gpus = visible_gpus()
        return [{DEVICES: gpus[index % len(gpus)]} for index in range(count)]
    threads = os.environ.get(THREADS) or str(max(1, torch.get_num_threads() // count))
    return [{THREADS: threads} for _ in range(count)]


def visible_gpus() -> list[str]:
    """The GPUs of this machine that may be used, as in CUDA_VISIBLE_DEVICES."""
    given = os.environ.get(DEVICES, "")
    return given.split(",") if given else [str(index) for index in range(torch.cuda.device_count())]


class LocalWorkers:
    """Processes on this machine.

    Args:
        environments: one for each process that runs at once.
    """

    def __init__(self, environments: list[dict[str, str]]) -> None:
        self.count = len(environments)
        self._free: SimpleQueue[dict[str, str]] = SimpleQueue()
        for environment in environments:
            self._free.put(environment)
        self._stop, self._threads = Event(), ThreadPoolExecutor(self.count)

    def submit(self, folder: Path, record: CellRecord) -> Future[CellRecord]:
        """See `Workers`."""
        return self._threads.submit(self._run, folder, record)

    def _run(self, folder: Path, record: CellRecord) -> CellRecord:
        environment = self._free.get()
        try:
            return run_cell(folder, record, environment, self._stop)
        finally:
            self._free.put(environment)

    def close(self) -> None:
        """Stop all cells and wait for them."""
        self._stop.set()
        self._threads.shutdown(cancel_futures=True)


@contextmanager
def ray_cluster(options: ArenaOutputOptions) -> Iterator[Workers]:
    """The workers of the Ray cluster at `options.ray_address`."""
    try:
        import ray
    except ImportError as error:
        raise InputError(
            "ray_address needs Ray, which is not installed. Run pip install ray, or leave --ray_address out."
        ) from error
    try:
        ray.init(address=options.ray_address, log_to_driver=False)
    except (ConnectionError, ValueError) as error:
        raise InputError(f"No Ray cluster answers at ray_address {options.ray_address!r}: {error}") from error
    try:
        yield RayWorkers(ray, options)
    finally:
        ray.shutdown()


class RayWorkers:
    """The workers of a Ray cluster; one that dies is replaced, and its cell resumed.

    Args:
        ray: the module.
        options: the cores and GPUs of a cell.
    """

    def __init__(self, ray: ModuleType, options: ArenaOutputOptions) -> None:
        resources = ray.cluster_resources()
        by_cores = resources.get("CPU", 0.0) // options.cpus_per_cell
        by_gpus = resources.get("GPU", 0.0) // options.gpus_per_cell if options.gpus_per_cell else by_cores
        self.count = int(min(by_cores, by_gpus))
        if self.count < 1:
            raise InputError(
                f"The Ray cluster has {resources.get('CPU', 0):g} cores and {resources.get('GPU', 0):g} GPUs, which is too "
                "little for a cell. Lower --cpus_per_cell or --gpus_per_cell, or add nodes."
            )
        self._run = ray.remote(
            num_cpus=options.cpus_per_cell, num_gpus=options.gpus_per_cell, max_retries=RAY_RETRIES, scheduling_strategy="SPREAD"
        )(_run_on_worker)

    def submit(self, folder: Path, record: CellRecord) -> Future[CellRecord]:
        """See `Workers`."""
        return self._run.remote(folder, record).future()


def _run_on_worker(folder: Path, record: CellRecord) -> CellRecord:
    # The file is newer than `record` if a worker that died has begun the cell.
    return run_cell(folder, CellRecord.read(folder) or record, {}, Event())
