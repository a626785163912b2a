# All rights reserved.
#
# This source code is licensed under the BSD-style license found in the
# LICENSE file in the root directory of this source tree.

"""A completion is a function of weights, prompt, sampling settings and seed, and of nothing else."""

import json
import subprocess
import sys

import pytest

SCRIPT = """
import json, sys
from torchtitan.experiments.rl.unified.generator.generator import Generator
from torchtitan.experiments.rl.unified.config.environment import prepare_environment
from torchtitan.experiments.rl.unified.config.load import load_job_config
from torchtitan.experiments.rl.unified.messages import completion_seed, Request

prepare_environment()
first, last, *flags = sys.argv[1:]
config = load_job_config(["--sampling.max_tokens", "48", *flags])
generator = Generator(config)
scheduler = generator.engine.llm_engine.engine_core.engine_core.scheduler
preempt, preemptions = scheduler._preempt_request, []
scheduler._preempt_request = lambda *args, **kwargs: (preemptions.append(args), preempt(*args, **kwargs))[1]
requests = [
    Request(str(i), 0, [(7 * i + j) % 500 + 3 for j in range(10 + i % 50)], completion_seed(1, str(i), 0))
    for i in range(64)
]
trajectories = generator.generate(requests[int(first) : int(last)])
rows = [[t.request.uid, t.completion_ids, [x.hex() for x in t.logprobs.tolist()]] for t in trajectories]
print(json.dumps({"rows": rows, "preemptions": len(preemptions)}))
"""


def sample(first: int, last: int, *flags: str) -> tuple[dict, int]:
    """Completions of requests first..last in a process of their own, by request; and how many were preempted."""
    done = subprocess.run(
        [sys.executable, "-c", SCRIPT, str(first), str(last), *flags], capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0, done.stderr
    answer = json.loads(done.stdout.splitlines()[-1])
    return {uid: (ids, logprobs) for uid, ids, logprobs in answer["rows"]}, answer["preemptions"]


@pytest.mark.slow
def test_alone_in_a_batch_of_64_preempted_and_in_a_fresh_process():
    """Proves that neither the batch, nor preemption, nor chunked prefill, nor the process enters a completion."""
    small_engine = ["--generator.kv_cache_gib", "0.0005", "--generator.max_num_batched_tokens", "64"]
    batch, preemptions = sample(0, 64, *small_engine, "--generator.max_num_seqs", "64")
    assert preemptions > 0, "the cache was large enough: nothing was preempted"
    alone, _ = sample(5, 6)
    assert len(batch) == 64 and alone["5"] == batch["5"]
    few, _ = sample(0, 8, "--generator.num_threads", "1")
    assert few == {uid: batch[uid] for uid in few}
    assert len({tuple(ids) for ids, _ in batch.values()}) > 32, "seeds make completions differ"
