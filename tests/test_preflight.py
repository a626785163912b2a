# All rights reserved.
#
# This source code is licensed under the BSD-style license found in the
# LICENSE file in the root directory of this source tree.

"""What is refused because it cannot be computed batch-invariantly, and what allows it."""

import json
import shutil
from pathlib import Path

import pytest
import torch
import torch.distributed.checkpoint as torch_dcp
from safetensors.torch import load_file, save_file
from torchtitan.experiments.rl.unified import simple_rl_multiprocess
from torchtitan.experiments.rl.unified.config.load import load_job_config
from torchtitan.experiments.rl.unified.families import model_of_checkpoint
from torchtitan.experiments.rl.unified.preflight.model import (
    check_arithmetic,
    check_checkpoint,
    check_recomputation,
    check_resume,
    check_vocabulary,
    lost_updates,
)

TINY = Path(__file__).parent / "assets/qwen3_tiny/config.json"


def of_shape(folder: Path, *flags: str, **changes):
    """The job of a checkpoint whose config.json differs from the tiny one's."""
    (folder / "config.json").write_text(json.dumps(json.loads(TINY.read_text()) | changes))
    return load_job_config([f"--model.hf_assets_path={folder}", *flags])


def test_a_head_size_without_a_kernel_is_refused_with_the_way_out(tmp_path):
    with pytest.raises(ValueError, match=r"no kernel for head size 48 on cpu; .*\[parity\] check = \"off\" runs"):
        check_arithmetic(of_shape(tmp_path, head_dim=48))
    check_arithmetic(of_shape(tmp_path, "--parity.check=off", head_dim=48))


def test_instruction_sets_that_are_not_there_are_refused(monkeypatch):
    monkeypatch.setenv("RL_CPU_ISA", "sse")
    with pytest.raises(ValueError, match="RL_CPU_ISA=sse is none of avx2, avx512, avx512_bf16, amx"):
        check_arithmetic(load_job_config([]))


def test_experts_run_in_unified_mode_and_not_spread_over_ranks(tmp_path):
    moe = {"model_type": "qwen3_moe", "num_experts": 8, "num_experts_per_tok": 2, "moe_intermediate_size": 64}
    moe |= {"norm_topk_prob": True, "decoder_sparse_step": 1, "mlp_only_layers": []}
    check_arithmetic(of_shape(tmp_path, **moe))
    with pytest.raises(ValueError, match='"vllm_compat" knows the dense Qwen3'):
        check_arithmetic(of_shape(tmp_path, "--rl.mode=vllm_compat", **moe))
    degrees = ["--parallelism.tensor_parallel_degree=2", "--generator.tensor_parallel_degree=2"]
    with pytest.raises(ValueError, match="a mixture of experts is not spread over ranks here; use 1, or FSDP"):
        check_arithmetic(of_shape(tmp_path, *degrees, **moe))


BF16 = ["--training.dtype=bfloat16", "--training.mixed_precision_param=bfloat16", "--generator.dtype=bfloat16"]


def test_updates_that_bf16_rounds_away_are_a_warning(capsys):
    assert simple_rl_multiprocess.main(["--dry_run", *BF16, "--optimizer.lr=1e-5"]) == 0
    [line] = [line for line in capsys.readouterr().err.splitlines() if "lr" in line]
    assert line.startswith("warning: [optimizer] lr = 1e-05 is below 0.00012, half of what tells the median weight (")
    assert not lost_updates(load_job_config([*BF16, "--optimizer.lr=0.000123"]))
    assert not lost_updates(load_job_config(["--optimizer.lr=1e-5", "--training.mixed_precision_param=bfloat16"]))


def test_a_resume_does_not_miss_the_weights_that_its_run_began_with(tmp_path):
    flags = [*BF16, f"--job.dump_folder={tmp_path}", "--checkpoint.enable", "--optimizer.lr=1e-5"]
    config = load_job_config([*flags, "--checkpoint.initial_load_path=/gone"])
    with pytest.raises(ValueError, match="initial_load_path: no checkpoint directory /gone"):
        check_resume(config)
    model = model_of_checkpoint(str(TINY.parent)).build()
    with torch.no_grad():
        for param in model.parameters():
            param.normal_(0, 0.04)
    state = {**model.state_dict(), "train_state": {"step": 2}}
    torch_dcp.save(state, checkpoint_id=tmp_path / "checkpoint/step-2", no_dist=True)
    check_resume(config)
    assert len(lost_updates(config)) == 1
    config.policy_loss.kl_weight = 0.1  # Its reference is read from there again.
    with pytest.raises(ValueError, match="initial_load_path: no checkpoint directory /gone"):
        check_resume(config)


def test_half_a_step_is_what_bf16_rounds_by(tmp_path):
    """With every weight the same: an update of half a step or more moves it, a smaller one does not."""
    for file in TINY.parent.iterdir():
        shutil.copy(file, tmp_path)
    for weight in (1.0, 0.75, 0.0078125, 1.9):
        state = load_file(TINY.parent / "model.safetensors")
        save_file(
            {name: torch.full_like(tensor, weight) for name, tensor in state.items()}, tmp_path / "model.safetensors"
        )
        rounded = torch.tensor(weight).bfloat16()
        for factor in (0.9, 1.1):
            lr = factor * (torch.nextafter(rounded, torch.tensor(9.0).bfloat16()) - rounded).item() / 2
            moves = (rounded.float() + lr).bfloat16() != rounded
            config = load_job_config([*BF16, f"--model.hf_assets_path={tmp_path}", f"--optimizer.lr={lr}"])
            assert bool(lost_updates(config)) == (not moves) == (factor < 1), (weight, factor)


@pytest.mark.skipif(torch.cuda.is_available(), reason="a GPU has other blocks")
def test_blocks_that_the_kernel_has_not_are_refused():
    check_vocabulary(load_job_config(["--generator.block_size", "64"]))
    for size in ("7", "16", "33"):
        with pytest.raises(ValueError, match=rf"^\[generator\] block_size {size}: the paged kernel .* multiple of 32"):
            check_vocabulary(load_job_config(["--generator.block_size", size]))


def test_settings_beyond_the_model_are_refused():
    for flags, look, complaint in (
        (["--sampling.top_k=513"], check_vocabulary, "top_k = 513 is above the vocabulary's 512 tokens"),
        (["--sampling.top_p=0.001"], check_vocabulary, "top_p = 0.001 leaves the likeliest of 512 tokens alone"),
        (["--generator.kv_cache_gib=1e-6"], check_vocabulary, "kv_cache_gib = 1e-06 does not hold one sequence"),
        (["--training.seq_len=2048"], check_checkpoint, "seq_len 2048 is beyond the context of the model .* = 1024"),
    ):
        with pytest.raises(ValueError, match=complaint):
            look(load_job_config(flags))
    check_vocabulary(load_job_config(["--sampling.top_k=512"]))
    selective = ["--activation_checkpoint.mode=selective", "--activation_checkpoint.selective_ac_option"]
    fqns = "--activation_checkpoint.per_op_sac_force_recompute_mm_shapes_by_fqns"
    for option, words, complaint in (
        ("3", [], 'selective_ac_option = "3" of 2 layers recomputes none'),
        ("op", [fqns, "feed_forward.w1", "nosuch"], "no linear layer has 'nosuch' in its name"),
        ("op", [fqns, "feed_forward"], "layers.0.feed_forward, which is no linear layer, has 'feed_forward' in"),
    ):
        with pytest.raises(ValueError, match=complaint):
            check_recomputation(load_job_config([*selective, option, *words]))
    check_recomputation(load_job_config([*selective, "2", fqns, "feed_forward.w1"]))
    with pytest.raises(ValueError, match="initial_load_model_only = false, but .* holds weights alone"):
        tiny = load_job_config([]).model.hf_assets_path
        flags = [f"--checkpoint.initial_load_path={tiny}", "--checkpoint.no_initial_load_model_only"]
        check_resume(load_job_config(flags))
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
