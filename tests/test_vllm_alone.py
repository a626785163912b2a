# All rights reserved.
#
# This source code is licensed under the BSD-style license found in the
# LICENSE file in the root directory of this source tree.

"""vLLM by itself beside this package: its server runs our checkpoints, its own models do not notice us."""

import json
import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import httpx
import pytest
import torch
import torch.distributed.checkpoint as torch_dcp
from openai import OpenAI
from torchtitan.experiments.rl.unified.config.load import REPOSITORY
from torchtitan.experiments.rl.unified.families import model_of_checkpoint
from torchtitan.experiments.rl.unified.families.tensors import find_weights, load_matched

TINY = REPOSITORY / "tests/assets/qwen3_tiny"
QUESTION = "Ada has 12 eggs, buys 3 bags of 4 eggs and gives 5 to Ben. How many eggs does Ada have now?"
# What infer.py writes to the question, of each checkpoint.
INFER = """
import json, sys
from torchtitan.experiments.rl.unified import infer
for path in sys.argv[2:]:
    flags = ["--temperature", "0", "--prompt", sys.argv[1], "--model-ckpt-path", path]
    print(json.dumps(infer.generate(infer.parse_args(flags))[1]))
"""


def saved_step(folder: Path) -> Path:
    """A run with a step whose weights are not those that the run began with."""
    policy = model_of_checkpoint(str(TINY))
    state = (
        policy.train_spec()
        .state_dict_adapter(policy.args, None)
        .from_hf(dict(load_matched(*find_weights(policy, TINY))))
    )
    step = folder / "checkpoint/step-1"
    torch.manual_seed(0)
    moved = {name: tensor + 0.1 * torch.randn_like(tensor) for name, tensor in state.items() if name != "output.weight"}
    torch_dcp.save(moved, checkpoint_id=step, no_dist=True)
    text = f'[checkpoint]\nfolder = "checkpoint"\n[model]\nhf_assets_path = "{TINY}"\n'
    (folder / "config.toml").write_text(text, encoding="utf-8")
    return step


@pytest.mark.slow
def test_vllms_server_takes_a_saved_step_and_writes_what_infer_writes(tmp_path):
    """The README's command, a real server on loopback, and OpenAI's client."""
    step = saved_step(tmp_path)
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    options = {
        "--model": TINY,
        "--hf-overrides": json.dumps({"architectures": ["TorchTitanForCausalLM"]}),
        "--additional-config": json.dumps({"torchtitan": {"weights": str(step)}}),
        "--dtype": "float32",
        "--host": "127.0.0.1",
        "--port": port,
        "--kv-cache-memory-bytes": 2**27,
        "--distributed-executor-backend": "uni",  # A process fewer to wait for.
    }
    command = [
        sys.executable,
        "-m",
        "vllm.entrypoints.openai.api_server",
        *(str(w) for pair in options.items() for w in pair),
    ]
    env = {**os.environ, "VLLM_BATCH_INVARIANT": "1", "VLLM_NO_USAGE_STATS": "1"}
    with open(tmp_path / "server.log", "w") as log:
        server = subprocess.Popen(command, env=env, stdout=log, stderr=log, start_new_session=True)
    try:
        wait_for(server, f"http://127.0.0.1:{port}/health", tmp_path / "server.log")
        client = OpenAI(base_url=f"http://127.0.0.1:{port}/v1", api_key="none", max_retries=0)
        messages = [{"role": "user", "content": QUESTION}]
        answer = client.chat.completions.create(model=str(TINY), messages=messages, temperature=0, max_tokens=64)
    finally:
        os.killpg(server.pid, signal.SIGTERM)
        server.wait(timeout=60)
    done = subprocess.run(
        [sys.executable, "-c", INFER, QUESTION, step, TINY], capture_output=True, text=True, timeout=300
    )
    texts = [json.loads(line) for line in done.stdout.splitlines() if line.startswith('"')]
    assert len(texts) == 2, done.stderr[-3000:]
    assert answer.choices[0].message.content == texts[0] != texts[1]


def wait_for(server: subprocess.Popen, address: str, log: Path, seconds: float = 300) -> None:
    """Until it answers; fails with its log if it ends before."""
    end = time.monotonic() + seconds
    while time.monotonic() < end and server.poll() is None:
        try:
            if httpx.get(address).status_code == 200:
                return
        except httpx.HTTPError:
            time.sleep(0.5)
    pytest.fail(log.read_text(encoding="utf-8")[-3000:])


@pytest.mark.slow
def test_a_stock_model_answers_as_if_this_package_were_not_installed():
    """Eager and one rank; compiled, and two ranks: the script's flags."""
    script = REPOSITORY / "scripts/verify_stock_vllm.py"
    done = subprocess.run([sys.executable, script], capture_output=True, text=True, timeout=600)
    assert done.returncode == 0 and done.stdout.startswith("20 of 20 requests equal"), done.stdout + done.stderr
