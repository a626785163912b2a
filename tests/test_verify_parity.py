# All rights reserved.
#
# This source code is licensed under the BSD-style license found in the
# LICENSE file in the root directory of this source tree.

"""The parity check as a user runs it, and that it can fail."""

import json
import subprocess
import sys

import pytest
import torch
from torchtitan.experiments.rl.unified.config.load import REPOSITORY

SCRIPTS = REPOSITORY / "scripts"
FORGETS_UPDATES = """
import sys
import verify_parity

sync = verify_parity.Pair.sync
verify_parity.Pair.sync = lambda pair: None if pair.trainer.step else sync(pair)
sys.exit(verify_parity.main())
"""


def run(*command: str) -> subprocess.CompletedProcess:
    return subprocess.run([sys.executable, *command], capture_output=True, text=True, timeout=300, cwd=SCRIPTS)


@pytest.mark.slow
def test_quick_matrix_has_no_mismatch(tmp_path):
    """Proves bitwise parity in both modes and dtypes over batches, chunks, sampling settings and a weight update."""
    dtypes = ("bfloat16",) if torch.cuda.is_available() else ("bfloat16", "float32")
    done = run("verify_parity.py", "--quick", "--json", str(tmp_path / "table.json"))
    assert done.returncode == 0, done.stdout + done.stderr
    rows = json.loads((tmp_path / "table.json").read_text())["rows"]
    assert {(row["mode"], row["dtype"]) for row in rows} == {
        (mode, dtype) for mode in ("unified", "vllm_compat") for dtype in dtypes
    }
    assert all(row["tokens_compared"] > 0 and row["mismatched_tokens"] == 0 for row in rows)
    assert sum(row["tokens_compared"] for row in rows) > 3000 * len(dtypes)


@pytest.mark.slow
def test_a_forgotten_update_is_a_mismatch():
    """Proves that the check can fail."""
    done = run("-c", FORGETS_UPDATES, "--quick", "--modes", "unified", "--dtypes", "float32")
    assert done.returncode == 1, done.stdout + done.stderr
    [row] = [line for line in done.stdout.splitlines() if "after 1 weight updates" in line]
    assert int(row.split()[3]) > 0
