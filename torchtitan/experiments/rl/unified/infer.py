# All rights reserved.
#
# This source code is licensed under the BSD-style license found in the
# LICENSE file in the root directory of this source tree.

"""Generate text with a TorchTitan model inside vLLM: `python infer.py --model-ckpt-path DIR --prompt TEXT`.

The model class, its parameters and its arithmetic come from the TrainSpec; vLLM brings batching, the paged KV cache and
sampling. Without arguments it answers one of the tiny checkpoint's word problems.
"""

import argparse
import datetime
import functools
import os
import sys
import tomllib

if __name__ == "__main__" and os.environ.get("RL_VERBOSE") != "1":
    os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")  # As prepare_environment; torch reads it when it is loaded.
try:
    import torch
    from torchtitan.experiments.rl.unified.config.checkpoint_path import directory_of_model, resolve_path
    from torchtitan.experiments.rl.unified.config.environment import exit_at_once, prepare_environment
    from torchtitan.experiments.rl.unified.config.load import TRAIN_CONFIGS
    from torchtitan.experiments.rl.unified.config.ranges import COUNT, SEED, TEMPERATURE
    from torchtitan.experiments.rl.unified.config.variables import environment_problems
    from torchtitan.experiments.rl.unified.devices import this_device
    from torchtitan.experiments.rl.unified.families import model_of_checkpoint, PolicyModel
    from torchtitan.experiments.rl.unified.families.files import CheckpointFiles
    from torchtitan.experiments.rl.unified.families.tensors import check_weights
    from torchtitan.experiments.rl.unified.isolation import own_temporary_folder, stay_on_loopback
    from transformers import PreTrainedTokenizerBase
except ImportError as error:  # As of an environment that is not what set-up made.
    if __name__ != "__main__":
        raise
    sys.exit(f"error: {error}; set-up is bash scripts/setup_env.sh")


def _default_checkpoint() -> str:
    """The tiny one of the default job."""
    return tomllib.loads((TRAIN_CONFIGS / "debug_cpu.toml").read_text(encoding="utf-8"))["model"]["hf_assets_path"]


def parse_args(args: list[str]) -> argparse.Namespace:
    """The command line; every flag has a default that works offline."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--model-ckpt-path",
        default=_default_checkpoint(),
        help="checkpoint directory, or a job's checkpoint/step-N",
    )
    parser.add_argument(
        "--prompt",
        default="Ada has 12 eggs, buys 3 bags of 4 eggs and gives 5 to Ben. How many eggs does Ada have now?",
    )
    parser.add_argument("--raw", action="store_true", help="give the prompt to the model without the chat template")
    parser.add_argument("--max-tokens", type=int, default=64, help="longest completion")
    parser.add_argument("--temperature", type=float, default=0.8, help="0 takes the likeliest token")
    parser.add_argument(
        "--dtype", choices=["bfloat16", "float32"], default="", help="to compute in; empty: the weights'"
    )
    parser.add_argument("--seed", type=int, default=0, help="of the sampling")
    parser.add_argument("--tensor-parallel-size", type=int, default=1, help="ranks that share the model")
    return parser.parse_args(args)


def generate(args: argparse.Namespace) -> tuple[str, str]:
    """Returns what the model read and what it wrote.

    Raises:
        ValueError: for a checkpoint that is not there, not whole or of no model that runs here, or a prompt that does
            not fit.
    """
    _check_arguments(args)
    weights = resolve_path(args.model_ckpt_path)
    checkpoint = directory_of_model(weights)
    try:
        this_device().load_kernels()
    except (RuntimeError, OSError) as error:
        raise ValueError(f"compiled kernels: {error}") from error
    model = model_of_checkpoint(checkpoint)
    dtype = _dtype(args.dtype, model, check_weights(model, weights))
    context, kv_heads = model.args.max_seq_len, model.geometry.kv_heads
    if kv_heads % args.tensor_parallel_size:
        raise ValueError(
            f"--tensor-parallel-size {args.tensor_parallel_size} does not divide the model's {kv_heads} "
            "key/value heads"
        )
    from torchtitan.experiments.rl.unified.tokenizer import check_tokenizer, end_ids, load_tokenizer

    tokenizer = load_tokenizer(checkpoint)
    end_ids(tokenizer, checkpoint, model.geometry.vocabulary)
    prompt, prompt_ids = encode(tokenizer, args.prompt, args.raw)
    check_tokenizer(tokenizer, checkpoint, [prompt])
    if not prompt_ids:
        raise ValueError("the prompt is empty: there is nothing to go on from")
    if max(prompt_ids) >= model.geometry.vocabulary:
        raise ValueError(
            f"the tokenizer in {checkpoint} gives token {max(prompt_ids)}, but the model's vocabulary has "
            f"{model.geometry.vocabulary}: it is another model's"
        )
    max_model_len = min(len(prompt_ids) + args.max_tokens, context)
    if max_model_len < len(prompt_ids) + args.max_tokens:
        raise ValueError(
            f"a prompt of {len(prompt_ids)} tokens and --max-tokens {args.max_tokens} do not fit the model's context "
            f"of {context}"
        )

    from torchtitan.experiments.rl.unified.generator.engine import build_engine

    engine = build_engine(
        checkpoint,
        weights=weights,
        mode="unified",
        model_name="",
        flavor="",
        max_model_len=max_model_len,
        tensor_parallel_degree=args.tensor_parallel_size,
        batch_invariant=True,
        dtype=str(dtype).removeprefix("torch."),
        kv_cache_memory_bytes=2**28,
        block_size=32,
    )
    from vllm import SamplingParams, TokensPrompt

    sampling = SamplingParams(temperature=args.temperature, max_tokens=args.max_tokens, seed=args.seed)
    output = engine.generate(TokensPrompt(prompt_token_ids=prompt_ids), sampling, use_tqdm=False)[0]
    return prompt, output.outputs[0].text


def encode(tokenizer: PreTrainedTokenizerBase, prompt: str, raw: bool) -> tuple[str, list[int]]:
    """What the model reads, text and tokens: `prompt` in the chat template, as a job's rows are; as it is if `raw`."""
    from torchtitan.experiments.rl.unified.rollout.chat import ChatTemplate
    from torchtitan.experiments.rl.unified.rollout.rows import Row

    if raw or not tokenizer.chat_template:
        return prompt, tokenizer(prompt, add_special_tokens=raw)["input_ids"]
    row = Row("--prompt", ({"role": "user", "content": prompt},), answer="")
    try:
        return ChatTemplate(tokenizer, {}, date=str(datetime.date.today())).encode([row])[0]
    except ValueError as error:
        raise ValueError(f"{error}; --raw goes without it") from error


def _check_arguments(args: argparse.Namespace) -> None:
    """Raises ValueError for a number that the engine cannot take, or a prompt that is no text."""
    limits = {"temperature": TEMPERATURE, "max_tokens": COUNT, "seed": SEED, "tensor_parallel_size": COUNT}
    for name, limit in limits.items():
        if (value := getattr(args, name)) not in limit:
            raise ValueError(f"--{name.replace('_', '-')} {value} must be {limit}")
    try:
        args.prompt.encode("utf-8")
    except UnicodeEncodeError:
        raise ValueError("--prompt is not UTF-8 text") from None


def _dtype(wanted: str, model: PolicyModel, weights: CheckpointFiles) -> torch.dtype:
    """The dtype to compute in: the one that is wanted, else the weights' own where this device computes in it."""
    sizes, device = model.geometry, this_device()
    shape = sizes.head_size, sizes.heads, sizes.kv_heads
    if wanted:
        device.check_attention(*shape, getattr(torch, wanted))
        return getattr(torch, wanted)
    stored = functools.reduce(torch.promote_types, (tensor.dtype for tensor in weights.tensors.values()))
    try:
        device.check_attention(*shape, stored)
        return stored
    except ValueError:
        device.check_attention(*shape, torch.bfloat16)
        print(
            f"note: the weights are {stored}, which {device.name} does not compute in: torch.bfloat16", file=sys.stderr
        )
        return torch.bfloat16


def main(args: list[str]) -> int:
    """Prints prompt and text; exit status 1 with one line of error for bad input."""
    prepare_environment()
    stay_on_loopback()
    try:
        if problems := list(environment_problems()):
            raise ValueError("; ".join(problems))
        with own_temporary_folder():
            prompt, text = generate(parse_args(args))
    except ValueError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    print(f"Prompt: {prompt}\nText: {text}")
    return 0


if __name__ == "__main__":
    if status := main(sys.argv[1:]):
        sys.exit(status)
    exit_at_once()
