# All rights reserved.
#
# This source code is licensed under the BSD-style license found in the
# LICENSE file in the root directory of this source tree.

"""Calls on actors that always end: in an answer, in the actor's own error, in a lost process, or in a timeout."""

import asyncio
from collections.abc import Awaitable, Iterable
from typing import Any

from monarch._rust_bindings.monarch_hyperactor.supervision import SupervisionError
from monarch.actor import ActorError
from torchtitan.experiments.rl.unified.errors import ProcessLost


async def answer(future, seconds: float, what: str) -> Any:
    """What the Monarch `future` gives.

    Args:
        future: of an endpoint's call.
        seconds: longest wait.
        what: is waited for, for the errors.

    Raises:
        ProcessLost: the actor's process ended, or nothing came in time.
        Exception: what the endpoint raised, as errors.as_text gives it.
    """
    try:
        # In Python 3.11 `wait_for` loses a cancellation that comes together with the answer.
        async with asyncio.timeout(seconds):
            return await future
    except TimeoutError as error:
        raise ProcessLost(f"waited {seconds:.0f} s for {what}; nothing came") from error
    except SupervisionError as error:
        cause = str(error).strip().splitlines()[-1].strip()
        raise ProcessLost(f"lost a process while waiting for {what}: {cause}") from error
    except ActorError as error:
        raise error.exception from error


async def stop(procs) -> None:
    """Ends the processes of a Monarch ProcMesh, dead or alive."""
    try:
        await answer(procs.stop(), 30, "processes to end")
    except (
        ProcessLost,
        RuntimeError,
    ):  # A mesh that lost a process cannot be stopped in good order; the rest is killed.
        pass


async def all_or_none(calls: Iterable[Awaitable[Any]]) -> list[Any]:
    """What the calls return, in their order; where one fails the others are cancelled before its error is raised."""
    tasks = [asyncio.ensure_future(call) for call in calls]
    try:
        return await asyncio.gather(*tasks)
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
