# All rights reserved.
#
# This source code is licensed under the BSD-style license found in the
# LICENSE file in the root directory of this source tree.

"""What is refused because it cannot be computed batch-invariantly, and what allows it."""

from dataclasses import replace

import pytest
from torchtitan.experiments.rl.unified.config.load import load_job_config
from torchtitan.experiments.rl.unified.families import policy_train_spec
from torchtitan.experiments.rl.unified.preflight.model import check_arithmetic
from torchtitan.protocols import train_spec


@pytest.fixture
def odd_heads(monkeypatch):
    """A TrainSpec whose flavor "tiny" has heads of 48."""
    spec = policy_train_spec("qwen3")
    odd = replace(spec, model_args={"tiny": replace(spec.model_args["tiny"], head_dim=48)})
    monkeypatch.setitem(train_spec._extra_train_specs, "odd", odd)


def test_a_head_size_without_a_kernel_is_refused_with_the_way_out(odd_heads):
    with pytest.raises(ValueError, match=r"no kernel for head size 48 on cpu; .*\[parity\] check = \"off\" runs"):
        check_arithmetic(load_job_config(["--model.name", "odd"]))
    check_arithmetic(load_job_config(["--model.name", "odd", "--parity.check", "off"]))


def test_a_module_that_is_not_covered_is_named():
    with pytest.raises(ValueError, match=r"layers.0.moe.* \[parity\] check = \"off\" runs it without"):
        check_arithmetic(load_job_config(["--model.flavor", "debugmodel_moe"]))


def test_a_vocabulary_that_vllm_pads_cannot_be_shared_by_a_compat_trainer(monkeypatch):
    spec = policy_train_spec("qwen3")
    odd = replace(spec, model_args={"tiny": replace(spec.model_args["tiny"], vocab_size=500)})
    monkeypatch.setitem(train_spec._extra_train_specs, "odd", odd)
    flags = ["--model.name", "odd", "--rl.mode", "vllm_compat"]
    check_arithmetic(load_job_config(flags))
    degrees = ["--parallelism.tensor_parallel_degree", "2", "--generator.tensor_parallel_degree", "2"]
    with pytest.raises(ValueError, match="wants a vocabulary that is a multiple of 64, this has 500 tokens"):
        check_arithmetic(load_job_config(flags + degrees))
