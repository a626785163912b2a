# All rights reserved.
#
# This source code is licensed under the BSD-style license found in the
# LICENSE file in the root directory of this source tree.

"""scripts/verify_layouts.py: the claim, on the two layouts that combine two ways to share; and that it can fail."""

import subprocess
import sys

import pytest
from torchtitan.experiments.rl.unified.config.checks import contradictions
from torchtitan.experiments.rl.unified.config.derived import trainer_ranks
from torchtitan.experiments.rl.unified.config.load import load_job_config, REPOSITORY

SCRIPTS = REPOSITORY / "scripts"


@pytest.mark.slow
def test_layouts_of_the_trainer_agree_with_one_rank():
    """Proves that gradients, with a reference policy, do not depend on the layout, and parity in each."""
    command = [sys.executable, "verify_layouts.py", "--steps", "3", "--layouts", "FSDP 2 x TP 2"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=500, cwd=SCRIPTS)
    assert done.returncode == 0, done.stdout + done.stderr
    rows = done.stdout.splitlines()[1:]
    assert [row[:14].strip() for row in rows] == ["1 rank", "FSDP 2 x TP 2"]
    assert all(int(row.split()[-2]) > 500 for row in rows), "tokens compared"


@pytest.mark.parametrize(
    "change",
    [
        {"loss": 0.50001},
        {"grad_norm": 1.9999},
        {"mismatched_tokens": 1},
        {"tokens_compared": 99},
        {"loss": float("nan")},
    ],
)
def test_a_layout_that_differs_is_named(change, monkeypatch, capsys):
    monkeypatch.syspath_prepend(SCRIPTS)
    import verify_layouts

    def run(layout, flags, folder):
        metrics = {"loss": 0.5, "grad_norm": 2.0, "tokens_compared": 100, "mismatched_tokens": 0}
        return [metrics, metrics | (change if layout == "TP 2" else {})]

    monkeypatch.setattr(verify_layouts, "run", run)
    monkeypatch.setattr(sys, "argv", ["verify_layouts.py"])
    assert verify_layouts.main() == 1
    wrong = [line for line in capsys.readouterr().out.splitlines() if line.endswith("WRONG")]
    assert len(wrong) == 1 and wrong[0].startswith("TP 2 ")


@pytest.mark.parametrize("layout, ranks", [("FSDP 4 + 4 generators on its cards", 4), ("TP 2 + generator TP 2", 2)])
def test_layouts_of_cards_are_jobs(layout, ranks, monkeypatch):
    monkeypatch.syspath_prepend(SCRIPTS)
    import verify_cards

    config = load_job_config(verify_cards.flags_of(layout, REPOSITORY / "tests/assets/qwen3_tiny"))
    assert contradictions(config) == [] and trainer_ranks(config) == ranks and config.parity.check == "assert"
