# All rights reserved.
#
# This source code is licensed under the BSD-style license found in the
# LICENSE file in the root directory of this source tree.

"""What Linux's control groups, of either version, leave this process. Needs the standard library alone."""

import math
import os
from collections.abc import Iterator
from pathlib import Path


def limits(resource: str, root: str = "/sys/fs/cgroup", own: str = "/proc/self/cgroup") -> list[float]:
    """The limits of "memory" (bytes) or "cpu" (cores) of this process's group and of those around it; [] if none.

    Args:
        resource: which.
        root: where the groups are mounted.
        own: says which are this process's.
    """
    return [limit for folder in _folders(resource, Path(root), Path(own)) for limit in _read(resource, folder)]


def cores() -> int:
    """Cores that this process may keep busy: those it may run on, or fewer by a quota, rounded up."""
    return max(1, min([len(os.sched_getaffinity(0)), *(math.ceil(limit) for limit in limits("cpu"))]))


def _folders(resource: str, root: Path, own: Path) -> Iterator[Path]:
    """Those of this process's groups, outwards; in a container the mounted root may be the group itself."""
    try:
        lines = own.read_text(encoding="utf-8").splitlines()
    except OSError:
        return
    for line in lines:
        number, controllers, path = line.split(":", 2)
        if number == "0":
            mount = root
        elif resource in controllers.split(","):
            mount = root / resource if (root / resource).is_dir() else root / controllers
        else:
            continue
        folder = mount / path.lstrip("/")
        yield from (each for each in (folder, *folder.parents) if each.is_relative_to(mount))


def _read(resource: str, folder: Path) -> Iterator[float]:
    if resource == "memory":
        for name in ("memory.max", "memory.high", "memory.limit_in_bytes"):
            if (value := _text(folder / name)).isdecimal():
                yield int(value)
        return
    quota, _, period = _text(folder / "cpu.max").partition(" ")
    if not quota:
        quota, period = _text(folder / "cpu.cfs_quota_us"), _text(folder / "cpu.cfs_period_us")
    if quota.isdecimal() and period.isdecimal() and int(period):
        yield int(quota) / int(period)


def _text(file: Path) -> str:
    try:
        return file.read_text(encoding="utf-8").strip()
    except OSError:
        return ""
