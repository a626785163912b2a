# All rights reserved.
#
# This source code is licensed under the BSD-style license found in the
# LICENSE file in the root directory of this source tree.

"""How many of the policy's weights a step changed, as the generators have them."""

import dataclasses
from collections.abc import Iterator

import torch
from torchtitan.experiments.rl.unified.weights.base import PolicyWeights

# Elements of a tensor that are looked at, evenly spaced, always the same.
SAMPLE = 1 << 16


class Changes:
    """Compares each version of the weights that is sent with the one before, in the dtype it arrives in."""

    def __init__(self) -> None:
        self._before: dict[str, torch.Tensor] = {}
        self._changed = self._compared = 0

    def watch(self, weights: PolicyWeights) -> PolicyWeights:
        """The same weights, looked at as they are sent."""
        self._changed = self._compared = 0
        return dataclasses.replace(weights, stream=self._looked_at(weights))

    def share(self) -> float | None:
        """Of the weights watched last, those that differ from the version before; None without one."""
        return self._changed / self._compared if self._compared else None

    def _looked_at(self, weights: PolicyWeights) -> Iterator[tuple[str, torch.Tensor]]:
        for name, tensor in weights:
            sample = tensor.flatten()[:: max(1, tensor.numel() // SAMPLE)].to("cpu", copy=True)
            if (before := self._before.get(name)) is not None:
                self._changed += int((sample != before).sum())
                self._compared += sample.numel()
            self._before[name] = sample
            yield name, tensor
