# All rights reserved.
#
# This source code is licensed under the BSD-style license found in the
# LICENSE file in the root directory of this source tree.

"""The hardware a job runs on. To add one: its folder, with a DEVICE."""

import functools
import importlib
import os

import torch
from torchtitan.experiments.rl.unified.devices.base import Device

__all__ = ["Device", "device_of", "this_device"]


@functools.cache
def this_device() -> Device:
    """This machine's: RL_DEVICE names one ("cpu", "gpu", or a folder here), else a GPU where the driver has one.

    The question does not initialise CUDA: a process can still choose its cards, and fork.

    Raises:
        ValueError: RL_DEVICE names none, or a GPU on a machine without one.
    """
    wanted = os.environ.get("RL_DEVICE", "")
    name = {"": _found(), "gpu": "cuda"}.get(wanted, wanted)
    if wanted and name == "cuda" and _found() != "cuda":
        raise ValueError(f"RL_DEVICE={wanted}, but this machine has no GPU that torch can use: unset it, or take cpu")
    try:
        return _load(name)
    except (ModuleNotFoundError, AttributeError):
        raise ValueError(f"RL_DEVICE={wanted}: there is no such device here; cpu and gpu are") from None


def device_of(tensor: torch.Tensor) -> Device:
    """Where the tensor lies: this machine's device, or the one that torch calls so."""
    device = this_device()
    return device if device.name == tensor.device.type else _load(tensor.device.type)


def _load(name: str) -> Device:
    return importlib.import_module(f"{__name__}.{name}").DEVICE


def _found() -> str:
    from torchtitan.experiments.rl.unified.devices.cuda import DEVICE

    return "cuda" if DEVICE.cards() else "cpu"
