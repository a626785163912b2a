# All rights reserved.
#
# This source code is licensed under the BSD-style license found in the
# LICENSE file in the root directory of this source tree.

import dataclasses
import importlib.util
import itertools
import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torchtitan.components.tokenizer import HuggingFaceTokenizer
from torchtitan.experiments.rl.unified.families import family, model_of_checkpoint
from torchtitan.models.qwen3 import qwen3_args
from transformers import AutoModelForCausalLM, AutoTokenizer

ROOT = Path(__file__).parents[1]
CHECKPOINT = ROOT / "tests/assets/qwen3_tiny"
DATA = ROOT / "tests/assets/gsm8k_tiny"


def script(name: str):
    spec = importlib.util.spec_from_file_location(name, ROOT / f"scripts/{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def spec():
    return family("qwen3").upstream_spec()


@pytest.fixture(scope="module")
def model(spec):
    args = spec.model_args["tiny"]
    with torch.no_grad():
        model = spec.model_cls(args)
        model.init_weights()
    adapter = spec.state_dict_adapter(args, None)
    model.load_state_dict(adapter.from_hf(load_file(CHECKPOINT / "model.safetensors")))
    return model


def test_the_checkpoint_is_small_and_fits_its_flavor(spec):
    assert sum(file.stat().st_size for file in CHECKPOINT.iterdir()) <= 4 * 1024**2
    model = model_of_checkpoint(str(CHECKPOINT), "qwen3", "tiny")
    assert family("qwen3").to_hf(spec.model_args["tiny"]) == family("qwen3").to_hf(model.args)


def test_torchtitans_flavors_stay_as_they_are(spec):
    assert "tiny" not in qwen3_args
    for name, args in qwen3_args.items():
        ours = dataclasses.replace(spec.model_args[name], moe_args=args.moe_args)
        assert ours == args and spec.model_args[name] is not args


def test_the_fields_that_do_not_fit_are_named(tmp_path):
    config = json.loads((CHECKPOINT / "config.json").read_text())

    def error_of(changes: dict, flavor: str = "tiny", name: str = "") -> str:
        (tmp_path / "config.json").write_text(json.dumps({k: v for k, v in {**config, **changes}.items() if v != ""}))
        with pytest.raises(ValueError) as error:
            model_of_checkpoint(str(tmp_path), name, flavor)
        return str(error.value)

    differences = (
        "num_hidden_layers: 3 in the checkpoint, 2 in the flavor; rope_theta: 20000 in the checkpoint, 10000 in"
    )
    assert differences in error_of({"num_hidden_layers": 3, "rope_theta": 20000})
    # transformers' default for one that leaves it out.
    assert "head_dim: 128 in the checkpoint, 32 in the flavor" in error_of({"head_dim": ""})
    assert "RoPE of type yarn" in error_of({"rope_scaling": {"rope_type": "yarn", "factor": 2.0}})
    assert "there are: llama, qwen3, qwen3_moe" in error_of({"model_type": "gpt2"})
    assert "is of model_type 'qwen3': qwen3" in error_of({}, name="llama3")
    assert "flavor 'tinny': qwen3 has" in error_of({}, flavor="tinny")
    (tmp_path / "config.json").write_text("{")
    with pytest.raises(ValueError, match="is not JSON"):
        model_of_checkpoint(str(tmp_path))
    with pytest.raises(ValueError, match="no checkpoint directory .*nowhere"):
        model_of_checkpoint(str(tmp_path / "nowhere"))
    (tmp_path / "empty").mkdir()
    with pytest.raises(ValueError, match="config.json does not exist"):
        model_of_checkpoint(str(tmp_path / "empty"))


def test_a_config_as_transformers_writes_it_fits(tmp_path):
    AutoModelForCausalLM.from_pretrained(CHECKPOINT).save_pretrained(tmp_path)
    model_of_checkpoint(str(tmp_path), "qwen3", "tiny")


def test_logits_are_those_of_transformers(model):
    reference = AutoModelForCausalLM.from_pretrained(CHECKPOINT, dtype=torch.float32)
    tokens = torch.randint(512, (2, 128), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        difference = (model(tokens) - reference(tokens).logits).abs().max()
    assert difference < 1e-5 * reference(tokens).logits.abs().max()


def test_embedding_and_output_are_one_parameter(spec, model):
    assert model.output.weight is model.tok_embeddings.weight
    exported = spec.state_dict_adapter(model.model_args, None).to_hf(model.state_dict())
    stored = load_file(CHECKPOINT / "model.safetensors")
    assert exported.keys() == stored.keys()
    assert "lm_head.weight" not in stored
    assert all(torch.equal(exported[name], stored[name]) for name in stored)


def test_both_tokenizers_agree():
    ours, torchtitans = AutoTokenizer.from_pretrained(CHECKPOINT), HuggingFaceTokenizer(str(CHECKPOINT))
    text = "<|im_start|>user\nAda has 1234 hats,\tna\u00efve \u4e16!<|im_end|>\n"
    ids = ours.encode(text, add_special_tokens=False)
    assert torchtitans.encode(text) == ids
    assert ours.decode(ids) == text
    assert [ours.decode(i) for i in ours.encode("1234")] == ["1", "2", "3", "4"]
    assert len(ours) == torchtitans.get_vocab_size() == 512
    assert torchtitans.eos_id == ours.eos_token_id == ours.convert_tokens_to_ids("<|im_end|>")
    generation = json.loads((CHECKPOINT / "generation_config.json").read_text())
    assert ours.convert_ids_to_tokens(generation["eos_token_id"]) == ["<|im_end|>", "<|endoftext|>"]


def test_the_task_is_what_its_script_writes():
    rows = script("make_gsm8k_tiny").make_rows(seed=0)
    for split, count in (("train", 6000), ("test", 500)):
        stored = [json.loads(line) for line in (DATA / f"{split}.jsonl").open()]
        assert stored == list(itertools.islice(rows, count))


def test_it_solves_some_unseen_problems_but_not_most():
    assert 0.3 <= script("make_tiny_checkpoint").evaluate(CHECKPOINT, DATA, count=500, temperature=1.0) <= 0.6


def test_the_script_makes_a_checkpoint(spec, tmp_path):
    command = [sys.executable, ROOT / "scripts/make_tiny_checkpoint.py", "--out", tmp_path, "--steps", "3"]
    subprocess.run([*command, "--problems", "2"], check=True, capture_output=True, timeout=300)
    model_of_checkpoint(str(tmp_path), "qwen3", "tiny")
    for name in ("config.json", "generation_config.json", "tokenizer.json", "tokenizer_config.json"):
        assert json.loads((tmp_path / name).read_text()) == json.loads((CHECKPOINT / name).read_text())
    made, stored = (load_file(place / "model.safetensors") for place in (tmp_path, CHECKPOINT))
    assert {k: v.shape for k, v in made.items()} == {k: v.shape for k, v in stored.items()}
