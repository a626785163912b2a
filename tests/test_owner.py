# All rights reserved.
#
# This source code is licensed under the BSD-style license found in the
# LICENSE file in the root directory of this source tree.

"""A run's folder has one job at a time, and the lock dies with its process."""

import os
import signal
import subprocess
import sys

import pytest
from torchtitan.experiments.rl.unified.controller.signals import ends_in_order
from torchtitan.experiments.rl.unified.record.owner import check_free, owned

HOLD = """
import sys, time
from pathlib import Path
from torchtitan.experiments.rl.unified.record.owner import owned
with owned(Path(sys.argv[1])):
    print("held", flush=True)
    time.sleep(600)
"""
DEAF = """
import signal, time
from torchtitan.experiments.rl.unified.controller.signals import ends_in_order
with ends_in_order(0.5):
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    print("here", flush=True)
    time.sleep(600)
"""


def test_a_second_job_is_refused_until_the_first_one_is_killed(tmp_path):
    folder = tmp_path / "some" / "run"
    check_free(folder)
    assert not folder.exists()
    with subprocess.Popen([sys.executable, "-c", HOLD, folder], stdout=subprocess.PIPE, text=True) as holder:
        assert holder.stdout.readline() == "held\n"
        for attempt in (check_free, lambda folder: owned(folder).__enter__()):
            with pytest.raises(ValueError, match=rf"{folder} is in use by process {holder.pid} on .*another --job"):
                attempt(folder)
        holder.kill()
    check_free(folder)
    with owned(folder):
        assert f"process {os.getpid()} on" in (folder / "job.lock").read_text()


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGHUP])
@pytest.mark.parametrize("interrupted", [signal.default_int_handler, signal.SIG_IGN])
def test_signals_are_ctrl_c(number, interrupted):
    # Under nohup SIGHUP is ignored, in the background of a script SIGINT.
    before = signal.signal(number, signal.SIG_DFL), signal.signal(signal.SIGINT, interrupted)
    try:
        with pytest.raises(KeyboardInterrupt), ends_in_order(60) as received:
            signal.raise_signal(number)
        assert received == [number] and signal.getsignal(number) == signal.SIG_DFL
        assert signal.getsignal(signal.SIGINT) == interrupted
    finally:
        signal.signal(number, before[0])
        signal.signal(signal.SIGINT, before[1])


def test_a_signal_that_is_ignored_stays_so():
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        with ends_in_order(60) as received:
            signal.raise_signal(signal.SIGHUP)
        assert received == []
    finally:
        signal.signal(signal.SIGHUP, before)


def test_who_does_not_end_is_ended():
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
    with subprocess.Popen([sys.executable, "-c", DEAF], **pipes, text=True) as deaf:
        assert deaf.stdout.readline() == "here\n"
        deaf.send_signal(signal.SIGTERM)
        _, errors = deaf.communicate(timeout=30)
    assert deaf.returncode == 128 + signal.SIGTERM
    assert errors == "still not ended after 0.5 s: ending at once\n"
