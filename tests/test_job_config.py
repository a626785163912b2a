# All rights reserved.
#
# This source code is licensed under the BSD-style license found in the
# LICENSE file in the root directory of this source tree.

import subprocess
import sys
from pathlib import Path

import pytest
from torchtitan.experiments.rl.unified.config.checks import contradictions
from torchtitan.experiments.rl.unified.config.derived import trainer_ranks
from torchtitan.experiments.rl.unified.config.load import load_job_config, REPOSITORY, TRAIN_CONFIGS, write_toml

COMMAND = Path(__file__).parents[1] / "torchtitan/experiments/rl/unified/simple_rl_multiprocess.py"
NEEDED = '[model]\nhf_assets_path = "tests/assets/qwen3_tiny"\n'


def job(tmp_path: Path, text: str, *flags: str):
    """The config of a TOML file with `text` and what no job can do without."""
    path = tmp_path / "job.toml"
    training = "" if "[training]" in text else "[training]\n"
    text = NEEDED + training + text
    path.write_text(text.replace("[training]\n", '[training]\ndataset = "gsm8k_tiny"\n'), encoding="utf-8")
    return load_job_config(["--job.config_file", str(path), *flags])


@pytest.mark.parametrize("path", sorted(TRAIN_CONFIGS.glob("*.toml")), ids=lambda path: path.name)
def test_shipped_configs_parse(path):
    config = load_job_config(["--job.config_file", str(path)])
    assert contradictions(config) == [] and "gsm8k" in config.reward.weights
    # A model that was not trained for it writes the mark that the reward reads only if it is asked to.
    assert config.training.dataset == "gsm8k_tiny" or "####" in config.data.system_prompt


def test_a_shipped_config_is_for_several_gpus():
    config = load_job_config(["--job.config_file", str(TRAIN_CONFIGS / "qwen3_0.6b_fsdp2_tp2.toml")])
    assert contradictions(config) == []
    assert trainer_ranks(config) == 4 and config.generator.tensor_parallel_degree == 2


def test_the_default_on_a_cpu_machine_is_the_debug_job():
    config = load_job_config([])
    assert config.parity.check == "assert" and Path(config.model.hf_assets_path).is_absolute()


def test_the_command_line_wins_over_the_file(tmp_path):
    config = job(tmp_path, "[rl]\ngroup_size = 4\nprompts_per_step = 2\n", "--rl.group_size", "6")
    assert (config.rl.group_size, config.rl.prompts_per_step) == (6, 2)


def test_the_written_config_reads_as_the_same_job(tmp_path):
    config = job(tmp_path, "[reward.weights]\nformat = 0.5\n[training]\nmax_norm = 2\n")
    write_toml(config, tmp_path / "resolved.toml")
    assert load_job_config(["--job.config_file", str(tmp_path / "resolved.toml")]).to_dict() == config.to_dict()


def test_the_written_config_holds_no_path_into_this_clone(tmp_path):
    dump_folder = REPOSITORY / "outputs" / "run"
    config = load_job_config(
        ["--job.dump_folder", str(dump_folder), "--training.dataset_path", "tests/assets/gsm8k_tiny"]
    )
    assert Path(config.training.dataset_path).is_absolute()
    write_toml(config, tmp_path / "resolved.toml")
    assert str(REPOSITORY) not in (tmp_path / "resolved.toml").read_text()
    again = load_job_config(["--job.config_file", str(tmp_path / "resolved.toml")])
    assert again.training.dataset_path == config.training.dataset_path
    assert (again.model.hf_assets_path, again.job.dump_folder) == (config.model.hf_assets_path, "outputs/run")


@pytest.mark.parametrize(
    ("text", "complaint"),
    [
        ("[rl]\ngroup_sise = 4\n", "unknown key 'rl.group_sise'; did you mean 'rl.group_size'\\?"),
        ("[rll]\n", "unknown section 'rll'; did you mean 'rl'"),
        ('[rl]\ngroup_size = "4"\n', "rl.group_size = '4', but it must be int"),
        ("[parity]\ncheck = true\n", "parity.check = True, but it must be one of 'off', 'report', 'assert'"),
        ('[rl]\nmode = "both"\n', "rl.mode = 'both', but it must be one of 'unified', 'vllm_compat'"),
        ("[rl\n", "is not TOML"),
        ('[job]\nconfig_file = "other.toml"\n', "a file cannot name another in job.config_file; leave it out"),
        ("[training.dataloader]\nnum_workers = 1.5\n", "training.dataloader.num_workers = 1.5, but it must be int"),
    ],
)
def test_a_bad_file_gets_one_error_with_file_key_value_and_remedy(tmp_path, text, complaint):
    with pytest.raises(ValueError, match=complaint) as error:
        job(tmp_path, text)
    assert str(tmp_path / "job.toml") in str(error.value)


def test_a_file_that_is_not_there(tmp_path):
    with pytest.raises(ValueError, match="No such file or directory; give an existing file"):
        load_job_config([f"--job.config_file={tmp_path / 'none.toml'}"])


def test_a_section_that_is_a_value_is_told_how_it_is_written(tmp_path):
    (tmp_path / "job.toml").write_text("rl = 3\n", encoding="utf-8")
    with pytest.raises(ValueError, match=r"rl = 3, but 'rl' is a section: write \[rl\]"):
        load_job_config(["--job.config_file", str(tmp_path / "job.toml")])


def test_a_file_may_begin_with_a_byte_order_mark(tmp_path):
    job(tmp_path, "[rl]\ngroup_size = 4\n")
    path = tmp_path / "job.toml"
    path.write_bytes(b"\xef\xbb\xbf" + path.read_bytes())
    assert load_job_config(["--job.config_file", str(path)]).rl.group_size == 4


def test_a_file_that_says_too_little_is_not_filled_from_another_models_defaults(tmp_path):
    path = tmp_path / "job.toml"
    path.write_text("[rl]\ngroup_size = 4\n[sampling]\nmax_tokens = 8\n", encoding="utf-8")
    with pytest.raises(ValueError) as error:
        load_job_config(["--job.config_file", str(path), "--training.dataset", "gsm8k"])
    [line] = str(error.value).splitlines()
    assert "model.hf_assets_path is not set, and has no default" in line


@pytest.mark.parametrize(
    ("words", "path", "value"),
    [
        (["--reward.weights", "my.fn", "0.5"], "reward.weights", {"my.fn": 0.5}),
        (["--reward.weights", "gsm8k", "1", "my.fn", "0.5"], "reward.weights", {"gsm8k": 1.0, "my.fn": 0.5}),
        (["--reward.weights.my-module.fn", "0.5"], "reward.weights", {"gsm8k": 1.0, "my-module.fn": 0.5}),
        (["--reward.weights={format = 0.5}"], "reward.weights", {"format": 0.5}),
        (["--checkpoint.enable"], "checkpoint.enable", True),
        (["--checkpoint.enable", "False"], "checkpoint.enable", False),
        (["--checkpoint.enable=true"], "checkpoint.enable", True),
        (["--checkpoint.no-last-save-model-only"], "checkpoint.last_save_model_only", False),
        (["--sampling.stop", "+, user"], "sampling.stop", ["+, user"]),
        (["--sampling.stop", "END", "a,b", "[x"], "sampling.stop", ["END", "a,b", "[x"]),
        (["--sampling.stop=--"], "sampling.stop", ["--"]),
        (["--sampling.stop", '["a b", "c"]'], "sampling.stop", ["a b", "c"]),
        (["--data.template_kwargs", "enable_thinking", "false"], "data.template_kwargs", {"enable_thinking": False}),
        (
            ["--data.template_kwargs", "n", "3", "x", "1.5", "s", "word"],
            "data.template_kwargs",
            {"n": 3, "x": 1.5, "s": "word"},
        ),
        (["--evaluation.k", "1", "4"], "evaluation.k", [1, 4]),
        (["--optimizer.lr", "1e-5"], "optimizer.lr", 1e-5),
        (["--optimizer.lr=1"], "optimizer.lr", 1.0),
        (["--debug.seed", "None"], "debug.seed", None),
        (["--lr_scheduler.decay-ratio", ".5"], "lr_scheduler.decay_ratio", 0.5),
        (["--job.description", "5"], "job.description", "5"),
        (["--rl.group_size", "4", "--rl.group_size", "6"], "rl.group_size", 6),
    ],
)
def test_words_on_the_command_line_are_read_as_the_keys_type(words, path, value):
    config = load_job_config(words)
    section, key = path.split(".")
    found = getattr(getattr(config, section), key)
    assert found == value and type(found) is type(value)


@pytest.mark.parametrize(
    ("words", "complaint"),
    [
        (["--rl.group_size", "four"], "--rl.group_size = 'four', but it must be int"),
        (["--rl.group_size", "1e3"], "--rl.group_size = '1e3', but it must be int"),
        (["--rl.group_size"], "--rl.group_size: its value is missing; it must be int"),
        (["--rl.group_size", "4", "5"], "--rl.group_size: unexpected '5' after '4'; a value with spaces takes quotes"),
        (["--checkpoint.enable", "yes"], "--checkpoint.enable = 'yes', but it must be bool"),
        (["--parity.check", "on"], "--parity.check = 'on', but it must be one of 'off', 'report', 'assert'"),
        (["--reward.weights", "gsm8k", "a"], "--reward.weights = {'gsm8k': 'a'}, but it must be dict[str, float]"),
        (["--data.system_prompt", "\udc80"], "--data.system_prompt = '\\udc80', but it must be UTF-8 text"),
        (["--sampling.stop", "a", "\udc80"], "--sampling.stop = ['a', '\\udc80'], but it must be UTF-8 text"),
        (["--rl.grop_size", "4"], "unknown flag --rl.grop_size: did you mean '--rl.group_size'?"),
        (["--reward.weights", "gsm8k", "1", "gsm8k", "2"], "--reward.weights: it names one entry twice"),
        (
            ["--job.config_file", "a.toml", "--job.config_file", "a.toml"],
            "--job.config_file is given 2 times: a job has one",
        ),
        (
            ["--evaluation.k", "1", "--evaluation.k", "2"],
            "--evaluation.k is given twice: write all of its values after one",
        ),
        (
            ["--model.hf_assets_path="],
            "--model.hf_assets_path is not set, and has no default that would be right",
        ),
        (["4"], "unexpected word '4': settings are --section.key value"),
    ],
)
def test_a_bad_word_on_the_command_line_is_named(words, complaint):
    with pytest.raises(ValueError) as error:
        load_job_config(words)
    assert str(error.value) == complaint


def command(*flags: str, code: str = "") -> subprocess.CompletedProcess:
    """The job's command as it is typed, from another directory."""
    start = ["-c", code] if code else [str(COMMAND)]
    return subprocess.run([sys.executable, *start, *flags], capture_output=True, text=True, timeout=120, cwd="/")


def test_the_command_names_all_that_is_wrong_with_its_arguments_and_loads_no_torch():
    code = (
        f"import runpy, sys; sys.argv[0] = {str(COMMAND)!r}; status = 0\n"
        "try: runpy.run_path(sys.argv[0], run_name='__main__')\n"
        "except SystemExit as end: status = end.code\n"
        "assert not {'torch', 'torchtitan', 'pydantic'} & sys.modules.keys(); sys.exit(status)"
    )
    wrong = ["--rl.grop_size", "4", "--optimizer.lr", "nan", "--validation.enable", "--generator.cores", "3-1"]
    wrong += ["--rl.prompts_per_step", "3", "--rl.group_size", "1", "--sampling.top_k", "x", "--evaluation.k", "9"]
    done = command(*wrong, code=code)
    assert done.returncode == 1, done.stderr
    named = [line.removeprefix("error: ").partition(" = ")[0] for line in done.stderr.splitlines()]
    assert [name[:20] for name in named] == [
        "unknown flag --rl.gr",
        "--optimizer.lr",
        "--validation.enable",
        "--sampling.top_k",
        "3 completions a step",
        "[evaluation] k",
        "[generator] cores",
    ]
    absent = command("--job.config_file", "absent.toml", "--rl.group_size", "0", code=code)
    assert [line.split(" ")[1] for line in absent.stderr.splitlines()] == ["job", "--rl.group_size"]
    helped = command("--help", code=code)
    assert helped.returncode == 0, helped.stderr
    assert "[policy_loss]" in helped.stdout and "--rl.group_size 8\n      Completions sampled for each" in helped.stdout
    assert "--optimizer.lr 0.0008\n      Learning rate" in helped.stdout and "--compile." not in helped.stdout


def test_a_file_that_is_not_this_repositorys_names_no_code_unnoticed(tmp_path):
    file = tmp_path / "job.toml"
    text, flags = (TRAIN_CONFIGS / "debug_cpu.toml").read_text(encoding="utf-8"), ["--job.config_file", str(file)]
    for name, is_code in (("gsm8k", False), ("os.system", True), ("module:function", True)):
        file.write_text(f'{text}\n[reward]\nweights = {{"{name}" = 1}}\n')
        if is_code:
            with pytest.raises(ValueError, match=rf"job.toml: reward.weights .* {name} is code .* say --trust_code"):
                load_job_config(flags)
        assert load_job_config([*flags, "--trust_code"]).reward.weights == {name: 1}
        assert load_job_config([*flags, "--reward.weights", name, "2"]).reward.weights == {name: 2}
