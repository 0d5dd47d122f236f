"""What a cluster has, and how jobs share it among their workers."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from pipeline.batch_plan import Workers
from pipeline.errors import UserError


@dataclass(frozen=True)
class Slots:
    """Where networks are trained."""

    count: int
    """Networks that train at the same time."""
    workers: int
    """Of each network, which share its batch."""
    cpus: int
    """Of each worker."""
    gpus: float
    """Of each worker."""
    in_memory_gib: float = 4.0
    """A network's decoded photographs beyond this lie in a file on the worker's disk."""


@dataclass(frozen=True)
class Node:
    """One machine."""

    cpus: int
    gpus: int = 0


@dataclass(frozen=True)
class Resources:
    """What the cluster has."""

    nodes: Sequence[Node]

    @property
    def cpus(self) -> int:
        return sum(node.cpus for node in self.nodes)

    @property
    def gpus(self) -> int:
        return sum(node.gpus for node in self.nodes)

    def scoring_workers(self, actors: int = 0) -> Workers:
        """Scoring actors and their shares. Part of a CPU is set aside for reading and decoding, or nothing would move; since
        those need little of it, actors compute on every CPU."""
        count = actors or self.gpus or 1
        if self.gpus:
            if count > self.gpus:
                raise UserError(
                    f"--actors {count} are too many for {self.gpus} GPUs: lower it, or 0 to choose by itself"
                )
            return Workers(count, threads=1, cpus_per_actor=0.0, gpus_per_actor=1.0)
        largest = max(node.cpus for node in self.nodes)
        if count > self.cpus > 0:
            raise UserError(f"--actors {count} are too many for {self.cpus} CPUs: lower it, or 0 to choose by itself")
        if count == self.cpus > largest == 1:
            raise UserError(f"--actors {count} leave none of {count} machines of one CPU to reading: lower it")
        threads = max((cpus for cpus in range(1, largest + 1) if self._room(cpus, 0.0) >= count), default=1)
        if count < self.cpus:
            shares = range(min((self.cpus - 1) // count, max(1, largest - 1)), 0, -1)
            share: float = next(share for share in shares if self._room(share, 0.0) >= count)
        else:  # together they leave a CPU, and with machines of more than one it lies whole on one of them
            share = 1 - 1 / largest if largest > 1 else 0.25
        return Workers(count, threads, cpus_per_actor=share, gpus_per_actor=0.0)

    def training_slots(
        self,
        networks: int,
        *,
        workers: int = 1,
        max_concurrent: int = 0,
        gpus_per_worker: float = 1.0,
        in_memory_gib: float = 4.0,
    ) -> Slots:
        """Slots for so many networks, all of which start at once. Raises UserError where that cannot be.

        max_concurrent: slots at the most, 0 as many as there is room for. gpus_per_worker: 1 or a part of one; without GPUs
        it does not matter. Every worker has one machine's CPUs, as many as all can have.
        """
        if workers < 1 or max_concurrent < 0 or in_memory_gib < 0:
            raise UserError(
                "--workers-per-category must be at least 1, --max-concurrent and --in-memory-gib at least 0"
            )
        if not 0 < gpus_per_worker <= 1:
            raise UserError(
                f"--gpus-per-worker {gpus_per_worker:g}: a worker has one GPU or a part of one, such as 0.5"
            )
        gpus = gpus_per_worker if self.gpus else 0.0
        if gpus and gpus < 1 and workers > 1:
            raise UserError("--gpus-per-worker: workers that share a network's batch need a GPU each")
        room = self._room(1, gpus)
        count = min(networks, max_concurrent or max(1, room // workers))
        if count * workers > room:
            kind = f"GPUs (a worker has {gpus:g})" if gpus else "CPUs"
            raise UserError(
                f"{count} categories x {workers} workers need more {kind} than there are, {self.gpus or self.cpus}: "
                "lower --max-concurrent or --workers-per-category"
            )
        largest = max(node.cpus for node in self.nodes)
        cpus = max(cpus for cpus in range(1, largest + 1) if self._room(cpus, gpus) >= count * workers)
        return Slots(count, workers, cpus, gpus, in_memory_gib)

    def _room(self, cpus: int, gpus: float) -> int:
        """Workers of so many CPUs and GPUs for which there is room."""
        return sum(
            min(node.cpus // cpus, node.gpus * int(1 / gpus)) if gpus else node.cpus // cpus for node in self.nodes
        )
