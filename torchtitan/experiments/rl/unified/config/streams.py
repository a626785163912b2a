# All rights reserved.
#
# This source code is licensed under the BSD-style license found in the
# LICENSE file in the root directory of this source tree.

"""Standard output and error that cannot end a job: nobody may read them, or not in the letters of a path."""

import io
import os
import select
import sys


class _Stream(io.TextIOWrapper):
    """What a reader that has gone does not take goes nowhere."""

    def write(self, text: str) -> int:
        try:
            return super().write(text)
        except BrokenPipeError:
            return self.give_up(len(text))

    def flush(self) -> None:
        try:
            super().flush()
        except BrokenPipeError:
            self.give_up()

    def give_up(self, count: int = 0) -> int:
        nowhere = os.open(os.devnull, os.O_WRONLY)
        os.dup2(nowhere, self.fileno())
        os.close(nowhere)
        return count


def unbroken_streams() -> None:
    """Puts such streams in the places of this process's."""
    for name in ("stdout", "stderr"):
        if (stream := getattr(sys, name)) is not None:  # It was closed from the start.
            new = _Stream(stream.detach(), stream.encoding, "backslashreplace", line_buffering=True)
            setattr(sys, name, new)


def drop_unread_streams() -> None:
    """Lets go of what nobody reads any more, before a library that would end the process writes to it."""
    streams = {stream.fileno(): stream for stream in (sys.stdout, sys.stderr) if isinstance(stream, _Stream)}
    poll = select.poll()
    for number in streams:
        poll.register(number, 0)
    for number, event in poll.poll(0):
        if event & select.POLLERR:
            streams[number].give_up()
