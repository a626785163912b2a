# All rights reserved.
#
# This source code is licensed under the BSD-style license found in the
# LICENSE file in the root directory of this source tree.

"""The two loops of a run against each other, with hand-written fakes of everything slow: who waits for whom."""

import asyncio
from types import SimpleNamespace

import pytest
from torchtitan.experiments.rl.unified.controller.loops import generate
from torchtitan.experiments.rl.unified.controller.queue import Batch, TrajectoryQueue
from torchtitan.experiments.rl.unified.messages import WeightUpdate

STEPS = 12


class Sampled(str):
    """Stands for a trajectory: which batch it belongs to, and by which version it was sampled."""

    policy_version = 0


class FakeRun:
    """A trainer that counts versions and a generator that says which version sampled which batch."""

    def __init__(self, lead: int, *, first: int = 0, ready: int = 0, slow: str = "") -> None:
        waiting = [Batch([f"batch {first + i} by {max(0, first + i - lead)}"]) for i in range(ready)]
        self.queue = TrajectoryQueue(lead, first, waiting)
        self.slow, self.version, self.asked = slow, first, first + ready
        self.consumed: list[str] = []
        self.events: list[str] = []
        self.generating = False
        self.evaluated: list[dict[str, float]] = []

    def due(self, version: int) -> bool:
        return version % 5 == 0

    def requests(self) -> str:
        return "held out"

    def score(self, trajectories: list[str]) -> dict[str, float]:
        self.events.append(f"evaluate {self.engine_version}")
        return {"version": self.engine_version}

    def next_requests(self) -> int:
        self.asked += 1
        return self.asked - 1

    async def update_weights(self, update: WeightUpdate) -> None:
        assert not self.generating, "weights replaced under a running request"
        self.engine_version = update.version

    async def generate(self, batch: int | str) -> list[str]:
        self.generating = True
        if batch != "held out":
            self.events.append(f"generate {batch}")
        for _ in range(20 if self.slow == "generator" else 1):
            await asyncio.sleep(0)
        self.generating = False
        sampled = Sampled(f"batch {batch} by {self.engine_version}")
        sampled.policy_version = self.engine_version
        return [sampled]

    async def train(self, steps: int, settle_at: int | None = None) -> list[Batch] | None:
        queue = self.queue
        await queue.publish(WeightUpdate(self.version, "", []))
        while self.version < steps:
            self.consumed += (await queue.get()).trajectories
            self.events.append(f"train {self.version}")
            for _ in range(20 if self.slow == "trainer" else 1):
                await asyncio.sleep(0)
            self.version += 1
            if self.version == settle_at:
                return await queue.settled(self.version, STEPS)
            await queue.taken()
            await queue.publish(WeightUpdate(self.version, "", []))
            if self.due(self.version):
                self.evaluated.append(await queue.evaluation(self.version))
        await queue.taken()

    async def run(self, settle_at: int | None = None) -> list[Batch] | None:
        config = SimpleNamespace(training=SimpleNamespace(steps=STEPS))
        generating = asyncio.ensure_future(generate(config, SimpleNamespace(generators=self), self.queue, self, self))
        try:
            return await asyncio.wait_for(self.train(STEPS, settle_at), 10)
        finally:
            generating.cancel()


@pytest.mark.parametrize("slow", ["", "trainer", "generator"])
@pytest.mark.parametrize("lead", [0, 1, 4, 20])
def test_each_batch_has_the_version_it_is_due_whoever_is_slow(lead, slow):
    run = FakeRun(lead, slow=slow)
    asyncio.run(run.run())
    assert run.consumed == [f"batch {k} by {max(0, k - lead)}" for k in range(STEPS)]
    assert run.engine_version == STEPS


def test_without_a_lead_the_loops_take_turns():
    run = FakeRun(0, slow="trainer")
    asyncio.run(run.run())
    expected = [f"{event} {k}" for k in range(STEPS) for event in ("generate", "train")]
    assert [event for event in run.events if not event.startswith("evaluate")] == expected


@pytest.mark.parametrize("lead", [0, 1, 4])
def test_a_version_is_evaluated_when_the_generators_have_it_and_not_again_after_a_restart(lead):
    whole, rest = FakeRun(lead), FakeRun(lead, first=5, ready=lead)
    asyncio.run(whole.run())
    asyncio.run(rest.run())
    assert [event for event in whole.events if event.startswith("evaluate")] == [f"evaluate {v}" for v in (0, 5, 10)]
    assert whole.evaluated == [{"version": 5}, {"version": 10}]
    assert rest.evaluated == [{"version": 10}]


def test_with_a_lead_the_generators_work_while_the_trainer_does():
    run = FakeRun(1, slow="trainer")
    asyncio.run(run.run())
    for k in range(1, STEPS - 1):
        assert run.events.index(f"generate {k + 1}") < run.events.index(f"train {k + 1}")
        assert run.events.index(f"generate {k + 1}") in (run.events.index(f"train {k}") + d for d in (-1, 1))


@pytest.mark.parametrize("lead", [0, 1, 4])
@pytest.mark.parametrize("slow", ["trainer", "generator"])
def test_a_run_goes_on_from_what_waited_at_a_checkpoint(lead, slow):
    whole, first, second = FakeRun(lead), FakeRun(lead, slow=slow), None
    asyncio.run(whole.run())
    waiting = asyncio.run(first.run(settle_at=5))
    assert len(waiting) == lead and first.asked == 5 + lead
    second = FakeRun(lead, first=5, ready=len(waiting))
    assert [b.trajectories for b in second.queue.ready] == [b.trajectories for b in waiting]
    asyncio.run(second.run())
    assert first.consumed + second.consumed == whole.consumed


def test_what_ends_the_generators_reaches_the_trainer():
    class Broken(FakeRun):
        async def generate(self, batch: int) -> list[str]:
            if batch == 3:
                raise ValueError("engine broke")
            return await super().generate(batch)

    run = Broken(1)
    with pytest.raises(ValueError, match="engine broke"):
        asyncio.run(run.run())
    assert len(run.consumed) == 3  # what was sampled before is not lost


def test_more_waiting_batches_than_the_bound_allows_are_refused():
    with pytest.raises(ValueError, match="step 5 holds 2 batches .* max_staleness"):
        FakeRun(1, first=5, ready=2)
