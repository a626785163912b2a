# All rights reserved.
#
# This source code is licensed under the BSD-style license found in the
# LICENSE file in the root directory of this source tree.

"""A killed job is as if it had never been killed: scripts/chaos_resume.py, its plan and one of its trials."""

import subprocess
import sys
from importlib.util import module_from_spec, spec_from_file_location
from pathlib import Path

import pytest

SCRIPT = Path(__file__).resolve().parents[1] / "scripts" / "chaos_resume.py"


@pytest.fixture
def chaos(monkeypatch):
    spec = spec_from_file_location("chaos_resume", SCRIPT)
    module = module_from_spec(spec)
    monkeypatch.setitem(sys.modules, "chaos_resume", module)  # Dataclasses look their module up.
    spec.loader.exec_module(module)
    return module


def test_moments_are_spread_over_victims_and_phases(chaos):
    kills = chaos.plan(30, steps=6, seed=1)
    for i in range(0, 30, 3):
        assert {kill.victim for kill in kills[i : i + 3]} == set(chaos.VICTIMS)
    for i in range(0, 30, 5):
        assert {kill.phase for kill in kills[i : i + 5]} == set(chaos.PHASES)
    assert len({(kill.victim, kill.phase) for kill in kills}) > 8
    assert all(1 <= kill.step <= 6 and 0 <= kill.fraction < 1 for kill in kills)
    assert all(kill.step % 2 == 0 for kill in kills if kill.phase == "save")
    assert kills == chaos.plan(30, steps=6, seed=1) != chaos.plan(30, steps=6, seed=2)


@pytest.mark.slow
def test_a_killed_job_ends_as_the_undisturbed_one(tmp_path):
    """Proves that a kill changes no bit of weights, optimizer or metrics; the script alone has the time for many."""
    command = [sys.executable, SCRIPT, "--trials", "1", "--steps", "4", "--seed", "0", "--folder", tmp_path / "runs"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=540)
    assert done.returncode == 0, done.stdout + done.stderr
    *trials, last = [line for line in done.stdout.splitlines() if line.startswith(("trial", "1 of 1"))]
    assert last == "1 of 1 trials ended as the undisturbed run did"
    assert sum("SIGKILL" in line for line in trials) == 1, done.stdout
    assert "left behind" not in done.stdout
