# All rights reserved.
#
# This source code is licensed under the BSD-style license found in the
# LICENSE file in the root directory of this source tree.

"""config.json: every field of transformers' own, at another value, gives transformers' logits or one error."""

import dataclasses
import json
import sys
from pathlib import Path

import pytest
import torch
from torchtitan.experiments.rl.unified.families import families, model_of_checkpoint
from torchtitan.experiments.rl.unified.families.hf_config import read_config
from transformers import CONFIG_MAPPING

sys.path.insert(0, str(Path(__file__).parent))
from tiny_models import assert_same, edit, write  # noqa: E402

SAME = ""
FULL, SLIDING = "full_attention", "sliding_attention"
LLAMA3 = {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}
LLAMA3 |= {"original_max_position_embeddings": 32, "rope_theta": 10000.0}
# Field -> other values than the default, each with what the error says (SAME: none, and transformers' logits).
COMMON = {
    "transformers_version": [("4.1.0", SAME)],
    "architectures": [(["Other"], SAME)],
    "output_hidden_states": [(True, SAME)],
    "return_dict": [(False, SAME)],
    "dtype": [("bfloat16", SAME), ("float64", "dtype = torch.float64: policies are"), ("float31", "does not read it")],
    "chunk_size_feed_forward": [(4, SAME)],
    "is_encoder_decoder": [(True, "is_encoder_decoder = True: models of type")],
    "id2label": [({"0": "no"}, SAME)],
    "label2id": [({"no": 0}, SAME)],
    "problem_type": [("regression", SAME)],
    "vocab_size": [(130, SAME), (0, "vocab_size = 0: it must be a whole number from 1 on"), ("96", "does not read it")],
    "hidden_size": [(96, SAME)],
    "intermediate_size": [(112, SAME)],
    "num_hidden_layers": [(3, SAME), (True, "does not read it")],
    "num_attention_heads": [(8, SAME), (3, "does not divide")],
    "num_key_value_heads": [(1, SAME), (3, "num_key_value_heads = 3 does not divide num_attention_heads = 4")],
    "head_dim": [(32, SAME), (15, "RoPE requires an even rotary dimension")],
    "hidden_act": [("gelu", "hidden_act = 'gelu': models of type")],
    "max_position_embeddings": [(64, SAME)],
    "initializer_range": [(0.3, SAME)],
    "rms_norm_eps": [(0.01, SAME), (-1.0, "rms_norm_eps = -1.0: it must be a number above 0")],
    "use_cache": [(False, SAME)],
    "tie_word_embeddings": [(True, SAME), (False, SAME)],
    "rope_parameters": [
        ({"rope_type": "default", "rope_theta": 500.0}, SAME),
        ({"rope_type": "yarn", "rope_theta": 500.0, "factor": 4.0}, "RoPE of type yarn"),
        ({"rope_type": "linear", "rope_theta": 500.0, "factor": 4.0}, "RoPE of type linear"),
        ({"rope_type": "default", "rope_theta": -1.0}, "rope_theta = -1.0: it must be a number above 0"),
    ],
    "attention_bias": [(True, "attention_bias = True: models of type")],
    "attention_dropout": [(0.1, SAME)],
    "pad_token_id": [(0, SAME), (96, "pad_token_id = 96: the vocabulary has 96 tokens")],
    "bos_token_id": [(1, SAME)],
    "eos_token_id": [(2, SAME), ([2, 3], SAME), ([2, 96], "eos_token_id = 96: it must be from 0 to 95")],
}
SLIDING_WINDOW = {
    "use_sliding_window": [(True, "use_sliding_window = True: models of type")],
    "sliding_window": [(7, SAME)],
}
FIELDS = {
    "qwen3": COMMON
    | SLIDING_WINDOW
    | {
        "max_window_layers": [(1, SAME)],
        "layer_types": [([FULL, FULL], SAME), ([FULL, SLIDING], "layer_types has 'sliding_attention'")],
    },
    "llama": COMMON
    | {
        "rope_parameters": [
            *COMMON["rope_parameters"],
            (LLAMA3, SAME),
            *((LLAMA3 | {"low_freq_factor": low}, f"low_freq_factor = {low} and high_freq") for low in (4.0, 9.0)),
        ],
        "num_attention_heads": [(8, SAME), (3, "does not read it")],
        "head_dim": [(16, SAME), (32, "head_dim = 32: "), (15, "RoPE requires an even rotary dimension")],
        "pretraining_tp": [(2, SAME)],
        "mlp_bias": [(True, "mlp_bias = True: models of type llama here have False")],
        "initializer_range": [(0.3, SAME), (3.0, "does not read it")],
    },
    "qwen3_moe": COMMON
    | SLIDING_WINDOW
    | {
        "decoder_sparse_step": [(2, "decoder_sparse_step = 2: "), (0, "decoder_sparse_step = 0: it must be")],
        "moe_intermediate_size": [(48, SAME)],
        "num_experts_per_tok": [(3, SAME), (9, "num_experts_per_tok = 9 of num_experts = 8")],
        "num_experts": [(4, SAME)],
        "norm_topk_prob": [(True, SAME), (False, SAME)],
        "output_router_logits": [(True, SAME)],
        "router_aux_loss_coef": [(0.5, SAME)],
        "mlp_only_layers": [([1], "mlp_only_layers = [1]: "), ([7], "mlp_only_layers = 7: it must be from 0 to 1")],
    },
}
MOE = {"num_experts": 8, "num_experts_per_tok": 2, "moe_intermediate_size": 32}
OF_TYPE = {kind: each for each in families().values() for kind in each.model_types}
BASE = {"qwen3": {}, "llama": {"head_dim": None}, "qwen3_moe": MOE}
CASES = [
    pytest.param(model_type, field, value, complaint, id=f"{model_type}-{field}-{value}")
    for model_type, fields in FIELDS.items()
    for field, values in fields.items()
    for value, complaint in values
]


@pytest.mark.parametrize("model_type", FIELDS)
def test_each_field_of_transformers_config_has_its_case(model_type):
    """A field that a new transformers brings fails here, until somebody has thought of it."""
    names = {field.name for field in dataclasses.fields(CONFIG_MAPPING[model_type])}
    assert not names - FIELDS[model_type].keys()
    # Qwen3 MoE has it without naming it.
    assert FIELDS[model_type].keys() - names <= {"head_dim"}


@pytest.mark.parametrize("model_type, field, value, complaint", CASES)
def test_a_field_has_transformers_effect_or_is_refused_by_name(tmp_path, model_type, field, value, complaint):
    if complaint:
        write(tmp_path, model_type, **BASE[model_type])
        edit(tmp_path, **{field: value})
        with pytest.raises(ValueError) as raised:
            model_of_checkpoint(str(tmp_path))
        assert complaint in str(raised.value) and "\n" not in str(raised.value)
        assert str(raised.value).startswith(str(tmp_path))
        return
    write(tmp_path, model_type, **{**BASE[model_type], field: value})
    edit(tmp_path, **{field: value})
    assert_same(tmp_path)


OTHER_FORMS = {
    "theta at the top alone": ({"rope_parameters": None, "rope_theta": 500.0}, SAME),
    "no theta at all": ({"rope_parameters": None}, SAME),
    "theta at the top and another inside": (
        {"rope_theta": 9.0, "rope_parameters": {"rope_theta": 500.0, "rope_type": "default"}},
        SAME,
    ),
    "no scaling": ({"rope_scaling": None}, SAME),
    "scaling of type default": ({"rope_parameters": None, "rope_scaling": {"type": "default"}}, SAME),
    "yarn under the old key": (
        {"rope_parameters": {"type": "yarn", "factor": 4.0, "rope_theta": 10000.0}},
        "RoPE of type yarn",
    ),
    "yarn as scaling": (
        {"rope_parameters": None, "rope_scaling": {"type": "yarn", "factor": 4.0}},
        "RoPE of type yarn",
    ),
    "two types": ({"rope_parameters": {"type": "yarn", "rope_type": "default", "rope_theta": 1e4}}, "default and yarn"),
    "two dicts": (
        {"rope_scaling": {"rope_type": "default", "rope_theta": 5.0}},
        "rope_parameters and rope_scaling differ",
    ),
    "no such parameter": (
        {"rope_parameters": {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [1, 2]}},
        "mrope_section of RoPE: type default has no such parameter",
    ),
    "part of a head": ({"partial_rotary_factor": 0.5}, "partial_rotary_factor = 0.5"),
    "part of a head inside": (
        {"rope_parameters": {"rope_theta": 1e4, "rope_type": "default", "partial_rotary_factor": 0.5}},
        "partial_rotary_factor = 0.5",
    ),
    "theta is a word": ({"rope_parameters": None, "rope_theta": "10000"}, "rope_theta = '10000': it must be a number"),
    "no kv heads": ({"num_key_value_heads": None}, "holds another model than its config.json says"),
    "old name of the dtype": ({"dtype": None, "torch_dtype": "float32"}, SAME),
    "sampling": ({"temperature": 0.3, "top_p": 0.9, "max_length": 20}, SAME),
    "unknown, but null": ({"attn_logit_softcapping": None}, SAME),
    "unknown": ({"attn_logit_softcapping": 50.0}, "attn_logit_softcapping: models here have no such feature"),
    "two unknown": ({"z_loss": 1, "a_scale": 2.0}, "a_scale, z_loss: models here have no such feature"),
    "own code": ({"auto_map": {"AutoModel": "m.M"}}, "auto_map = {'AutoModel': 'm.M'}: the checkpoint brings code"),
    "quantised": ({"quantization_config": {"quant_method": "fp8"}}, "a policy that is updated in place cannot be"),
    "by layer": ({"per_layer_config": {"0": {"head_dim": 8}}}, "per_layer_config = "),
    "too many layers": ({"num_hidden_layers": 10**7}, "num_hidden_layers = 10000000: no model has more than 4096"),
    "too wide": ({"hidden_size": 2**40}, "hidden_size = 1099511627776: no model has more than 16777216"),
    "hidden_size missing": ({"hidden_size": None}, "it lacks hidden_size"),
    "another family": (
        {"model_type": "gpt2"},
        "is of model_type 'gpt2', which no family here has; there are: llama, qwen3",
    ),
    "no family": ({"model_type": None}, "is of model_type None"),
}


@pytest.mark.parametrize("case", OTHER_FORMS)
def test_other_forms_that_people_have(tmp_path, case):
    fields, complaint = OTHER_FORMS[case]
    write(tmp_path, **({"rope_parameters": {"rope_type": "default", "rope_theta": 500.0}} if complaint == SAME else {}))
    edit(tmp_path, **fields)
    if complaint == SAME:
        assert_same(tmp_path)
        return
    with pytest.raises(ValueError) as raised:
        assert_same(tmp_path)
    assert complaint in str(raised.value) and "\n" not in str(raised.value)


def test_transformers_takes_the_inner_theta(tmp_path):
    """What the comparison above rests on: the two thetas give other logits."""
    write(tmp_path, rope_parameters={"rope_type": "default", "rope_theta": 500.0})
    edit(tmp_path, rope_theta=9.0)
    assert read_config(tmp_path, OF_TYPE)["rope_theta"] == 500.0
    edit(tmp_path, rope_parameters=None)
    assert read_config(tmp_path, OF_TYPE)["rope_theta"] == 9.0


@pytest.mark.parametrize(
    "content, complaint",
    [
        (b"", "is not JSON"),
        (b"{", "is not JSON"),
        (b"[1]", "is no JSON object"),
        (b"[" * 100000, "is not JSON"),
        (b"\xff\xfe{", "is not JSON"),
        (b'{"rms_norm_eps": 1e-6, "vocab_size": 8, "rms_norm_eps": 0.5}', "not JSON: it names 'rms_norm_eps' twice"),
        (b"{}", "is of model_type None"),
        (b'{"model_type": ["qwen3"]}', "is of model_type ['qwen3']"),
        (b'{"model_type": "qwen3"}', "it lacks vocab_size, hidden_size, intermediate_size, num_hidden_layers, num_att"),
    ],
)
def test_what_is_no_config_is_one_error(tmp_path, content, complaint):
    (tmp_path / "config.json").write_bytes(content)
    with pytest.raises(ValueError) as raised:
        read_config(tmp_path, OF_TYPE)
    assert complaint in str(raised.value) and "\n" not in str(raised.value)
    (tmp_path / "config.json").unlink()
    with pytest.raises(ValueError, match="No checkpoint here: .*config.json does not exist"):
        read_config(tmp_path, OF_TYPE)


def test_values_are_transformers(tmp_path):
    write(tmp_path, "llama", rope_parameters=LLAMA3, eos_token_id=[2, 3], dtype="bfloat16")
    config = read_config(tmp_path, OF_TYPE)
    assert config["rope_scaling"] == {name: value for name, value in LLAMA3.items() if name != "rope_theta"}
    assert config["rope_theta"] == 10000.0 and config["dtype"] is torch.bfloat16 and config["eos_token_id"] == [2, 3]
    file = tmp_path / "config.json"
    raw = json.loads(file.read_text(encoding="utf-8"))
    file.write_text(json.dumps({name: value for name, value in raw.items() if name != "head_dim"}), encoding="utf-8")
    assert read_config(tmp_path, OF_TYPE)["head_dim"] == 64 // 4
