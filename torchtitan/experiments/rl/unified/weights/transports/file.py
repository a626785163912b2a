# All rights reserved.
#
# This source code is licensed under the BSD-style license found in the
# LICENSE file in the root directory of this source tree.

"""Weights through files that both hosts see."""

import functools
import hashlib
import os
from pathlib import Path
from typing import BinaryIO

import torch
from torchtitan.experiments.rl.unified.errors import WeightTransferError
from torchtitan.experiments.rl.unified.messages import TensorEntry, WeightUpdate
from torchtitan.experiments.rl.unified.weights.base import PolicyWeights, WeightTransport
from torchtitan.experiments.rl.unified.weights.checksum import checksum
from torchtitan.experiments.rl.unified.weights.layout import Layout


class FileTransport(WeightTransport):
    """A safetensors file a version, complete under its name or not there, in a folder that all hosts mount.

    Args:
        folder: made if missing; what others keep there stays.
        slots: versions that stay; older files are removed, those of this run's killed job at the first send.
        run: names the run, in the files' names too.
    """

    def __init__(self, folder: str | Path, slots: int = 1, run: str = "") -> None:
        self.folder = Path(folder)
        self.slots = slots
        self.prefix = f"policy-{hashlib.blake2b(run.encode(), digest_size=6).hexdigest()}"
        self._written: list[Path] = []

    def send(self, version: int, weights: PolicyWeights) -> WeightUpdate:
        """See WeightTransport.

        Raises:
            WeightTransferError: the file cannot be written; those of older versions are untouched.
        """
        layout = Layout(version, weights.specs)
        path = self.folder / f"{self.prefix}-{version}.safetensors"
        temporary = path.with_suffix(".part")
        try:
            self._make_folder()
            with temporary.open("wb") as file:
                layout.fill(weights, functools.partial(_write, file))
                file.seek(0)
                file.write(layout.header())
                file.flush()
                os.fsync(file.fileno())
            temporary.rename(path)
        except OSError as error:
            raise WeightTransferError(f"weights of version {version}: cannot write {path}: {error.strerror}") from error
        finally:
            temporary.unlink(missing_ok=True)
        self._written = [*(old for old in self._written if old != path), path]
        while len(self._written) > self.slots:
            self._written.pop(0).unlink(missing_ok=True)
        return WeightUpdate(version, str(path.absolute()), layout.entries)

    def close(self) -> None:
        while self._written:
            self._written.pop().unlink(missing_ok=True)

    def _make_folder(self) -> None:
        if self._written:
            return
        self.folder.mkdir(parents=True, exist_ok=True)
        for left_behind in self.folder.glob(f"{self.prefix}-*"):
            left_behind.unlink()


def _write(file: BinaryIO, entry: TensorEntry, tensor: torch.Tensor) -> int:
    tensor = tensor.to("cpu", entry.spec.dtype).contiguous()
    file.seek(entry.offset)
    file.write(tensor.reshape(-1).view(torch.uint8).numpy())
    return checksum(tensor)
