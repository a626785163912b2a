# All rights reserved.
#
# This source code is licensed under the BSD-style license found in the
# LICENSE file in the root directory of this source tree.

"""The trainer's attention in TorchTitan's model, and the generator's in vLLM's engine."""

import multiprocessing
import subprocess
import sys
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

import pytest
import torch
from torch import nn
from torchtitan.experiments.rl.unified.devices.attention import packed_attention
from torchtitan.experiments.rl.unified.devices.mode import batch_invariant_mode
from torchtitan.experiments.rl.unified.families.base import replace_inner_attention
from torchtitan.experiments.rl.unified.trainer.attention import PackedAttention, StockAttention, to_packed
from torchtitan.models.attention import VarlenMetadata
from torchtitan.models.qwen3 import Qwen3Model, Qwen3ModelArgs

CHECKPOINT = Path(__file__).parents[1] / "assets/qwen3_tiny"


def sequences(*lengths: int) -> VarlenMetadata:
    starts = torch.tensor([0, *lengths]).cumsum(0).int()
    return VarlenMetadata(starts, starts, max(lengths), max(lengths))


def test_takes_torchtitans_layout_without_a_copy():
    q, k, v = (torch.randn(2, 10, heads, 64) for heads in (4, 2, 2))
    out = PackedAttention()(*(x.transpose(1, 2) for x in (q, k, v)), sequences(3, 12, 5), scale=0.3)
    starts = torch.tensor([0, 3, 15, 20], dtype=torch.int32)
    assert torch.equal(out, packed_attention(q.view(20, 4, 64), k.view(20, 2, 64), v.view(20, 2, 64), starts, 0.3))
    assert to_packed(q.transpose(1, 2)).data_ptr() == q.data_ptr()


def test_a_torchtitan_model_computes_a_packed_sequence_as_it_does_alone():
    args = Qwen3ModelArgs(
        dim=64, n_layers=2, n_heads=4, n_kv_heads=2, head_dim=32, hidden_dim=96, vocab_size=50, max_seq_len=64,
        qk_norm=True, attn_type="varlen", attn_mask_type="block_causal",
    )  # fmt: skip
    torch.manual_seed(0)
    model = Qwen3Model(args)
    with torch.no_grad():
        model.init_weights(torch.device("cpu"))
    replace_inner_attention(model, lambda name: PackedAttention())
    tokens = torch.randint(50, (1, 48))
    positions = torch.cat([torch.arange(16), torch.arange(32)])[None]
    with batch_invariant_mode():
        packed = model(tokens, attention_masks=sequences(16, 32), positions=positions)
        alone = model(tokens[:, 16:], attention_masks=sequences(32), positions=positions[:, 16:])
    assert torch.equal(packed[:, 16:], alone)
    packed.sum().backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in model.parameters())


def test_stock_attention_computes_the_same_function():
    torch.manual_seed(0)
    xq, xk, xv = torch.randn(1, 4, 60, 32), torch.randn(1, 2, 60, 32), torch.randn(1, 2, 60, 32)
    starts = torch.tensor([0, 1, 40, 60], dtype=torch.int32)
    metadata = VarlenMetadata(starts, starts, 39, 39)
    stock, packed = (attention()(xq, xk, xv, metadata) for attention in (StockAttention, PackedAttention))
    assert stock.shape == packed.shape and stock.is_contiguous()
    assert (stock - packed).norm() / packed.norm() < 1e-5


def test_every_inner_attention_is_replaced_and_a_model_without_one_is_an_error():
    model = nn.ModuleDict(
        {"layers": nn.ModuleList(nn.ModuleDict({"inner_attention": nn.Identity()}) for _ in range(2))}
    )
    names = []
    replace_inner_attention(model, lambda name: names.append(name) or PackedAttention())
    assert names == ["layers.0.inner_attention", "layers.1.inner_attention"]
    assert all(isinstance(layer["inner_attention"], PackedAttention) for layer in model["layers"])
    with pytest.raises(ValueError, match="Linear has no module called inner_attention"):
        replace_inner_attention(nn.Linear(1, 1), lambda name: PackedAttention())


def test_the_trainers_attention_does_not_import_vllm():
    code = "import sys, torchtitan.experiments.rl.unified.trainer.attention; sys.exit('vllm' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0


@pytest.fixture(scope="module")
def in_vllm_process() -> Iterator[Callable]:
    """Calls a function in a process of its own, in which VLLM_BATCH_INVARIANT=1 was set before vLLM was imported."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("VLLM_BATCH_INVARIANT", "1")
        patch.setenv("VLLM_ENABLE_V1_MULTIPROCESSING", "0")
        patch.setenv("VLLM_NO_USAGE_STATS", "1")
        patch.setenv("OMP_NUM_THREADS", "2")
        with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as pool:
            yield lambda function, *args: pool.submit(function, *args).result()


def complaint_about(kwargs: dict, dtype: str) -> str:
    """The error that an attention layer of a model in `dtype` meets, or an empty string."""
    from torchtitan.experiments.rl.unified.devices.cpu.paged import BatchInvariantImpl
    from vllm.config import set_current_vllm_config
    from vllm.engine.arg_utils import EngineArgs

    config = EngineArgs(str(CHECKPOINT), dtype=dtype, max_model_len=128).create_engine_config()
    layer = {"num_heads": 4, "head_size": 64, "scale": 0.125, "num_kv_heads": 2, **kwargs}
    try:
        with set_current_vllm_config(config):
            BatchInvariantImpl(**layer)
    except ValueError as error:
        return str(error)
    return ""


@pytest.mark.slow
@pytest.mark.parametrize(
    ("kwargs", "dtype", "named"),
    [
        ({"sliding_window": 128}, "float32", "a sliding window"),
        ({"alibi_slopes": [1.0] * 4}, "float32", "ALiBi"),
        ({"logits_soft_cap": 30.0}, "float32", "a soft cap on the scores"),
        ({"attn_type": "encoder_only"}, "float32", "attention of type encoder_only"),
        ({"kv_cache_dtype": "fp8_e4m3"}, "bfloat16", "a KV cache in fp8_e4m3 for a model in torch.bfloat16"),
        ({"kv_sharing_target_layer_name": "layers.0"}, "float32", "a KV cache shared between layers"),
        ({"sinks": torch.zeros(4)}, "float32", "attention sinks"),
        ({"head_size": 512}, "float32", "no kernel for head size 512"),
        ({}, "float16", "not in torch.float16"),
    ],
)
def test_what_the_kernel_lacks_is_refused_by_name(in_vllm_process, kwargs, dtype, named):
    complaint = in_vllm_process(complaint_about, kwargs, dtype)
    assert named in complaint and '[parity] check = "off"' in complaint


@pytest.mark.slow
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_what_the_kernel_has_is_accepted(in_vllm_process, dtype):
    assert in_vllm_process(complaint_about, {}, dtype) == ""


def make_checkpoint(folder: Path) -> Path:
    """A Qwen3 with random weights, large enough that attention is far from uniform."""
    from transformers import AutoConfig, AutoModelForCausalLM

    torch.manual_seed(0)
    sizes = {"num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 64}
    config = AutoConfig.from_pretrained(CHECKPOINT, initializer_range=0.2, dtype=torch.float32, **sizes)
    AutoModelForCausalLM.from_config(config).save_pretrained(folder)
    return folder


def complete(checkpoint: Path, dtype: str) -> tuple[list, list, dict[str, float], str]:
    """Completions of prompts with a common beginning, in one batch and one at a time, each (ids, log-probs).

    The engine has room for a part of the batch: it prefills in chunks and preempts. Also returns its counters and the
    class of its attention.
    """
    from vllm import LLM, SamplingParams, TokensPrompt

    block_bytes = 2 * 2 * 32 * 128 * torch.finfo(getattr(torch, dtype)).bits // 8  # layers, heads, tokens, K and V
    engine = LLM(
        str(checkpoint), dtype=dtype, skip_tokenizer_init=True, enforce_eager=True, max_model_len=512, block_size=32,
        kv_cache_memory_bytes=20 * block_bytes, max_num_batched_tokens=48, max_num_seqs=8, disable_log_stats=False,
    )  # fmt: skip
    generator = torch.Generator().manual_seed(1)
    shared = torch.randint(3, 500, (64,), generator=generator).tolist()
    prompts = [
        TokensPrompt(prompt_token_ids=shared + torch.randint(3, 500, (n,), generator=generator).tolist())
        for n in (1, 5, 31, 32, 33, 64, 100, 130)
    ]
    sampling = SamplingParams(temperature=0, max_tokens=40, logprobs=0, detokenize=False, ignore_eos=True)

    def run(batch: list) -> list:
        engine.reset_prefix_cache()
        outputs = [done.outputs[0] for done in engine.generate(batch, sampling, use_tqdm=False)]
        return [
            (list(o.token_ids), [step[i].logprob for step, i in zip(o.logprobs, o.token_ids, strict=True)])
            for o in outputs
        ]

    together = run(prompts)
    counters = {metric.name: metric.value for metric in engine.get_metrics() if hasattr(metric, "value")}
    alone = [completion for prompt in prompts for completion in run([prompt])]
    config = engine.llm_engine.vllm_config
    layers = config.compilation_config.static_forward_context.values()
    return together, alone, counters, "/".join({type(layer.impl).__name__ for layer in layers})


@pytest.mark.slow
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_chunks_shared_prefixes_and_preemption_leave_no_trace(in_vllm_process, tmp_path, dtype):
    checkpoint = make_checkpoint(tmp_path)
    together, alone, counters, attention = in_vllm_process(complete, checkpoint, dtype)
    assert attention == "BatchInvariantImpl"
    assert counters["vllm:num_preemptions"] > 0 and counters["vllm:prefix_cache_hits"] > 0
    assert together == alone
    assert len({tuple(ids) for ids, _ in together}) == len(together)
