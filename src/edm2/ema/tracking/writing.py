"""The averages of one time on their way to files: measured, gathered tensor by tensor, and shared out.

Where a model is sharded, each process writes some of the averages, with the bytes that an unsharded model's would have.
"""

import json
import math
import os
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from edm2.ema.storage.encoding import Track, largest_value
from edm2.ema.storage.manifest import MANIFEST, Snapshot
from edm2.ema.tracking.averages import Averages
from edm2.ema.tracking.sharding import (
    from_all,
    from_first,
    is_sharded,
    raise_with_the_others,
    share_of_all,
    to_owners,
)
from edm2.ema.tracking.tensors import FollowedModel

Make = Callable[[], Iterable[Snapshot]]


class TracksToWrite:
    """The averages of one time; making it takes collective calls where the model is sharded.

    Args:
        averages: The running averages.
        sigma_rels: EMA length of each.
        followed: The model.
        updates: Number of updates so far.
        write_backs: When the model was set to an average.

    Attributes:
        copied: The tensors that are not averaged, by name; those of the first process.
    """

    def __init__(
        self,
        averages: Averages,
        sigma_rels: Sequence[float],
        followed: FollowedModel,
        *,
        updates: int,
        write_backs: Sequence[dict[str, Any]],
    ) -> None:
        self._averages, self._sigma_rels, self._followed = averages, sigma_rels, followed
        self._updates, self._write_backs = updates, write_backs
        self._sharded = next((x for x in followed.templates if is_sharded(x)), None)
        self._rank = 0 if self._sharded is None else torch.distributed.get_rank()
        self._order = sorted(range(len(followed.names)), key=followed.names.__getitem__)
        self.copied = followed.copied()
        if self._sharded is not None:
            self.copied = {name: from_first(x, self._sharded) for name, x in self.copied.items()}
        self._shares = [1.0 if self._sharded is None else share_of_all(x) for x in followed.templates]

    def _measured(self, average: Iterable[Tensor]) -> list[float]:
        """Largest absolute value of each tensor here, then this process's share of the squared L2 distance."""
        largest, square = [], 0.0
        for tensor, weight, share in zip(average, self._followed.weights, self._shares, strict=True):
            largest.append(largest_value(tensor))
            norm = torch.linalg.vector_norm(weight.to(tensor) - tensor, dtype=torch.float64)
            square += float(norm.square()) * share
        return [*largest, square]

    def _measured_by_all(self, sharded: Tensor) -> list[list[float]]:
        """Of each average, what `_measured` gives, for whole tensors."""
        tracks = range(len(self._sigma_rels))
        table = torch.tensor([self._measured(self._averages.read(i)) for i in tracks], dtype=torch.float64)
        # A maximum of several processes may lose a NaN, but not an infinity.
        table = table.nan_to_num(nan=torch.inf, posinf=torch.inf).to(sharded.device)
        largest, squares = table[:, :-1].contiguous(), table[:, -1:].contiguous()
        torch.distributed.all_reduce(largest, torch.distributed.ReduceOp.MAX)
        torch.distributed.all_reduce(squares)
        facts: list[list[float]] = torch.cat([largest, squares], dim=1).tolist()
        return facts

    def _write_alone(self, write_one: Callable[[Track], Snapshot]) -> Iterator[Snapshot]:
        for track in range(len(self._sigma_rels)):
            tensors = list(self._averages.read(track))  # one average, since reading it twice takes longer
            in_order = (tensors[i].cpu() for i in self._order)
            yield write_one(self._track(track, self._measured(tensors), in_order))

    def write(
        self, folder: Path, write_one: Callable[[Track], Snapshot], write: Callable[[Make], list[Path]]
    ) -> list[Path]:
        """Write the averages: this process all of them, or where the model is sharded each process some.

        Args:
            folder: The folder of snapshots.
            write_one: Writes the file of one average.
            write: Prepares the folder, has the files made, and writes the manifest; called on the first process.

        Returns:
            The files; none on other processes.

        Raises:
            RuntimeError: If another process failed.
        """
        sharded, settled = self._sharded, False
        if sharded is None:
            return write(lambda: self._write_alone(write_one))

        def agree(error: Exception | None = None) -> None:
            nonlocal settled
            other = RuntimeError("another process could not write the snapshot: see its own error")
            try:
                raise_with_the_others(error, other, sharded)
            except Exception:
                settled = True
                raise

        def make() -> list[Snapshot]:
            agree()  # the folder is ready
            mine, error = self._write_some(write_one, self._processes_that_see(folder, sharded), sharded)
            agree(error)
            entries = from_all(json.dumps([asdict(snapshot) for snapshot in mine]).encode(), sharded)
            every = [Snapshot(**entry) for some in entries for entry in json.loads(some)]
            return sorted(every, key=lambda snapshot: self._sigma_rels.index(snapshot.sigma_rel))

        paths: list[Path] = []
        if self._rank == 0:
            try:
                paths = write(make)
            except Exception as error:
                if not settled:
                    agree(error)
                raise
        else:
            make()
        agree()  # the manifest is written
        return paths

    def _processes_that_see(self, folder: Path, sharded: Tensor) -> list[int]:
        """Ranks of the processes that can write: the folder may be on a disk of the first one's machine."""
        try:
            status = os.stat(folder / MANIFEST)
            seen = f"{status.st_ino} {status.st_mtime_ns}"
        except OSError:
            seen = ""
        found = from_all(seen.encode(), sharded)
        return [rank for rank, other in enumerate(found) if rank == 0 or other == found[0] != b""]

    def _write_some(
        self, write_one: Callable[[Track], Snapshot], writers: Sequence[int], sharded: Tensor
    ) -> tuple[list[Snapshot], Exception | None]:
        """Write this process's share of the averages; the other processes call it too.

        Returns:
            What was written, and the error that ended it.
        """
        facts = self._measured_by_all(sharded)
        mine: list[Snapshot] = []
        error: Exception | None = None
        for first in range(0, len(self._sigma_rels), len(writers)):
            tracks = range(first, min(first + len(writers), len(self._sigma_rels)))
            # Evenly spread, as processes next to each other share a machine.
            owners = [writers[i * len(writers) // len(tracks)] for i in range(len(tracks))]
            tensors = self._gathered(tracks, owners)
            if self._rank in owners and error is None:
                track = tracks[owners.index(self._rank)]
                try:
                    mine.append(write_one(self._track(track, facts[track], tensors)))
                except Exception as caught:
                    error = caught
            for _ in tensors:  # the others' are not whole without this process
                pass
        return mine, error

    def _gathered(self, tracks: Sequence[int], owners: Sequence[int]) -> Iterator[Tensor | None]:
        """The tensors of the average that this process writes, in the order of their names."""
        parts = zip(*(self._averages.read(track, self._order) for track in tracks), strict=True)
        for i, some in zip(self._order, parts, strict=True):
            yield to_owners(some, self._followed.templates[i], owners, self._rank)

    def _track(self, track: int, facts: Sequence[float], tensors: Iterator[Tensor | None]) -> Track:
        def read(name: str) -> Tensor:
            tensor = next(tensors)
            assert tensor is not None, name
            return tensor

        followed = self._followed
        return Track(
            sigma_rel=self._sigma_rels[track],
            shapes={n: tuple(x.shape) for n, x in zip(followed.names, followed.templates, strict=True)},
            largest=dict(zip(followed.names, facts[:-1], strict=True)),
            read=read,
            copied=self.copied,
            updates=self._updates,
            mean_of=self._averages.mean_of(self._updates),
            complex_names=followed.complex_names,
            distance=math.sqrt(facts[-1]),
            write_backs=self._write_backs,
        )
