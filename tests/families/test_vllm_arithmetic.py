# All rights reserved.
#
# This source code is licensed under the BSD-style license found in the
# LICENSE file in the root directory of this source tree.

"""VLLM_COMPAT: TorchTitan's Qwen3 with vLLM's arithmetic, against vLLM's engine and against float64."""

import copy
import json
import multiprocessing
from concurrent.futures import ProcessPoolExecutor
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn
from torch.nn import functional as F
from torchtitan.experiments.rl.unified.devices.mode import batch_invariant_mode
from torchtitan.experiments.rl.unified.families import family, policy_train_spec
from torchtitan.experiments.rl.unified.families.base import replace_inner_attention
from torchtitan.experiments.rl.unified.families.qwen3 import to_compat
from torchtitan.experiments.rl.unified.families.vllm_arithmetic import AddRMSNorm, Rotate
from torchtitan.experiments.rl.unified.trainer.attention import PackedAttention
from torchtitan.experiments.rl.unified.trainer.logprobs import sampling_logprobs
from torchtitan.models.attention import VarlenMetadata
from torchtitan.models.qwen3 import Qwen3Model, Qwen3StateDictAdapter

# Of the norm of the difference over the norm, against float64.
GRADIENT_ERROR = {torch.float32: 1e-5, torch.bfloat16: 1e-2}


def random_model(dtype: torch.dtype = torch.float32, **changes) -> Qwen3Model:
    """TorchTitan's own, tiny, with odd widths and weights large enough that attention is far from uniform."""
    spec = policy_train_spec("qwen3")
    args = replace(spec.model_args["tiny"], n_layers=2, hidden_dim=344, max_seq_len=256, **changes)
    torch.manual_seed(0)
    model = spec.model_cls(args)
    with torch.no_grad():
        for param in model.parameters():
            param.normal_(0, 0.08) if param.ndim == 2 else param.uniform_(0.5, 1.5)
    rope_cache = model.rope_cache
    model.to(dtype).rope_cache = rope_cache
    return model


def unified_model(model: Qwen3Model) -> Qwen3Model:
    model = copy.deepcopy(model)
    replace_inner_attention(model, lambda name: PackedAttention())
    return model


def compat_model(model: Qwen3Model) -> Qwen3Model:
    return to_compat(unified_model(model))


def packed(sequences: list[list[int]]) -> tuple[torch.Tensor, VarlenMetadata, torch.Tensor]:
    """Arguments of the model: tokens (1, T), metadata, positions (1, T)."""
    tokens = torch.tensor([token for sequence in sequences for token in sequence])[None]
    positions = torch.cat([torch.arange(len(sequence)) for sequence in sequences])[None]
    starts = torch.tensor([0, *map(len, sequences)]).cumsum(0).int()
    return tokens, VarlenMetadata(starts, starts, 0, 0), positions


def random_sequences(vocab: int, lengths: list[int]) -> list[list[int]]:
    generator = torch.Generator().manual_seed(1)
    return [torch.randint(vocab, (length,), generator=generator).tolist() for length in lengths]


def error(found: list[torch.Tensor], expected: list[torch.Tensor]) -> float:
    """Norm of the difference over the norm, of all tensors together."""
    pairs = zip(found, expected, strict=True)
    difference = torch.cat([(f.detach().double() - e.detach()).flatten() for f, e in pairs])
    return float(difference.norm() / torch.cat([e.detach().flatten() for e in expected]).norm())


def test_names_and_values_of_the_state_dict_stay():
    model = random_model()
    found, expected = compat_model(model).state_dict(), model.state_dict()
    assert list(found) == list(expected)
    assert all(torch.equal(found[name], expected[name]) for name in expected)


def test_other_models_are_refused_by_name():
    moe = policy_train_spec("qwen3").model_args["debugmodel_moe"]
    with torch.device("meta"):
        model = policy_train_spec("qwen3").model_cls(moe)
    with pytest.raises(ValueError, match='dense Qwen3 .* not one with experts; mode = "unified"'):
        to_compat(model)
    with pytest.raises(ValueError, match="not Linear;"):
        to_compat(nn.Linear(1, 1))


def rms_norm(x: torch.Tensor, residual: torch.Tensor | None, weight: torch.Tensor, eps: float) -> tuple:
    total = x if residual is None else x + residual
    return F.rms_norm(total, total.shape[-1:], weight, eps), total


@pytest.mark.parametrize("dtype", GRADIENT_ERROR)
@pytest.mark.parametrize("with_residual", [False, True])
def test_gradient_of_add_and_norm(dtype, with_residual):
    torch.manual_seed(0)
    x, residual, grad_out, grad_sum = (torch.randn(5, 7, 43).to(dtype) for _ in range(4))
    inputs = [x, residual if with_residual else None, torch.rand(43).to(dtype)]

    def gradients(function, dtype) -> list[torch.Tensor]:
        leaves = [None if i is None else i.to(dtype, copy=True).requires_grad_() for i in inputs]
        outputs = function(*leaves, 1e-6)
        torch.autograd.backward(outputs, [grad_out.to(dtype), grad_sum.to(dtype)])
        return [leaf.grad for leaf in leaves if leaf is not None]

    found = gradients(AddRMSNorm.apply, dtype)
    assert max(error([f], [e]) for f, e in zip(found, gradients(rms_norm, torch.float64))) < GRADIENT_ERROR[dtype]
    assert all(map(torch.equal, found, gradients(AddRMSNorm.apply, dtype)))


@pytest.mark.parametrize("dtype", GRADIENT_ERROR)
def test_rotation_and_its_gradient(dtype):
    torch.manual_seed(0)
    x, grad = torch.randn(9, 3, 80).to(dtype), torch.randn(9, 3, 80).to(dtype)
    angle = torch.randn(9, 40, dtype=torch.float64)
    rope = torch.cat((angle.cos(), angle.sin()), dim=-1).to(dtype)

    def reference(x, rope):
        cos, sin = rope[:, None].chunk(2, dim=-1)
        first, second = x.chunk(2, dim=-1)
        return torch.cat((first * cos - second * sin, second * cos + first * sin), dim=-1)

    leaf, reference_leaf = x.clone().requires_grad_(), x.double().requires_grad_()
    out, expected = Rotate.apply(leaf, rope), reference(reference_leaf, rope.double())
    out.backward(grad)
    expected.backward(grad.double())
    assert error([out], [expected]) < GRADIENT_ERROR[dtype]
    assert error([leaf.grad], [reference_leaf.grad]) < GRADIENT_ERROR[dtype]


@pytest.mark.parametrize("dtype", GRADIENT_ERROR)
@pytest.mark.parametrize("changes", [{}, {"enable_weight_tying": False, "vocab_size": 1003}])
@pytest.mark.parametrize("mode", [unified_model, compat_model])
def test_gradients_of_a_whole_model(mode, changes, dtype):
    model = random_model(dtype, **changes)
    with torch.no_grad():
        # bf16 rounding alone is 1.4e-2 of the gradient with the large weights.
        model.init_weights()
    sequences = random_sequences(model.vocab_size, [33, 7, 70])

    reference = copy.deepcopy(model).double()
    for block in reference.layers.values():
        # TorchTitan's other attention, which takes one sequence at a time.
        block.attention.attn_type, block.attention.inner_attention = "sdpa", ReferenceAttention()
    expected = sum(sequence_loss(reference(torch.tensor([s]))[0], s) for s in sequences)
    expected.backward()

    def gradients() -> list[torch.Tensor]:
        policy = mode(model)
        with batch_invariant_mode():
            logits = policy(*packed(sequences))[0].split([len(s) for s in sequences])
            loss = sum(map(sequence_loss, logits, sequences))
        loss.backward()
        assert abs(float(loss) / float(expected) - 1) < GRADIENT_ERROR[dtype]
        return [param.grad for param in policy.parameters()]

    found = gradients()
    assert error(found, [param.grad for param in reference.parameters()]) <= GRADIENT_ERROR[dtype]
    assert all(map(torch.equal, found, gradients()))


class ReferenceAttention(nn.Module):
    def forward(self, q, k, v, *, scale, enable_gqa):
        return F.scaled_dot_product_attention(q, k, v, is_causal=True, scale=scale, enable_gqa=enable_gqa)


def sequence_loss(logits: torch.Tensor, sequence: list[int]) -> torch.Tensor:
    logits = logits if logits.dtype == torch.float64 else logits.float()
    return F.cross_entropy(logits[:-1], torch.tensor(sequence[1:]), reduction="sum")


def write_checkpoint(folder: Path, model: Qwen3Model, dtype: str, torchtitan_names: bool) -> Path:
    weights = model.state_dict()
    if not torchtitan_names:
        weights = Qwen3StateDictAdapter(model.model_args, None).to_hf(weights)
    elif model.enable_weight_tying:
        weights.pop("output.weight")
    folder.mkdir()
    save_file({name: weight.contiguous() for name, weight in weights.items()}, folder / "model.safetensors")
    extra = {
        "model_type": "qwen3",
        "architectures": ["Qwen3ForCausalLM"],
        "dtype": dtype,
        "max_position_embeddings": 256,
    }
    (folder / "config.json").write_text(json.dumps(family("qwen3").to_hf(model.model_args) | extra))
    return folder


def complete(first: Path, second: Path, dtype: str, prompts: list[list[int]]) -> list[list[tuple[list, list]]]:
    """Completions (ids, log-probs) by vLLM's own Qwen3, started with `first`, then with the weights of `second`."""
    from torchtitan.experiments.rl.unified.generator.engine import build_engine
    from vllm import SamplingParams, TokensPrompt

    engine = build_engine(
        str(first), mode="vllm_compat", model_name="", flavor="", max_model_len=256, tensor_parallel_degree=1,
        batch_invariant=True, num_threads=2, dtype=dtype, kv_cache_memory_bytes=2**26, block_size=32,
        max_num_batched_tokens=100, max_num_seqs=16, skip_tokenizer_init=True,
    )  # fmt: skip

    def run() -> list[tuple[list, list]]:
        sampling = [
            SamplingParams(seed=seed, max_tokens=20, logprobs=0, detokenize=False, ignore_eos=True)
            for seed in range(len(prompts))
        ]
        prompts_ = [TokensPrompt(prompt_token_ids=prompt) for prompt in prompts]
        outputs = [done.outputs[0] for done in engine.generate(prompts_, sampling, use_tqdm=False)]
        return [(list(o.token_ids), [step[i].logprob for step, i in zip(o.logprobs, o.token_ids)]) for o in outputs]

    before = run()
    policy = engine.llm_engine.model_executor.driver_worker.model_runner.get_model()
    assert type(policy).__mro__[1].__module__ == "vllm.model_executor.models.qwen3"
    weights = load_file(second / "model.safetensors")
    with pytest.raises(ValueError, match="self_attn.k_proj.weight'] do not match"):
        policy.update_weights((name, w) for name, w in weights.items() if name != "layers.1.attention.wk.weight")
    with pytest.raises(KeyError, match="layers.1.attention.wx.weight"):
        policy.update_weights([("layers.1.attention.wx.weight", torch.zeros(1))])
    policy.update_weights(weights.items())
    assert engine.reset_prefix_cache()
    return [before, run()]


def trainer_logprobs(model: Qwen3Model, prompts: list[list[int]], completions: list[list[int]]) -> torch.Tensor:
    tokens, metadata, positions = packed([p + c for p, c in zip(prompts, completions, strict=True)])
    ends = metadata.cu_seq_q[1:].tolist()
    sampled = torch.cat([torch.arange(end - len(c), end) for end, c in zip(ends, completions, strict=True)])
    with torch.no_grad(), batch_invariant_mode():
        logits = model(tokens, metadata, positions)[0]
        return sampling_logprobs(logits[sampled - 1], tokens[0, sampled], 1.0, 0, 1.0)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("dtype", "changes", "torchtitan_names"),
    [
        ("bfloat16", {"n_kv_heads": 4}, False),
        ("float32", {"enable_weight_tying": False, "vocab_size": 1003, "head_dim": 80}, True),
    ],
)
def test_every_log_prob_is_vllms_before_and_after_a_weight_update(tmp_path, dtype, changes, torchtitan_names):
    first = random_model(getattr(torch, dtype), **changes)
    second = copy.deepcopy(first)
    with torch.no_grad():
        for param in second.parameters():
            param.add_(torch.randn_like(param) * 0.02)
    folders = (
        write_checkpoint(tmp_path / "first", first, dtype, torchtitan_names),
        write_checkpoint(tmp_path / "second", second, dtype, True),
    )
    prompts = random_sequences(first.vocab_size, [1 + 13 * i % 150 for i in range(24)])
    with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as pool:
        runs = pool.submit(complete, *folders, dtype, prompts).result()
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # the engine has two
    for model, run in zip((first, second), runs, strict=True):
        completions = [ids for ids, _ in run]
        generated = torch.tensor([logprob for _, logprobs in run for logprob in logprobs])
        assert torch.equal(trainer_logprobs(compat_model(model), prompts, completions), generated)
    torch.set_num_threads(threads)
    assert [ids for ids, _ in runs[0]] != [ids for ids, _ in runs[1]]
