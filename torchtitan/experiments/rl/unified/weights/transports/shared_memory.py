# All rights reserved.
#
# This source code is licensed under the BSD-style license found in the
# LICENSE file in the root directory of this source tree.

"""Weights through memory that two processes of a host share."""

import os
from collections.abc import Callable

import torch
from torchtitan.experiments.rl.unified.messages import WeightUpdate
from torchtitan.experiments.rl.unified.weights.base import PolicyWeights, WeightTransport
from torchtitan.experiments.rl.unified.weights.checksum import copy_with_checksum
from torchtitan.experiments.rl.unified.weights.layout import Layout, PREFIX, view


class Segment:
    """Memory of this process that other processes of the host can map.

    It is a memfd, reached through this process's /proc entry: it has no name to be left behind, and is gone with the
    process however that ends.

    Args:
        size: in bytes.
    """

    def __init__(self, size: int) -> None:
        self._fd = os.memfd_create("torchtitan-rl")
        os.ftruncate(self._fd, size)
        self.size = size
        self.location = f"/proc/{os.getpid()}/fd/{self._fd}"
        self.buffer = torch.from_file(self.location, shared=True, size=size, dtype=torch.uint8)

    def close(self) -> None:
        """Gives the memory back once the last process has unmapped it."""
        os.close(self._fd)
        self.buffer = torch.empty(0, dtype=torch.uint8)


class SharedMemoryTransport(WeightTransport):
    """Both ends on one host.

    Args:
        slots: versions that stay fetchable; each holds memory of the size of the weights.
        make_segment: makes such memory, given its size in bytes.
    """

    def __init__(self, slots: int = 1, make_segment: Callable[[int], Segment] = Segment) -> None:
        self.slots, self.make_segment = slots, make_segment
        # By location; the version that was sent longest ago comes first.
        self.segments: dict[str, Segment] = {}

    def send(self, version: int, weights: PolicyWeights) -> WeightUpdate:
        layout = Layout(version, weights.specs)
        segment = self._next_segment(layout.size)
        # Whoever still reads the version that was here finds out.
        segment.buffer[:PREFIX] = 0
        layout.fill(weights, lambda entry, tensor: copy_with_checksum(view(segment.buffer, entry), tensor))
        header = torch.frombuffer(bytearray(layout.header()), dtype=torch.uint8)
        segment.buffer[PREFIX : len(header)] = header[PREFIX:]
        segment.buffer[:PREFIX] = header[:PREFIX]
        return WeightUpdate(version, segment.location, layout.entries, lasting=self.slots > 1)

    def close(self) -> None:
        for segment in self.segments.values():
            segment.close()
        self.segments.clear()

    def _next_segment(self, size: int) -> Segment:
        oldest = self.segments.pop(next(iter(self.segments))) if len(self.segments) == self.slots else None
        if oldest is not None and oldest.size != size:
            oldest.close()
            oldest = None
        segment = oldest or self.make_segment(size)
        self.segments[segment.location] = segment
        return segment
