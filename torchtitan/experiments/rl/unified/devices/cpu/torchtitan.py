# All rights reserved.
#
# This source code is licensed under the BSD-style license found in the
# LICENSE file in the root directory of this source tree.

"""Compatibility fixes that let torchtitan 0.2.2 train on a machine without an accelerator.

All of this project's changes to torchtitan's globals are here, and none is made by importing
this module: a process that trains calls :func:`prepare_torchtitan` first. Each fix states its
symptom, its cause and when it can go.
"""

import os
import resource
import sys
from types import SimpleNamespace
from typing import Any

import torch


def prepare_torchtitan() -> None:
    """Make torchtitan's trainer run on this machine's CPU if there is no accelerator.

    Call it once in each process that builds a ``torchtitan.train.Trainer``, before that. Calling it
    again, or on a machine with an accelerator, changes nothing.
    """
    from torchtitan.components import metrics
    from torchtitan.distributed import parallel_dims, utils as dist_utils
    from torchtitan.tools import profiling, utils

    if utils.device_type == "cpu":
        return

    # Symptom: "Torch not compiled with CUDA enabled" when the trainer is built.
    # Cause: torchtitan.tools.utils takes "cuda" where torch finds no accelerator, and these modules
    # copy both names at import.
    # Goes when: torchtitan falls back to the CPU, or reads the device from its config.
    cpu = CpuDeviceModule()
    for module in (utils, metrics, dist_utils, parallel_dims, profiling):
        for name, value in (("device_type", "cpu"), ("device_module", cpu)):
            if hasattr(module, name):
                setattr(module, name, value)

    # Symptom: two warnings a process (no lspci, no such device), and a utilisation measured against an A100.
    # Cause: get_peak_flops knows accelerators only. An unknown peak counts as infinite: utilisation reads 0.
    # Goes when: torchtitan leaves out the utilisation of a device whose peak it does not know.
    utils.get_peak_flops = lambda device_name: float("inf")


class CpuDeviceModule:
    """``torch.cpu`` with the calls that torchtitan makes of a device module and torch.cpu lacks.

    Symptom: AttributeError in torchtitan's DeviceMemoryMonitor; TypeError in its ``set_pg_timeouts``,
    after the first step.
    Cause: the monitor reads an accelerator's allocator, and ``torch.cpu.current_device()`` is "cpu"
    where ``torch.distributed.barrier(device_ids=...)`` takes integers.
    Goes when: torch.cpu answers these calls, or torchtitan stops making them on a CPU.

    Memory is that of the process: its peak resident size, in bytes, out of the machine's.
    """

    def __getattr__(self, name: str) -> Any:
        return getattr(torch.cpu, name)

    def current_device(self) -> int:
        return 0

    def get_device_name(self, device: torch.device | None = None) -> str:
        return "CPU"

    def get_device_properties(self, device: torch.device | None = None) -> SimpleNamespace:
        return SimpleNamespace(total_memory=os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"))

    def memory_stats(self, device: torch.device | None = None) -> dict[str, int]:
        unit_bytes = 1 if sys.platform == "darwin" else 1024  # getrusage(2): bytes there, KiB on Linux
        peak_bytes = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit_bytes
        return {"active_bytes.all.peak": peak_bytes, "reserved_bytes.all.peak": peak_bytes}

    def reset_peak_memory_stats(self, device: torch.device | None = None) -> None:
        """The kernel keeps one peak for the life of the process: there is nothing to reset."""

    def empty_cache(self) -> None:
        """The CPU allocator keeps no cache."""
