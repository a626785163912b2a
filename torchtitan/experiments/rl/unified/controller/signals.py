# All rights reserved.
#
# This source code is licensed under the BSD-style license found in the
# LICENSE file in the root directory of this source tree.

"""SIGTERM and SIGHUP end a job as Ctrl-C does."""

import contextlib
import os
import signal
import sys
import threading
from collections.abc import Iterator


@contextlib.contextmanager
def ends_in_order(grace_seconds: float) -> Iterator[list[int]]:
    """Inside, SIGTERM and SIGHUP raise KeyboardInterrupt as Ctrl-C does; yields the signals that came.

    A signal that is ignored (nohup) stays so, but for SIGINT, which scripts have their background jobs ignore: nothing
    could end those in order then. As process 1 of a container the job would ignore SIGTERM without this.

    Args:
        grace_seconds: after so long the process ends at once, and those of the job with it.
    """
    received: list[int] = []

    def give_up() -> None:
        print(f"still not ended after {grace_seconds:g} s: ending at once", file=sys.stderr, flush=True)
        os._exit(128 + received[0])

    timer = threading.Timer(grace_seconds, give_up)
    timer.daemon = True

    def interrupt(number: int, frame: object) -> None:
        if not received:
            timer.start()
        received.append(number)
        # Whoever waits for Ctrl-C, asyncio here, does what is to be done.
        signal.raise_signal(signal.SIGINT)

    before = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGHUP, signal.SIGINT)}
    for number in (signal.SIGTERM, signal.SIGHUP):
        if before[number] is not signal.SIG_IGN:
            signal.signal(number, interrupt)
    if before[signal.SIGINT] is signal.SIG_IGN:
        signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        yield received
    finally:
        timer.cancel()
        for number, handler in before.items():
            signal.signal(number, handler)
