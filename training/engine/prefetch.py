"""Batches by index, optionally prepared in advance by worker processes."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

from torch.utils.data import DataLoader, Dataset


@dataclass(frozen=True)
class ProcessBatches(Dataset):
    """The part of every global batch that belongs to one process, by index.

    Args:
        batch_at: `Trainable.batch_at`; if it runs in workers, its tensors must be on the CPU.
        process, processes: index of this process and their number.
    """

    batch_at: Callable[[int], dict[str, Any]]
    process: int = 0
    processes: int = 1

    def __getitem__(self, index: int) -> dict[str, Any]:
        return part_of_process(self.batch_at(index), self.process, self.processes)

    def over(self, indices: range, workers: int = 0) -> Iterator[dict[str, Any]]:
        """The batches of `indices` in order, prepared in advance by `workers` processes."""
        if workers == 0:
            return (self[index] for index in indices)
        return iter(DataLoader(self, batch_size=None, sampler=indices, num_workers=workers))


def part_of_process(batch: dict[str, Any], process: int, processes: int) -> dict[str, Any]:
    """The part of a global batch that belongs to `process`; the tensors are split evenly along their first dimension.

    Raises: ValueError if the examples do not divide evenly.
    """
    if processes == 1:
        return batch
    count = len(next(iter(batch.values())))
    if count % processes:
        raise ValueError(f"The batch over all processes must be a multiple of {processes} processes, got {count} examples.")
    size = count // processes
    return {name: values[process * size : (process + 1) * size] for name, values in batch.items()}
