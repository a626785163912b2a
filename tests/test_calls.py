# All rights reserved.
#
# This source code is licensed under the BSD-style license found in the
# LICENSE file in the root directory of this source tree.

"""Of several calls all have ended before what one of them failed with is told; each engine has its cards."""

import asyncio

import pytest
from torchtitan.experiments.rl.unified.config.load import load_job_config
from torchtitan.experiments.rl.unified.controller.calls import all_or_none
from torchtitan.experiments.rl.unified.controller.generators import Generators


def test_answers_come_in_the_order_of_the_calls():
    async def call(seconds: float) -> float:
        await asyncio.sleep(seconds)
        return seconds

    assert asyncio.run(all_or_none(call(seconds) for seconds in (0.02, 0.0, 0.01))) == [0.02, 0.0, 0.01]


def test_the_others_have_ended_when_one_fails():
    ended = []

    async def starts_engines() -> None:
        try:
            await asyncio.sleep(60)
        finally:
            await asyncio.sleep(0)
            ended.append("after its own clearing up")

    async def fails() -> None:
        await asyncio.sleep(0)
        raise RuntimeError("no engine")

    async def job() -> None:
        with pytest.raises(RuntimeError, match="no engine"):
            await all_or_none([starts_engines(), fails(), starts_engines()])
        assert len(ended) == 2

    asyncio.run(job())


@pytest.mark.parametrize(
    ("flags", "first"),
    [
        ([], [2, 3, 4, 5]),  # After the two ranks of the trainer.
        (["--generator.tensor_parallel_degree", "2"], [2, 4, 6, 8]),
        (["--cluster.generators", "tcp://a:1", "tcp://b:1"], [0, 0, 1, 1]),
        (["--cluster.generators", "tcp://a:1", "tcp://b:1", "--generator.tensor_parallel_degree", "2"], [0, 0, 2, 2]),
    ],
)
def test_cards_are_counted_on_each_machine(flags, first):
    generators = Generators(load_job_config(flags), [None] * 4)
    assert [replica.first_gpu for replica in generators.replicas] == first
