# All rights reserved.
#
# This source code is licensed under the BSD-style license found in the
# LICENSE file in the root directory of this source tree.

"""Each family trains and generates from a checkpoint that transformers wrote, of a shape that no flavor has."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parent))
from checkpoints import write_checkpoint  # noqa: E402

COMMAND = Path(__file__).parents[2] / "torchtitan/experiments/rl/unified/simple_rl_multiprocess.py"
SMALL = ["--training.steps=2", "--rl.prompts_per_step=4", "--rl.group_size=4", "--sampling.max_tokens=24"]
ONE_RANK = ["--parallelism.data_parallel_replicate_degree=1", "--evaluation.interval=0"]
BF16 = ["--training.mixed_precision_param=bfloat16", "--generator.dtype=bfloat16"]


@pytest.mark.slow
@pytest.mark.parametrize(
    "kind, flags", [("llama", BF16), ("qwen3_moe", []), ("qwen3", [*BF16, "--rl.mode=vllm_compat"])]
)
def test_no_token_differs(kind, flags, tmp_path):
    checkpoint = write_checkpoint(tmp_path / "checkpoint", kind)
    folder = tmp_path / "run"
    words = [f"--model.hf_assets_path={checkpoint}", f"--job.dump_folder={folder}", *SMALL, *ONE_RANK, *flags]
    done = subprocess.run([sys.executable, COMMAND, *words], capture_output=True, text=True, timeout=500)
    assert done.returncode == 0, done.stderr[-2000:]
    metrics = [json.loads(line) for line in (folder / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]
    assert len(metrics) == 2
    for step in metrics:
        assert step["mismatched_tokens"] == 0 and step["tokens_compared"] == step["tokens_sampled"] > 16
        assert step["grad_norm"] >= 0
