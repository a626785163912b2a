# All rights reserved.
#
# This source code is licensed under the BSD-style license found in the
# LICENSE file in the root directory of this source tree.

"""What a machine lacks is one line of --dry_run, which is the job's, before anything is spawned."""

import os
import subprocess
import sys

import pytest
from torchtitan.experiments.rl.unified import infer, simple_rl_multiprocess

FLAGS = ["--dry_run", "--parity.check=off"]


def dry_run(start: list[str], *flags: str, **environment: str) -> subprocess.CompletedProcess:
    command = [*start, sys.executable, simple_rl_multiprocess.__file__, *FLAGS, *flags]
    return subprocess.run(command, capture_output=True, text=True, timeout=120, env={**os.environ, **environment})


@pytest.mark.parametrize(
    "start, environment, complaint",
    [
        ([], {"XDG_CACHE_HOME": "/proc/x"}, "compiled kernels: no folder for compiled kernels: "),
        ([], {"TMPDIR": "/nonexistent"}, "TMPDIR=/nonexistent is no folder that can be written in"),
        ([], {"GLOO_SOCKET_IFNAME": "eth99"}, "GLOO_SOCKET_IFNAME=eth99: there is no such interface, but "),
        (
            [],
            {"VLLM_LOGGING_CONFIG_PATH": "/nonexistent"},
            "VLLM_LOGGING_CONFIG_PATH=/nonexistent: there is no such file",
        ),
        ([], {"TORCH_DISTRIBUTED_DEBUG": "DETAIL"}, "TORCH_DISTRIBUTED_DEBUG=DETAIL: process groups of one rank"),
        (["bash", "-c", 'ulimit -n 100; exec "$@"', "-"], {}, "a process here may open 100 files, and one of this job"),
        (["unshare", "-n"], {}, "processes of this host cannot reach each other by 127.0.0.1"),
    ],
)
def test_what_a_machine_lacks_is_said_in_one_line(start, environment, complaint, tmp_path):
    if start[:1] == ["unshare"] and subprocess.run([*start, "true"], capture_output=True).returncode:
        pytest.skip("the kernel allows no network namespace")
    done = dry_run(start, f"--job.dump_folder={tmp_path / 'run'}", **environment)
    assert done.returncode == 1
    (line,) = done.stderr.splitlines()
    assert line.startswith(f"error: {complaint}") and not (tmp_path / "run").exists()


@pytest.mark.skipif(len(os.sched_getaffinity(0)) < 2, reason="one core alone")
def test_pinning_by_the_environment_is_not_taken_for_the_machine():
    for variables in ({"OMP_PROC_BIND": "close", "OMP_PLACES": "cores"}, {"GOMP_CPU_AFFINITY": "0"}):
        done = dry_run([], **variables)
        assert done.returncode == 0 and "compute threads" not in done.stderr, done.stderr


def test_a_working_directory_that_has_been_deleted_is_named(tmp_path):
    (tmp_path / "gone").mkdir()
    start = ["bash", "-c", f'cd {tmp_path}/gone && rmdir {tmp_path}/gone && exec "$@"', "-"]
    done = dry_run(start)
    assert done.returncode == 1 and done.stderr.startswith("error: the working directory has been deleted"), done.stderr


def test_a_librarys_warning_is_no_error():
    done = dry_run([], PYTHONWARNINGS="error", VLLM_CPU_KVCACHE_SPACE="500")
    assert done.returncode == 0 and done.stderr == "", done.stderr


def test_infer_says_in_one_line_that_no_kernel_can_be_loaded():
    environment = {**os.environ, "XDG_CACHE_HOME": "/dev/null"}
    done = subprocess.run(
        [sys.executable, infer.__file__], capture_output=True, text=True, timeout=120, env=environment
    )
    (line,) = done.stderr.splitlines()
    assert done.returncode == 1 and line.startswith("error: compiled kernels: no folder for compiled kernels"), line


def test_a_low_limit_that_may_be_raised_is_raised():
    done = dry_run(["bash", "-c", 'ulimit -S -n 100; exec "$@"', "-"])
    assert done.returncode == 0, done.stderr


def test_nobody_has_to_read_what_a_job_says(tmp_path):
    """Proves that closed and broken streams, and letters that they have not, change neither plan nor exit status."""
    command = f"{sys.executable} {simple_rl_multiprocess.__file__} --dry_run --parity.check=off"
    for redirect in ("| true", "2>&1 | head -c 1", ">&-", ">&- 2>&-"):
        done = subprocess.run(["bash", "-c", f"{command} {redirect}; exit ${{PIPESTATUS[0]}}"], timeout=120)
        assert done.returncode == 0, redirect
    folder = tmp_path / "Z\u00fcrich"
    done = dry_run([], f"--job.dump_folder={folder}", PYTHONIOENCODING="ascii")
    assert done.returncode == 0 and "Z\\xfcrich" in done.stdout and "memory" in done.stdout, done.stderr


@pytest.mark.slow
def test_a_job_whose_reader_leaves_takes_its_steps(tmp_path):
    flags = f"--job.dump_folder={tmp_path}/run --training.steps=1 --rl.prompts_per_step=2 --evaluation.interval=0"
    command = f"{sys.executable} {simple_rl_multiprocess.__file__} {flags} 2>&1 | head -1; exit ${{PIPESTATUS[0]}}"
    done = subprocess.run(["bash", "-c", command], capture_output=True, text=True, timeout=300)
    assert done.returncode == 0 and done.stdout.count("\n") == 1
    assert (tmp_path / "run" / "metrics.jsonl").read_text(encoding="utf-8").count("\n") == 1
    assert (tmp_path / "run" / "report.html").exists()
