# All rights reserved.
#
# This source code is licensed under the BSD-style license found in the
# LICENSE file in the root directory of this source tree.

"""infer.py as a user runs it."""

import json
import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torchtitan.experiments.rl.unified import infer, simple_rl_multiprocess
from torchtitan.experiments.rl.unified.families import model_of_checkpoint
from torchtitan.experiments.rl.unified.families.tensors import check_weights
from torchtitan.experiments.rl.unified.tokenizer import load_tokenizer

TINY = Path(__file__).parent / "assets/qwen3_tiny"


def run(folder: Path, *flags: str, **environment: str) -> subprocess.CompletedProcess:
    command = [sys.executable, infer.__file__, *flags]
    env = {**os.environ, **environment}
    return subprocess.run(command, capture_output=True, text=True, timeout=300, cwd=folder, env=env)


@pytest.mark.slow
def test_one_rank_and_two_print_prompt_and_the_same_text(tmp_path):
    """Proves that TorchTitan's model generates inside vLLM, whole and sharded."""
    texts = []
    # A list of vLLM's plugins that has not this package's must not keep it out.
    for flags, plugins in (([], ""), (["--tensor-parallel-size", "2"], "lora_filesystem_resolver")):
        temporary = tempfile.mkdtemp()
        done = run(tmp_path, "--temperature", "0", *flags, VLLM_PLUGINS=plugins, TMPDIR=temporary)
        assert done.returncode == 0 and not os.listdir(temporary) and "[W" not in done.stderr, done.stderr
        assert "How many eggs does Ada have now?" in done.stdout
        texts.append(done.stdout)
        _, _, text = done.stdout.partition("\nText: ")
        assert "####" in text
    assert texts[0] == texts[1]


@pytest.mark.parametrize(
    ("flags", "complaint"),
    [
        (["--model-ckpt-path", "/no/such"], "no checkpoint directory /no/such"),
        (["--tensor-parallel-size", "3"], "does not divide the model's 2 key/value heads"),
        (["--max-tokens", "100000"], "do not fit the model's context"),
        (["--max-tokens", "0"], "--max-tokens 0 must be at least 1"),
        (["--tensor-parallel-size", "-1"], "--tensor-parallel-size -1 must be at least 1"),
        *((["--temperature", word], "--temperature") for word in ("3", "-1", "nan", "inf", "1e-9")),
        *((["--seed", word], "--seed") for word in ("-1", str(2**70))),
        (["--raw", "--prompt", ""], "the prompt is empty"),
        (["--prompt", "\udcff"], "--prompt is not UTF-8 text"),
        (["--model-ckpt-path", "org/model"], "first: python scripts/download_hf_assets.py --repo_id org/model"),
    ],
)
def test_bad_input_is_one_error(flags, complaint, capsys):
    assert infer.main(flags) == 1
    error = capsys.readouterr().err.strip()
    assert error.startswith("error: ") and complaint in error and "\n" not in error


def test_an_environment_that_asks_for_what_no_engine_can_do_is_refused_alike(monkeypatch, capsys, tmp_path):
    monkeypatch.setenv("VLLM_USE_V2_MODEL_RUNNER", "1")
    flags = ["--job.dump_folder", str(tmp_path / "run")]
    for command, words in ((infer.main, []), (simple_rl_multiprocess.main, flags)):
        assert command(words) == 1
        [line] = capsys.readouterr().err.splitlines()
        assert line.startswith("error: ") and "VLLM_USE_V2_MODEL_RUNNER=1: log-probs of vLLM's other runner" in line


def edit(file: str = "config.json", **fields):
    def damage(folder: Path) -> None:
        values = json.loads((folder / file).read_text(encoding="utf-8"))
        (folder / file).write_text(json.dumps(values | fields), encoding="utf-8")

    return damage


def poison(folder: Path) -> None:
    tensors = load_file(folder / "model.safetensors")
    tensors["model.norm.weight"][7] = float("nan")
    save_file(tensors, folder / "model.safetensors")


DAMAGES = {
    "a second file": (
        lambda folder: shutil.copy(folder / "model.safetensors", folder / "model_old.safetensors"),
        "holds 2 files of weights and no model.safetensors.index.json that says which count",
    ),
    "nan": (poison, "model.norm.weight holds NaN or infinite values"),
    "yarn": (edit(rope_parameters={"type": "yarn", "factor": 4.0, "rope_theta": 10000}), "RoPE of type yarn"),
    "quantised": (edit(quantization_config={"quant_method": "fp8"}), "quantization_config = "),
    "unknown field": (edit(final_logit_softcapping=30.0), "final_logit_softcapping: models here have no such feature"),
    "short context": (edit(max_position_embeddings=64), "context"),
    "no tokenizer but its pointer": (
        lambda folder: (folder / "tokenizer.json").write_text("version https://git-lfs.github.com/spec/v1", "utf-8"),
        "tokenizer.json is a Git LFS pointer",
    ),
}


@pytest.mark.parametrize(
    "template, complaint",
    [
        (
            "{% for i in range(99999) %}{% for j in range(99999) %}{% endfor %}{% endfor %}",
            "it computes for more than 5 s",
        ),
        ("{{ raise_exception('not so') }}", "not so"),
        ("{{ messages.missing.field }}", "has no attribute 'missing'"),
    ],
)
def test_a_chat_template_that_fails_is_one_error(template, complaint, tmp_path, capsys):
    folder = Path(shutil.copytree(TINY, tmp_path / "model"))
    edit("tokenizer_config.json", chat_template=template)(folder)
    assert infer.main(["--model-ckpt-path", str(folder)]) == 1
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("error: the tokenizer's chat template fails on --prompt: ") and complaint in line


def test_a_special_token_in_a_prompt_is_text_unless_it_is_raw():
    tokenizer = load_tokenizer(TINY)
    end = tokenizer.convert_tokens_to_ids("<|im_end|>")
    text, ids = infer.encode(tokenizer, "a<|im_end|>b", raw=False)
    assert text.count("<|im_end|>") == 2 and ids.count(end) == 1
    text, ids = infer.encode(tokenizer, "a<|im_end|>b", raw=True)
    assert text == "a<|im_end|>b" and ids.count(end) == 1 and len(ids) == 3


@pytest.mark.parametrize("case", DAMAGES)
def test_a_checkpoint_is_looked_at_alike_by_every_command_before_anything_starts(case, tmp_path, capsys):
    damage, complaint = DAMAGES[case]
    folder = Path(shutil.copytree(TINY, tmp_path / "model"))
    damage(folder)
    commands = {
        infer.main: ["--model-ckpt-path", str(folder)],
        simple_rl_multiprocess.main: [
            "--model.hf_assets_path",
            str(folder),
            "--job.dump_folder",
            str(tmp_path / "out"),
        ],
    }
    for command, flags in commands.items():
        assert command(flags) == 1
        lines = capsys.readouterr().err.splitlines()
        assert all(line.startswith("error: ") for line in lines) and any(complaint in line for line in lines)
    assert not (tmp_path / "out").exists()


def saved_step(folder: Path, config: str | None) -> Path:
    """What a job leaves behind, as far as it is looked at."""
    step = folder / "run/checkpoint/step-2"
    step.mkdir(parents=True)
    (step / ".metadata").write_bytes(b"")
    if config is not None:
        (folder / "run/config.toml").write_text(config, encoding="utf-8")
    return step


UNFINDABLE = {
    "its run is gone": (None, "step-2 holds weights alone, and the config.toml of its run is not above it: put"),
    "another program's": ("[tool.black]\n", "the config.toml of its run is not above it"),
    "another's, with like names": ("checkpoint = 3\n", "the config.toml of its run is not above it"),
    "no text": ("[checkpoint]\nfolder = 3\n", "the config.toml of its run is not above it"),
    "no TOML": ("checkpoint", "the config.toml of its run is not above it"),
    "another folder's": ('[checkpoint]\nfolder = "saved"\n', "the config.toml of its run is not above it"),
    "its model is gone": (
        '[checkpoint]\nfolder = "checkpoint"\n[model]\nhf_assets_path = "/no/such"\n',
        "config.toml names is not there ([model] hf_assets_path = '/no/such'): put the model's config.json and",
    ),
    "names no model": ('[checkpoint]\nfolder = "checkpoint"\n', "([model] hf_assets_path = None)"),
    "a run, not a step": (None, "run is no checkpoint, but holds some: take one of them, such as "),
    "no checkpoint": (None, "No checkpoint here: "),
}


@pytest.mark.parametrize("case", UNFINDABLE)
def test_weights_whose_model_is_not_found_are_one_error_of_every_command(case, tmp_path, capsys):
    config, complaint = UNFINDABLE[case]
    path = saved_step(tmp_path, config)
    path = {"a run, not a step": path.parents[1], "no checkpoint": path.parent}.get(case, path)
    if case == "no checkpoint":
        shutil.rmtree(path / "step-2")
    for command, flag in ((infer.main, "--model-ckpt-path"), (simple_rl_multiprocess.main, "--model.hf_assets_path")):
        assert command([flag, str(path)]) == 1
        errors = capsys.readouterr().err.splitlines()
        assert errors[0].startswith("error: ") and complaint in errors[0]
        assert len(errors) == 1 or case == "no checkpoint", errors


def test_the_weights_own_dtype_is_computed_in_unless_another_is_asked_for():
    checkpoint = str(Path(__file__).parent / "assets/qwen3_tiny")
    model = model_of_checkpoint(checkpoint)
    weights = check_weights(model, checkpoint)
    assert infer._dtype("", model, weights) == torch.float32
    assert infer._dtype("bfloat16", model, weights) == torch.bfloat16
