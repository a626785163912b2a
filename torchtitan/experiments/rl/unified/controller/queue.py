# All rights reserved.
#
# This source code is licensed under the BSD-style license found in the
# LICENSE file in the root directory of this source tree.

"""Batches of trajectories and policy versions, handed over between the generators' loop and the trainer's."""

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass, field

from torchtitan.experiments.rl.unified.messages import Trajectory, WeightUpdate


@dataclass(frozen=True)
class Batch:
    """The trajectories of one training step.

    Attributes:
        trajectories: in the order of their requests.
        seconds: of the generators, by phase; empty for a batch that came out of a checkpoint.
    """

    trajectories: list[Trajectory]
    seconds: dict[str, float] = field(default_factory=dict)


class TrajectoryQueue:
    """Batch k is trained on in step k (from 0) and sampled under policy version k - lead, whoever is faster.

    So a run is reproducible: which weights sampled a token does not depend on time. The first batches, for which there
    is no such version, are sampled under the one the trainer starts with. One version waits for the generators at
    a time: the trainer can publish the next once they have taken it, and they run no request while they take it.

    Args:
        lead: batches the generators work ahead; 0: the two loops take turns.
        version: of the policy that the trainer starts with.
        ready: batches sampled before a checkpoint was written, and not yet trained on.

    Raises:
        ValueError: more batches are ready than the lead allows.
    """

    def __init__(self, lead: int, version: int, ready: list[Batch]) -> None:
        if len(ready) > lead:
            raise ValueError(
                f"the checkpoint at step {version} holds {len(ready)} batches sampled ahead: to go on with it, "
                "[trajectory_queue] max_staleness must allow as many"
            )
        self.lead, self.first = lead, version
        self.ready = list(ready)
        self.sampled = version + len(ready)
        self.generator_version = self.published = -1
        self._evaluations: dict[int, dict[str, float]] = {}
        self._update: WeightUpdate | None = None
        self._error: BaseException | None = None
        self._changed = asyncio.Condition()

    # The trainer's side.

    async def publish(self, update: WeightUpdate) -> None:
        """Hands the next version to the generators; returns at once, they take it when they are ready."""
        self._update, self.published = update, update.version
        await self._notify()

    async def taken(self) -> None:
        """Returns when the generators run the version published last: the one before it may be overwritten."""
        await self._wait(lambda: self._update is None)

    async def get(self) -> Batch:
        """The next batch; waits for the generators, and raises what ended them."""
        await self._wait(lambda: self.ready)
        return self.ready.pop(0)

    async def evaluation(self, version: int) -> dict[str, float]:
        """The metrics of `version`'s evaluation; waits for the generators, and raises what ended them."""
        await self._wait(lambda: version in self._evaluations)
        return self._evaluations.pop(version)

    async def settled(self, version: int, steps: int) -> list[Batch]:
        """The batches that wait once the generators have done all they can before `version` is published.

        With the weights of `version` and the prompts' position this is all that a run needs to go on from there.

        Args:
            version: that the trainer has reached and not yet published.
            steps: of the whole run.
        """
        await self._wait(lambda: self.sampled >= min(version + self.lead, steps))
        return list(self.ready)

    # The generators' side.

    @asynccontextmanager
    async def next_version(self) -> AsyncIterator[WeightUpdate]:
        """The version published next; it counts as taken when the block ends."""
        await self._wait(lambda: self._update)
        update = self._update
        yield update
        self.generator_version, self._update = update.version, None
        await self._notify()

    async def put(self, batch: Batch) -> None:
        """Adds the next batch."""
        self.ready.append(batch)
        self.sampled += 1
        await self._notify()

    async def report(self, version: int, metrics: dict[str, float]) -> None:
        """Adds the metrics of `version`'s evaluation."""
        self._evaluations[version] = metrics
        await self._notify()

    async def fail(self, error: BaseException) -> None:
        """Says that no batch will come any more, and why."""
        self._error = error
        await self._notify()

    def version_of(self, batch: int) -> int:
        """The policy version that batch number `batch` is sampled under."""
        return max(self.first, batch - self.lead)

    async def _notify(self) -> None:
        async with self._changed:
            self._changed.notify_all()

    async def _wait(self, condition) -> None:
        async with self._changed:
            await self._changed.wait_for(lambda: condition() or self._error)
        if self._error is not None and not condition():
            raise self._error
