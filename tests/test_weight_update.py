# All rights reserved.
#
# This source code is licensed under the BSD-style license found in the
# LICENSE file in the root directory of this source tree.

"""A weight update of a running engine: all of it or nothing, and proven from the engine's own memory."""

import json
import subprocess
import sys

import pytest

SCRIPT = """
import json, sys
import torch
from torchtitan.experiments.rl.unified.generator.generator import Generator
from torchtitan.experiments.rl.unified.config.environment import prepare_environment
from torchtitan.experiments.rl.unified.weights.transports import build_transport
from torchtitan.experiments.rl.unified.weights.base import PolicyWeights
from torchtitan.experiments.rl.unified.messages import TensorSpec
from torchtitan.experiments.rl.unified.errors import WeightTransferError
from torchtitan.experiments.rl.unified.config.load import load_job_config
from torchtitan.experiments.rl.unified.families import policy_train_spec
from torchtitan.experiments.rl.unified.messages import completion_seed, Request

prepare_environment()
updates, *flags = sys.argv[1:]
config = load_job_config(["--sampling.max_tokens", "8", *flags])
generator = Generator(config)
transport = build_transport(config)
torch.manual_seed(0)
spec = policy_train_spec("qwen3")
with torch.device("cpu"):
    model = spec.model_cls(spec.model_args["tiny"])
requests = [Request(str(i), 0, list(range(3, 40)), completion_seed(1, str(i), 0)) for i in range(4)]


def send(version):
    with torch.no_grad():
        for param in model.parameters():
            param.normal_(0, 0.16) if param.ndim == 2 else param.uniform_(0.5, 1.5)
    params = dict(model.named_parameters())
    specs = [TensorSpec(name, torch.float32, tuple(param.shape)) for name, param in params.items()]
    return transport.send(version, PolicyWeights(specs, ((n, p.detach()) for n, p in params.items())))


def sample():
    trajectories = generator.generate(requests)
    assert all(t.policy_version == generator.policy_version for t in trajectories)
    return [[t.completion_ids, [x.hex() for x in t.logprobs.tolist()]] for t in trajectories]


def refused(action):
    try:
        action()
    except WeightTransferError as error:
        return str(error)
    raise SystemExit("no WeightTransferError")


def flip(path, position):
    with open(path, "r+b") as file:
        file.seek(position)
        byte = file.read(1)[0]
        file.seek(position)
        file.write(bytes([byte ^ 1]))
"""

UPDATES = """
answer = {"base": sample(), "versions": []}
for version in range(1, 4):
    answer["versions"].append(generator.update_weights(send(version)))
answer["new"] = sample()
bad = send(4)
flip(bad.location, bad.entries[-1].offset)
answer["refused"] = refused(lambda: generator.update_weights(bad))
answer["after refusal"] = sample()
answer["version after refusal"] = generator.policy_version
if "--generator.tensor_parallel_degree" not in flags:
    # A sender that does not wait for the generator.
    send(5)
    try:
        answer["after overwriting"] = sample()
    except WeightTransferError as error:
        answer["after overwriting"] = str(error)
    # The engine's own copy is skipped: whoever believes the transport alone would go on with old weights.
    engine_model = generator.engine.llm_engine.model_executor.driver_worker.model_runner.get_model()
    engine_model.update_weights = lambda weights, lasting: None
    good = send(6)
    answer["not copied"] = refused(lambda: generator.update_weights(good))
    answer["generates no more"] = refused(sample)
transport.close()
generator.close()
print(json.dumps(answer))
"""

IN_PLACE = []  # the default: one rank, on a CPU, over shared memory
TP2 = ["--generator.tensor_parallel_degree", "2", "--parallelism.tensor_parallel_degree", "2"]


def run(script: str, *args: str) -> dict:
    done = subprocess.run([sys.executable, "-c", SCRIPT + script, *args], capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1])


@pytest.mark.slow
@pytest.mark.parametrize(
    "flags",
    [IN_PLACE, ["--rl.mode", "vllm_compat"], ["--weight_sync.transport", "file"], TP2],
    ids=["in place", "vLLM's fused layers", "file", "two ranks"],
)
def test_an_update_changes_the_engine_or_leaves_it_alone(flags, tmp_path):
    """Proves that updates reach fused, tied and sharded weights, that a damaged one changes nothing, and that weights
    which the engine did not take are noticed from its own memory; so are those overwritten while it used them."""
    answer = run(UPDATES, "0", "--job.dump_folder", str(tmp_path), *flags)
    assert answer["versions"] == [1, 2, 3]
    assert answer["new"] != answer["base"]
    assert "version 4: output.weight arrived damaged" in answer["refused"] or "arrived damaged" in answer["refused"]
    assert answer["after refusal"] == answer["new"] and answer["version after refusal"] == 3
    if flags is not TP2:
        if flags is IN_PLACE:
            assert "overwritten while in use: weights of version 3: " in answer["after overwriting"]
        else:
            assert answer["after overwriting"] == answer["new"]
        assert "version 6: the engine does not hold " in answer["not copied"]
        assert "start it again" in answer["generates no more"]
    assert not list((tmp_path / "weights").glob("*"))
