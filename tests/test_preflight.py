# All rights reserved.
#
# This source code is licensed under the BSD-style license found in the
# LICENSE file in the root directory of this source tree.

"""What is refused because it cannot be computed batch-invariantly, and what allows it."""

import json
from pathlib import Path

import pytest
import torch
from torchtitan.experiments.rl.unified.config.load import load_job_config
from torchtitan.experiments.rl.unified.preflight.model import check_arithmetic, check_checkpoint, check_vocabulary

TINY = Path(__file__).parent / "assets/qwen3_tiny/config.json"


def of_shape(folder: Path, *flags: str, **changes):
    """The job of a checkpoint whose config.json differs from the tiny one's."""
    (folder / "config.json").write_text(json.dumps(json.loads(TINY.read_text()) | changes))
    return load_job_config([f"--model.hf_assets_path={folder}", *flags])


def test_a_head_size_without_a_kernel_is_refused_with_the_way_out(tmp_path):
    with pytest.raises(ValueError, match=r"no kernel for head size 48 on cpu; .*\[parity\] check = \"off\" runs"):
        check_arithmetic(of_shape(tmp_path, head_dim=48))
    check_arithmetic(of_shape(tmp_path, "--parity.check=off", head_dim=48))


def test_experts_run_in_unified_mode_and_not_spread_over_ranks(tmp_path):
    moe = {"model_type": "qwen3_moe", "num_experts": 8, "num_experts_per_tok": 2, "moe_intermediate_size": 64}
    moe |= {"norm_topk_prob": True, "decoder_sparse_step": 1, "mlp_only_layers": []}
    check_arithmetic(of_shape(tmp_path, **moe))
    with pytest.raises(ValueError, match='"vllm_compat" knows the dense Qwen3'):
        check_arithmetic(of_shape(tmp_path, "--rl.mode=vllm_compat", **moe))
    degrees = ["--parallelism.tensor_parallel_degree=2", "--generator.tensor_parallel_degree=2"]
    with pytest.raises(ValueError, match="a mixture of experts is not spread over ranks here; use 1, or FSDP"):
        check_arithmetic(of_shape(tmp_path, *degrees, **moe))


@pytest.mark.skipif(torch.cuda.is_available(), reason="a GPU has other blocks")
def test_blocks_that_the_kernel_has_not_are_refused():
    check_vocabulary(load_job_config(["--generator.block_size", "64"]))
    for size in ("7", "16", "33"):
        with pytest.raises(ValueError, match=rf"^\[generator\] block_size {size}: the paged kernel .* multiple of 32"):
            check_vocabulary(load_job_config(["--generator.block_size", size]))


def test_settings_beyond_the_model_are_refused():
    for flags, look, complaint in (
        (["--sampling.top_k=513"], check_vocabulary, "top_k = 513 is above the vocabulary's 512 tokens"),
        (["--generator.kv_cache_gib=1e-6"], check_vocabulary, "kv_cache_gib = 1e-06 does not hold one sequence"),
        (["--training.seq_len=2048"], check_checkpoint, "seq_len 2048 is beyond the context of the model .* = 1024"),
    ):
        with pytest.raises(ValueError, match=complaint):
            look(load_job_config(flags))
    check_vocabulary(load_job_config(["--sampling.top_k=512"]))
    for temperature in ("3", "0.001"):
        with pytest.raises(ValueError, match="temperature = .*, but it must be 0 or at least 0.01 and at most 2"):
            load_job_config(["--sampling.temperature", temperature])


def test_llama_has_no_pair_in_vllm_compat(tmp_path):
    with pytest.raises(ValueError, match='mode = "vllm_compat" has no pair for llama3 models; mode = "unified" runs'):
        check_arithmetic(of_shape(tmp_path, "--rl.mode=vllm_compat", model_type="llama"))


def test_a_vocabulary_that_vllm_pads_cannot_be_shared_by_a_compat_trainer(tmp_path):
    check_arithmetic(of_shape(tmp_path, "--rl.mode=vllm_compat", vocab_size=500))
    degrees = ["--parallelism.tensor_parallel_degree=2", "--generator.tensor_parallel_degree=2"]
    with pytest.raises(ValueError, match="wants a vocabulary that is a multiple of 64, this has 500 tokens"):
        check_arithmetic(of_shape(tmp_path, "--rl.mode=vllm_compat", *degrees, vocab_size=500))
