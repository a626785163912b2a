# All rights reserved.
#
# This source code is licensed under the BSD-style license found in the
# LICENSE file in the root directory of this source tree.

"""The receiving end, the same for every transport: maps the bytes, reads them in place, believes only checksums."""

import os
from collections.abc import Callable
from typing import Any

import torch
from torchtitan.experiments.rl.unified.infra.weight_transport.base import WeightTransferError, WeightUpdate
from torchtitan.experiments.rl.unified.infra.weight_transport.checksum import checksum
from torchtitan.experiments.rl.unified.infra.weight_transport.layout import check_version, view


class Receiver:
    """Reads updates whose bytes lie on this host. It keeps its mapping of memory, which is not free to make.

    Args:
        open_handle: maps the memory of a GPU, given an update's handle.
    """

    def __init__(self, open_handle: Callable[[Any], torch.Tensor] | None = None) -> None:
        self._open_handle = open_handle
        self._mapped: dict[tuple[str, int, int], torch.Tensor] = {}

    def receive(self, update: WeightUpdate) -> dict[str, torch.Tensor]:
        """The update's tensors by name, each proven to have the bytes that were sent. They are the sender's memory:
        look with `check_still_there` once they have been read.

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
        tensors = {entry.spec.name: view(buffer, entry) for entry in update.entries}
        for entry in update.entries:
            if checksum(tensors[entry.spec.name]) != entry.checksum:
                raise WeightTransferError(f"weights of version {update.version}: {entry.spec.name} arrived damaged")
        return tensors

    def check_still_there(self, update: WeightUpdate) -> None:
        """Raises WeightTransferError if the sender has begun to overwrite what `receive` returned."""
        check_version(self._map(update), update)

    def close(self) -> None:
        """Unmaps everything."""
        self._mapped.clear()

    def _map(self, update: WeightUpdate) -> torch.Tensor:
        try:
            key = self._key(update)
            if key not in self._mapped:
                # Those of files, and of senders that are gone, would hold space that nobody can use.
                self._mapped = {key: buffer for key, buffer in self._mapped.items() if _is_memory(key[0])}
                self._mapped[key] = self._open(update)
        except (OSError, RuntimeError, ValueError) as error:
            raise WeightTransferError(
                f"weights of version {update.version}: {update.location} is gone; its sender has closed it or died "
                f"({error})"
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
