# All rights reserved.
#
# This source code is licensed under the BSD-style license found in the
# LICENSE file in the root directory of this source tree.

from pathlib import Path

import pytest
from torchtitan.experiments.rl.unified.config.derived import trainer_ranks
from torchtitan.experiments.rl.unified.config.load import load_job_config, REPOSITORY, TRAIN_CONFIGS, write_toml
from torchtitan.experiments.rl.unified.preflight.batch import check_batch


def job(tmp_path: Path, text: str, *flags: str):
    path = tmp_path / "job.toml"
    path.write_text(text)
    return load_job_config(["--job.config_file", str(path), *flags])


@pytest.mark.parametrize("path", sorted(TRAIN_CONFIGS.glob("*.toml")), ids=lambda path: path.name)
def test_shipped_configs_parse(path):
    assert load_job_config(["--job.config_file", str(path)]).model.name == "qwen3"


def test_a_shipped_config_is_for_several_gpus():
    config = load_job_config(["--job.config_file", str(TRAIN_CONFIGS / "qwen3_0.6b_fsdp2_tp2.toml")])
    check_batch(config)
    assert trainer_ranks(config) == 4 and config.generator.tensor_parallel_degree == 2


def test_the_default_on_a_cpu_machine_is_the_debug_job():
    config = load_job_config([])
    assert (config.model.flavor, config.parity.check) == ("tiny", "assert")
    assert Path(config.model.hf_assets_path).is_absolute()


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
        ("[rl]\ngroup_sise = 4\n", "unknown key 'rl.group_sise'; known here: group_size"),
        ("[rll]\n", "unknown section 'rll'"),
        ('[rl]\ngroup_size = "4"\n', "rl.group_size = '4', but it must be int"),
        ("[parity]\ncheck = true\n", "parity.check = True, but it must be one of 'off', 'report', 'assert'"),
        ('[rl]\nmode = "both"\n', "rl.mode = 'both', but it must be one of 'unified', 'vllm_compat'"),
        ("rl = 3\n", "rl = 3, but 'rl' is a section: write \\[rl\\]"),
        ("[rl\n", "is not TOML"),
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
