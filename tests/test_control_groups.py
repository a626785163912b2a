# All rights reserved.
#
# This source code is licensed under the BSD-style license found in the
# LICENSE file in the root directory of this source tree.

"""Limits that control groups set, as Linux's two versions write them, on groups within groups."""

from pathlib import Path

import pytest
from torchtitan.experiments.rl.unified.config.control_groups import limits

# /proc/self/cgroup, files below the mount, and the limits of memory and of cores.
CASES = {
    "version 2": ("0::/\n", {"memory.max": "1000", "cpu.max": "150000 100000"}, [1000], [1.5]),
    "none": ("0::/\n", {"memory.max": "max", "cpu.max": "max 100000"}, [], []),
    "nested": (
        "0::/system.slice/run-1.scope\n",
        {"system.slice/memory.max": "5000", "system.slice/run-1.scope/memory.max": "max"}
        | {"system.slice/run-1.scope/memory.high": "4000", "cpu.max": "200000 100000"},
        [4000, 5000],
        [2],
    ),
    "version 1": (
        "4:memory:/slurm/job_7\n3:cpuset:/\n2:cpu,cpuacct:/slurm/job_7\n0::/\n",
        {"memory/slurm/job_7/memory.limit_in_bytes": "3000", "memory/memory.limit_in_bytes": "9223372036854771712"}
        | {"cpu,cpuacct/slurm/job_7/cpu.cfs_quota_us": "300000", "cpu,cpuacct/slurm/job_7/cpu.cfs_period_us": "100000"}
        | {"cpu,cpuacct/cpu.cfs_quota_us": "-1", "cpu,cpuacct/cpu.cfs_period_us": "100000"},
        [3000, 9223372036854771712],
        [3],
    ),
    "a container's": ("4:memory:/docker/abc\n", {"memory/memory.limit_in_bytes": "7000"}, [7000], []),
    "nothing mounted": ("0::/\n", {}, [], []),
}


@pytest.mark.parametrize("case", CASES)
def test_a_limit_of_any_group_around_this_process_counts(case, tmp_path):
    own, files, memory, cores = CASES[case]
    (tmp_path / "own").write_text(own, encoding="utf-8")
    for name, content in files.items():
        file = Path(tmp_path / "root" / name)
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(f"{content}\n", encoding="utf-8")
    found = [limits(resource, str(tmp_path / "root"), str(tmp_path / "own")) for resource in ("memory", "cpu")]
    assert found == [memory, cores]


def test_no_list_of_groups_is_no_limit(tmp_path):
    assert limits("memory", str(tmp_path), str(tmp_path / "absent")) == []
