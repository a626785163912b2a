# All rights reserved.
#
# This source code is licensed under the BSD-style license found in the
# LICENSE file in the root directory of this source tree.

"""The receiving end, the same for every transport: maps the bytes, reads them in place, believes only checksums."""

import os
from collections.abc import Callable
from typing import Any

import torch
from torchtitan.experiments.rl.unified.errors import WeightTransferError
from torchtitan.experiments.rl.unified.messages import WeightUpdate
from torchtitan.experiments.rl.unified.weights.checksum import checksum
from torchtitan.experiments.rl.unified.weights.layout import check_version, view


class ReceivedWeights(dict[str, torch.Tensor]):
    """An update's tensors by name. They are the sender's memory, mapped.

    Args:
        update: what was sent.
        buffer: the bytes (uint8) that hold it.
    """

    def __init__(self, update: WeightUpdate, buffer: torch.Tensor) -> None:
        super().__init__((entry.spec.name, view(buffer, entry)) for entry in update.entries)
        self.update, self._buffer = update, buffer

    def check_still_there(self) -> None:
        """Raises WeightTransferError if the sender has begun to overwrite them."""
        check_version(self._buffer, self.update)


class Receiver:
    """Reads updates whose bytes lie on this host. It keeps its mapping of memory, which is not free to make.

    Args:
        open_handle: brings the bytes that an update's handle stands for, mapped or received.
    """

    def __init__(self, open_handle: Callable[[Any], torch.Tensor] | None = None) -> None:
        self._open_handle = open_handle
        self._mapped: dict[tuple[str, int, int], torch.Tensor] = {}

    def receive(self, update: WeightUpdate) -> ReceivedWeights:
        """The update's tensors, each proven to have the bytes that were sent; after use, ask whether they still do.

        Raises:
            WeightTransferError: names the version, and the first tensor that is short or damaged.
        """
        buffer = self._map(update)
        for entry in update.entries:
            if entry.end > buffer.numel():
                raise WeightTransferError(
                    f"weights of version {update.version}: {entry.spec.name} arrived cut short, {update.location} has "
                    f"{buffer.numel()} bytes and it ends at {entry.end}"
                )
        check_version(buffer, update)
        weights = ReceivedWeights(update, buffer)
        for entry in update.entries:
            if checksum(weights[entry.spec.name]) != entry.checksum:
                raise WeightTransferError(f"weights of version {update.version}: {entry.spec.name} arrived damaged")
        return weights

    def close(self) -> None:
        """Unmaps everything."""
        self._mapped.clear()

    def _map(self, update: WeightUpdate) -> torch.Tensor:
        try:
            if update.handle is not None and not _is_memory(update.location):
                return self._open(update)  # Sent anew for each that asks, into memory of its own.
            key = self._key(update)
            if key not in self._mapped:
                # Those of files, and of senders that are gone, would hold space that nobody can use.
                self._mapped = {key: buffer for key, buffer in self._mapped.items() if _is_memory(key[0])}
                self._mapped[key] = self._open(update)
        except (OSError, RuntimeError, ValueError) as error:
            raise WeightTransferError(
                f"weights of version {update.version}: {update.location} is gone or did not arrive: {error}"
            ) from error
        return self._mapped[key]

    @staticmethod
    def _key(update: WeightUpdate) -> tuple[str, int, int]:
        if update.handle is not None:
            return update.location, 0, max((entry.end for entry in update.entries), default=0)
        status = os.stat(update.location)
        return update.location, status.st_ino, status.st_size

    def _open(self, update: WeightUpdate) -> torch.Tensor:
        if update.handle is not None:
            return self._open_handle(update.handle)
        memory, size = _is_memory(update.location), os.stat(update.location).st_size
        return torch.from_file(update.location, shared=memory, size=size, dtype=torch.uint8)


def _is_memory(location: str) -> bool:
    """Memory of a process that lives: of the host, or of a GPU."""
    kind, _, rest = location.partition(":")
    path = f"/proc/{rest.split(':')[0]}" if kind == "gpu" else location
    return path.startswith("/proc/") and os.path.exists(path)
