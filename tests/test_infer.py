# All rights reserved.
#
# This source code is licensed under the BSD-style license found in the
# LICENSE file in the root directory of this source tree.

"""infer.py as a user runs it."""

import subprocess
import sys
from pathlib import Path

import pytest
from torchtitan.experiments.rl.unified import infer


def run(folder: Path, *flags: str) -> subprocess.CompletedProcess:
    return subprocess.run(
        [sys.executable, infer.__file__, *flags], capture_output=True, text=True, timeout=300, cwd=folder
    )


@pytest.mark.slow
def test_one_rank_and_two_print_prompt_and_the_same_text(tmp_path):
    """Proves that TorchTitan's model generates inside vLLM, whole and sharded."""
    texts = []
    for flags in ([], ["--tensor-parallel-size", "2"]):
        done = run(tmp_path, "--temperature", "0", *flags)
        assert done.returncode == 0, done.stderr
        assert "How many eggs does Ada have now?" in done.stdout
        texts.append(done.stdout)
        _, _, text = done.stdout.partition("\nText: ")
        assert "####" in text
    assert texts[0] == texts[1]


@pytest.mark.parametrize(
    ("flags", "complaint"),
    [
        (["--model-ckpt-path", "/no/such"], "no checkpoint directory /no/such"),
        (["--tensor-parallel-size", "3"], "does not divide the model's 2 key/value heads"),
        (["--max-tokens", "100000"], "do not fit the model's context"),
        (["--max-tokens", "0"], "do not fit the model's context"),
        (["--model-ckpt-path", "org/model"], "first: python scripts/download_hf_assets.py --repo_id org/model"),
    ],
)
def test_bad_input_is_one_error(flags, complaint, capsys):
    assert infer.main(flags) == 1
    error = capsys.readouterr().err.strip()
    assert error.startswith("error: ") and complaint in error and "\n" not in error
