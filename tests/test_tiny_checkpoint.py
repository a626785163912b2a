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
from torchtitan.experiments.rl.unified.families.base import check_checkpoint_fits, register_train_specs
from torchtitan.models.qwen3 import qwen3_args
from torchtitan.protocols.train_spec import get_train_spec
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
    register_train_specs()
    register_train_specs()
    return get_train_spec("qwen3")


@pytest.fixture(scope="module")
def model(spec):
    args = spec.model_args["tiny"]
    with torch.no_grad():
        model = spec.model_cls(args)
        model.init_weights()
    adapter = spec.state_dict_adapter(args, None)
    model.load_state_dict(adapter.from_hf(load_file(CHECKPOINT / "model.safetensors")))
    return model


def test_torchtitans_flavors_stay_as_they_are(spec):
    assert {name: args for name, args in spec.model_args.items() if name != "tiny"} == qwen3_args
    assert "tiny" not in qwen3_args
    assert spec.model_args["0.6B"] is not qwen3_args["0.6B"]


def test_the_checkpoint_is_small_and_fits_its_flavor(spec):
    assert sum(file.stat().st_size for file in CHECKPOINT.iterdir()) <= 4 * 1024**2
    check_checkpoint_fits(CHECKPOINT / "config.json", spec.model_args["tiny"])


def test_the_fields_that_do_not_fit_are_named(spec, tmp_path):
    args = dataclasses.replace(spec.model_args["tiny"], n_layers=3, rope_theta=20000)
    with pytest.raises(ValueError) as error:
        check_checkpoint_fits(CHECKPOINT / "config.json", args)
    assert str(error.value).endswith(
        "num_hidden_layers: 2 in the checkpoint, 3 in the flavor; "
        "rope_theta: 10000 in the checkpoint, 20000 in the flavor."
    )

    config = json.loads((CHECKPOINT / "config.json").read_text())
    del config["head_dim"]
    path = tmp_path / "config.json"
    path.write_text(json.dumps(config | {"rope_scaling": {"rope_type": "yarn"}}))
    with pytest.raises(ValueError, match="head_dim: missing in the checkpoint, 32 in .*; rope_scaling: .*yarn"):
        check_checkpoint_fits(path, spec.model_args["tiny"])
    path.write_text("{")
    with pytest.raises(ValueError, match="is not JSON"):
        check_checkpoint_fits(path, spec.model_args["tiny"])
    with pytest.raises(ValueError, match="nowhere.* does not exist"):
        check_checkpoint_fits(tmp_path / "nowhere", spec.model_args["tiny"])


def test_a_config_as_transformers_writes_it_fits(spec, tmp_path):
    AutoModelForCausalLM.from_pretrained(CHECKPOINT).save_pretrained(tmp_path)
    check_checkpoint_fits(tmp_path / "config.json", spec.model_args["tiny"])


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
    check_checkpoint_fits(tmp_path / "config.json", spec.model_args["tiny"])
    for name in ("config.json", "generation_config.json", "tokenizer.json", "tokenizer_config.json"):
        assert (tmp_path / name).read_text() == (CHECKPOINT / name).read_text()
    made, stored = (load_file(place / "model.safetensors") for place in (tmp_path, CHECKPOINT))
    assert {k: v.shape for k, v in made.items()} == {k: v.shape for k, v in stored.items()}
