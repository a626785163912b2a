# All rights reserved.
#
# This source code is licensed under the BSD-style license found in the
# LICENSE file in the root directory of this source tree.

"""Make the tiny checkpoint: a Qwen3 small enough for a laptop, warm-started on gsm8k_tiny.

It trains a tokenizer on the task's text, then the model with torchtitan's Trainer, and writes both in
Hugging Face layout. It stops well before the model has learnt the task, so that reinforcement
learning has something to improve. Some minutes on two cores.

    python scripts/make_tiny_checkpoint.py --out tests/assets/qwen3_tiny
    python scripts/make_tiny_checkpoint.py --out tests/assets/qwen3_tiny --evaluate
"""

import argparse
import json
import os
import tempfile
from pathlib import Path

import torch
from datasets import Dataset
from safetensors.torch import save_file
from tokenizers import decoders, models, pre_tokenizers, Regex, Tokenizer, trainers
from torchtitan.experiments.rl.unified.devices import this_device
from torchtitan.experiments.rl.unified.families import family
from torchtitan.experiments.rl.unified.rollout.datasets import PromptDataset
from torchtitan.experiments.rl.unified.rollout.rows import read_rows
from torchtitan.protocols.model import BaseModelArgs
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedTokenizerBase

ASSETS = Path(__file__).parents[1] / "tests/assets"
END_OF_TEXT, TURN_START, TURN_END = SPECIAL_TOKENS = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
# As Qwen's: words with the blank before them, single digits, runs of signs, line ends.
WORDS = r"[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
CHAT_TEMPLATE = """\
{%- for message in messages %}
{{- '<|im_start|>' + message.role + '\\n' + message.content + '<|im_end|>\\n' }}
{%- endfor %}
{%- if add_generation_prompt %}
{{- '<|im_start|>assistant\\n' }}
{%- endif %}"""


def write_json(path: Path, content: dict) -> None:
    path.write_text(json.dumps(content, indent=2) + "\n")


def write_tokenizer(out: Path, texts: list[str], vocab_size: int) -> None:
    """Train a byte-level BPE on ``texts`` and write it with its chat template.

    Raises:
        ValueError: The texts have too few words for ``vocab_size`` tokens.
    """
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(WORDS), behavior="isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=SPECIAL_TOKENS,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    if tokenizer.get_vocab_size() != vocab_size:
        raise ValueError(f"The texts give {tokenizer.get_vocab_size()} tokens, the model wants {vocab_size}.")
    tokenizer.save(str(out / "tokenizer.json"))
    config = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "eos_token": TURN_END,
        "pad_token": END_OF_TEXT,
        "additional_special_tokens": [TURN_START, TURN_END],
        "clean_up_tokenization_spaces": False,
        "chat_template": CHAT_TEMPLATE,
    }
    write_json(out / "tokenizer_config.json", config)


def write_configs(out: Path, model_args: BaseModelArgs, tokenizer: PreTrainedTokenizerBase) -> None:
    """Write ``config.json`` and ``generation_config.json``."""
    ends = {"eos_token_id": tokenizer.convert_tokens_to_ids([TURN_END, END_OF_TEXT])}
    ends["pad_token_id"] = tokenizer.pad_token_id
    config = {
        "architectures": ["Qwen3ForCausalLM"],
        "torch_dtype": "float32",
        "hidden_act": "silu",
        "attention_bias": False,
        "max_position_embeddings": model_args.max_seq_len,
        **family("qwen3").to_hf(model_args),
        "eos_token_id": tokenizer.eos_token_id,
        "pad_token_id": tokenizer.pad_token_id,
    }
    write_json(out / "config.json", config)
    write_json(out / "generation_config.json", {"do_sample": True, "temperature": 1.0, **ends})


def read_dataset(path: str) -> Dataset:
    """The questions and answers of split "train", as torchtitan's text datasets take them."""
    rows = read_rows(path, "train", "question", "answer")
    return Dataset.from_list([{"question": row.messages[0]["content"], "answer": row.answer} for row in rows])


def train(out: Path, data: Path, steps: int, learning_rate: float, seed: int) -> None:
    """Train the flavor "tiny" with torchtitan's Trainer and write ``model.safetensors``."""
    # torchtitan reads the process group from here and takes a copy of the device at import
    os.environ |= {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "1", "MASTER_ADDR": "localhost", "MASTER_PORT": "0"}
    this_device().prepare_trainer()
    from torchtitan.config import ConfigManager
    from torchtitan.hf_datasets import DatasetConfig
    from torchtitan.hf_datasets.text_datasets import DATASETS
    from torchtitan.tools.logging import init_logger
    from torchtitan.train import Trainer

    init_logger()
    tokenizer = AutoTokenizer.from_pretrained(out)

    def render(row: dict[str, str]) -> str:
        # The dataset adds the EOS token, which ends the turn.
        question = [{"role": "user", "content": row["question"]}]
        return tokenizer.apply_chat_template(question, tokenize=False, add_generation_prompt=True) + row["answer"]

    DATASETS["gsm8k_tiny_chat"] = DatasetConfig(str(data), read_dataset, render)
    with tempfile.TemporaryDirectory() as dump_folder:
        settings = {
            "job.dump_folder": dump_folder,
            "model.name": "tiny_qwen3",
            "model.flavor": "tiny",
            "model.hf_assets_path": str(out),
            "training.dataset": "gsm8k_tiny_chat",
            "training.local_batch_size": 16,
            "training.seq_len": 128,
            "training.steps": steps,
            "training.mixed_precision_param": "float32",
            "optimizer.lr": learning_rate,
            "lr_scheduler.warmup_steps": steps // 10,
            "debug.seed": seed,
            "metrics.log_freq": 100,
        }
        arguments = [text for key, value in settings.items() for text in (f"--{key}", str(value))]
        trainer = Trainer(ConfigManager().parse_args(arguments))
        trainer.train()
        adapter = trainer.train_spec.state_dict_adapter(trainer.model_args, None)
        weights = adapter.to_hf(trainer.model_parts[0].state_dict())
        save_file({name: w.contiguous() for name, w in weights.items()}, out / "model.safetensors", {"format": "pt"})
        trainer.close()
    torch.distributed.destroy_process_group()


def evaluate(checkpoint: Path, data: Path, count: int, temperature: float, seed: int = 0) -> float:
    """The share of held-out problems that one completion each solves.

    Args:
        checkpoint: Directory in Hugging Face layout.
        data: Directory with ``test.jsonl``.
        count: How many problems to try.
        temperature: Of the sampling; 0 takes the likeliest token.
    """
    tokenizer = AutoTokenizer.from_pretrained(checkpoint, padding_side="left")
    model = AutoModelForCausalLM.from_pretrained(checkpoint)
    prompts = PromptDataset("gsm8k_tiny", str(data), tokenizer, split="test").prompts[:count]
    inputs = tokenizer([p.text for p in prompts], return_tensors="pt", padding=True, add_special_tokens=False)
    sampling = {"do_sample": True, "temperature": temperature, "top_k": 0} if temperature else {"do_sample": False}
    torch.manual_seed(seed)
    tokens = model.generate(**inputs, **sampling, max_new_tokens=48)[:, inputs["input_ids"].shape[1] :]
    completions = tokenizer.batch_decode(tokens, skip_special_tokens=True)
    right = [c.rpartition("#### ")[2] == p.answer.rpartition("#### ")[2] for c, p in zip(completions, prompts)]
    return sum(right) / len(right)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=ASSETS / "qwen3_tiny")
    parser.add_argument("--data", type=Path, default=ASSETS / "gsm8k_tiny")
    parser.add_argument("--steps", type=int, default=1100)
    parser.add_argument("--learning_rate", type=float, default=3e-3)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--problems", type=int, default=500, help="held-out problems to evaluate on")
    parser.add_argument("--evaluate", action="store_true", help="only evaluate what is in --out")
    args = parser.parse_args()

    if not args.evaluate:
        from torchtitan.protocols.train_spec import register_train_spec

        spec = family("qwen3").upstream_spec()
        register_train_spec("tiny_qwen3", spec)
        model_args = spec.model_args["tiny"]
        args.out.mkdir(parents=True, exist_ok=True)
        texts = [f"{row['question']}\n{row['answer']} user assistant system" for row in read_dataset(str(args.data))]
        write_tokenizer(args.out, texts, model_args.vocab_size)
        write_configs(args.out, model_args, AutoTokenizer.from_pretrained(args.out))
        train(args.out, args.data, args.steps, args.learning_rate, args.seed)
    for temperature in (1.0, 0.0):
        rate = evaluate(args.out, args.data, args.problems, temperature)
        print(f"held-out problems solved at temperature {temperature}: {rate:.3f}")


if __name__ == "__main__":
    main()
