# All rights reserved.
#
# This source code is licensed under the BSD-style license found in the
# LICENSE file in the root directory of this source tree.

"""Every key of the job config: honoured or refused by name, held to its range, and decided upon on a resume."""

import dataclasses
import functools
import json
import re
import shutil
import tomllib
import typing
from contextlib import closing
from pathlib import Path
from types import UnionType

import pytest
import tomli_w
import torch.distributed.checkpoint as dcp
from torchtitan.experiments.rl.unified import config as config_room
from torchtitan.experiments.rl.unified.config.checks import CHECKS, warnings
from torchtitan.experiments.rl.unified.config.idle import IDLE
from torchtitan.experiments.rl.unified.config.keys import APPLIED, FIXED, HONOURED, REFUSED, REQUIRED, SAME
from torchtitan.experiments.rl.unified.config.load import JobConfig, load_job_config, TRAIN_CONFIGS, write_toml
from torchtitan.experiments.rl.unified.config.ranges import TORCHTITAN
from torchtitan.experiments.rl.unified.config.schema import fits, keys_of, numbers
from torchtitan.experiments.rl.unified.config.sections import Sections
from torchtitan.experiments.rl.unified.preflight import check
from torchtitan.experiments.rl.unified.preflight.model import model_of_job
from torchtitan.experiments.rl.unified.preflight.resume import (
    changed_settings,
    check_files,
    check_position,
    check_settings,
)
from torchtitan.experiments.rl.unified.record.provenance import check_reference, checkpoint_digests, write_provenance
from torchtitan.experiments.rl.unified.record.run import RunRecord
from torchtitan.experiments.rl.unified.rollout.task import Task
from transformers import AutoTokenizer

KEYS = keys_of(JobConfig)
OWN = keys_of(Sections)
PACKAGE = Path(config_room.__file__).parents[1]


def named(path: str, table) -> list[str]:
    """The entries of a table of keys and sections that stand for `path`."""
    return [name for name in table if path == name or path.startswith(f"{name}.")]


def test_each_key_of_torchtitans_is_honoured_or_refused():
    honoured = {f"{section}.{key}" for section, keys in HONOURED.items() for key in keys}
    undecided = [p for p in KEYS if p not in OWN and (p in honoured) + len(named(p, REFUSED)) != 1]
    assert undecided == []
    assert honoured <= KEYS.keys() and all(any(named(path, [name]) for path in KEYS) for name in REFUSED)
    assert SAME.keys() <= REFUSED.keys() and set(REQUIRED) <= KEYS.keys() and TORCHTITAN.keys() <= honoured


def test_each_key_of_our_own_is_read():
    code = "\n".join(
        file.read_text(encoding="utf-8")
        for file in PACKAGE.rglob("*.py")
        if file.name not in ("sections.py", "keys.py")
    )
    assert [path for path in OWN if not re.search(rf"\.{path.split('.')[-1]}\b", code)] == []


def test_a_resume_decides_about_each_key():
    honoured = [path for path, key in KEYS.items() if not key.refused]
    assert [path for path in honoured if len(named(path, FIXED)) + len(named(path, APPLIED)) != 1] == []
    assert all(any(named(path, [name]) for path in honoured) for name in (*FIXED, *APPLIED))


def test_what_a_check_reads_are_keys():
    assert all(any(path.startswith(prefix) for path in KEYS) for reads in CHECKS.values() for prefix in reads)


def another(key) -> str | None:
    """A value as a word that is of the key's type and not its default; None for a type that words cannot give."""
    hint = key.hint
    if typing.get_origin(hint) in (UnionType, typing.Union):
        hint = next((part for part in typing.get_args(hint) if part is str), typing.get_args(hint)[0])
    if typing.get_origin(hint) is typing.Literal:
        return next((choice for choice in typing.get_args(hint) if choice != key.default), None)
    if typing.get_origin(hint) is list:
        return {str: "a", int: "7"}.get(typing.get_args(hint)[0], '[["a"]]')
    return {bool: str(not key.default).lower(), int: "7", float: "0.7", str: "other"}[hint]


def test_a_refused_key_is_refused_by_name_unless_it_has_its_default():
    for path, key in KEYS.items():
        if key.refused and (word := another(key)) is not None:
            with pytest.raises(ValueError, match=rf"^--{path} = .*, which this trainer does not honour: [\w-]+"):
                load_job_config([f"--{path}={word}"])
    defaults = [f"--{p}={k.default}" for p, k in KEYS.items() if k.refused and isinstance(k.default, (bool, int, str))]
    assert len(defaults) > 40
    load_job_config(defaults)
    load_job_config(["--metrics.log_freq", "1"])


def test_defaults_are_in_their_ranges():
    out = [p for p, key in KEYS.items() if key.range and any(n not in key.range for n in numbers(key.default))]
    assert out == []


# What a number means where it is not the usual thing, and is fine: "off", "all", "any", or a bound that never binds.
FINE = {
    "optimizer.lr": ("0",),  # The policy stays as it is; there is a warning.
    "optimizer.beta1": ("0",),
    "optimizer.beta2": ("0",),
    "optimizer.weight_decay": ("0",),
    "lr_scheduler.warmup_steps": ("0",),
    "lr_scheduler.decay_ratio": ("0",),
    "checkpoint.keep_latest_k": ("0",),
    "comm.trace_buf_size": ("0",),
    "debug.seed": ("0",),
    "rl.log_samples": ("0",),
    "supervision.max_restarts": ("0",),
    "reward.weights": ("-1",),  # A penalty.
}


@pytest.fixture
def small_job(tmp_path, monkeypatch) -> list[str]:
    """Flags of a job whose preflight takes a moment: few rows, and a tokenizer that is read once."""
    monkeypatch.setattr(AutoTokenizer, "from_pretrained", functools.cache(AutoTokenizer.from_pretrained))
    for name, number in (("rows", 1), ("held_out", 2)):
        row = {"question": f"What is 1 plus {number}?", "answer": f"#### {1 + number}"}
        (tmp_path / f"{name}.jsonl").write_text(json.dumps(row) + "\n", encoding="utf-8")
    flags = ["--training.dataset=local", f"--training.dataset_path={tmp_path / 'rows.jsonl'}"]
    flags.append(f"--evaluation.dataset_path={tmp_path / 'held_out.jsonl'}")
    return [*flags, f"--job.dump_folder={tmp_path / 'run'}"]


def is_numeric(hint) -> bool:
    return hint in (int, float) or any(is_numeric(part) for part in typing.get_args(hint))


def test_a_number_that_means_nothing_is_refused_before_anything_starts(small_job):
    """Every numeric key at five odd values, through all that is looked at before a process is spawned."""
    accepted: dict[str, list[str]] = {}
    for path, key in KEYS.items():
        if not is_numeric(key.hint):
            continue
        entry = {"reward.weights": ".gsm8k", "data.template_kwargs": ".x"}.get(path, "")
        for word in ("-1", "0", "nan", "inf", "1e30"):
            if word in (str(key.default), f"[{key.default}]") or (key.default == 0 and word == "0"):
                continue
            try:
                check(load_job_config([*small_job, f"--{path}{entry}={word}"])).close()
            except ValueError as error:
                assert str(error)
            else:
                accepted.setdefault(path, []).append(word)
    assert accepted == {path: list(words) for path, words in FINE.items()}


@pytest.fixture
def run_before(tmp_path) -> list[str]:
    """Flags of a job that goes on with a run: its config.toml and a whole checkpoint of it are there."""
    flags = [f"--job.dump_folder={tmp_path / 'run'}", "--checkpoint.enable", "--policy_loss.kl_weight=0.1"]
    config = load_job_config(flags)
    state = dict(model_of_job(config).build().state_dict())
    checkpoint = tmp_path / "run" / "checkpoint" / "step-3"
    dcp.save(state | {"train_state": {"step": 3}}, checkpoint_id=checkpoint, no_dist=True)
    write_toml(config, tmp_path / "run" / "config.toml")
    write_provenance(config, tmp_path / "run" / "provenance.json", 0, checkpoint_digests(config))
    return flags


def other_value(config: JobConfig, key) -> list[str]:
    """Words that set a key to another value than the config's."""
    section, name = key.path.split(".")
    now = getattr(getattr(config, section), name)
    if isinstance(now, dict):
        return [f"--{key.path}", "x", "1"]
    return [f"--{key.path}={another(dataclasses.replace(key, default=now))}"]


# They say where the run is, and whether there is a checkpoint to go on from.
ELSEWHERE = {"job.config_file", "job.dump_folder", "checkpoint.enable", "checkpoint.folder", "checkpoint.load_step"}


def test_a_resume_applies_or_refuses_each_key(run_before):
    """One run, and for each key a job that goes on with it and sets that key otherwise."""
    config = load_job_config(run_before)
    check_settings(config)
    assert changed_settings(config) == []
    for path, key in KEYS.items():
        if key.refused or path in ELSEWHERE or path == "training.mixed_precision_reduce":  # The last has one value.
            continue
        resumed = load_job_config([*run_before, *other_value(config, key)])
        if path in FIXED:
            with pytest.raises(ValueError, match=rf"^{path} is .*, and was .*: .* Set that back, or begin another run"):
                check_settings(resumed)
        else:
            check_settings(resumed)
            told = [] if path.startswith(("job.", "checkpoint.initial_load")) else [path]
            told = ["not"] if path == "checkpoint.initial_load_path" else told  # Read again.
            assert [line.split()[3] for line in changed_settings(resumed)] == told


@pytest.mark.parametrize(
    "change, cause",
    [
        ({}, ""),
        ({"rows": "0"}, "the data set has other rows"),
        ({"prompts": "0"}, "the tokenizer, its chat template"),
    ],
)
def test_a_position_among_other_prompts_is_refused_before_anything_starts(run_before, tmp_path, change, cause):
    config = load_job_config(run_before)
    with closing(Task(config)) as task:
        saved = json.dumps({"task": task.state_dict() | change, "batches": []})
        state = dict(model_of_job(config).build().state_dict()) | {"train_state": {"step": 4, "task": saved}}
        dcp.save(state, checkpoint_id=tmp_path / "run" / "checkpoint" / "step-4", no_dist=True)
        at_start = task.state_dict()
        if cause:
            with pytest.raises(ValueError, match=f"one among other prompts: {cause}"):
                check(config)
        else:
            check_position(config, task)
        assert task.state_dict() == at_start


def changed_file(folder: Path, name: str, **fields) -> Path:
    """A copy of the tiny checkpoint with other fields in one of its files."""
    shutil.copytree(load_job_config([]).model.hf_assets_path, folder)
    content = json.loads((folder / name).read_text(encoding="utf-8"))
    (folder / name).write_text(json.dumps(content | fields), encoding="utf-8")
    return folder


@pytest.mark.parametrize(
    "name, fields, complaint",
    [
        ("config.json", {"rms_norm_eps": 0.5}, "rms_norm_eps is 0.5, and was 1e-06"),
        (
            "config.json",
            {"rope_parameters": {"rope_type": "default", "rope_theta": 9.0}},
            "rope_theta is 9.0, and was ",
        ),
        ("generation_config.json", {"eos_token_id": [2, 7]}, r"eos_token_id is \[2, 7\], and was \[0, 2\]"),
        ("tokenizer_config.json", {"eos_token": "<|im_start|>"}, "eos_token is '<|im_start|>', and was '<|im_end|>'"),
        ("config.json", {"transformers_version": "5.9.9", "use_cache": False}, ""),
    ],
)
def test_a_resume_with_another_model_in_its_files_is_refused(run_before, tmp_path, name, fields, complaint):
    folder = changed_file(tmp_path / "changed", name, **fields)
    config = load_job_config([*run_before, "--policy_loss.kl_weight=0", f"--model.hf_assets_path={folder}"])
    check_files(load_job_config(run_before))
    if complaint:
        with pytest.raises(ValueError, match=complaint.replace("|", r"\|")):
            check_files(config)
    else:
        check_files(config)


def test_a_reference_policy_of_other_weights_is_refused(run_before, tmp_path):
    config, record = load_job_config(run_before), tmp_path / "run" / "provenance.json"
    digests = checkpoint_digests(config)
    check_reference(config, digests)
    write_provenance(
        config, record, 3, digests | {"model.safetensors": "0"}
    )  # A resume leaves what the run began with.
    check_reference(config, digests)
    with pytest.raises(ValueError, match="^model.safetensors of .* is not what this run began with"):
        check_reference(config, digests | {"model.safetensors": "0"})


def test_another_tokenizer_is_allowed_without_a_reference_policy(run_before, tmp_path):
    copied = shutil.copytree(load_job_config([]).model.hf_assets_path, tmp_path / "moved")
    config = load_job_config([*run_before, "--policy_loss.kl_weight=0", f"--model.hf_assets_path={copied}"])
    check_settings(config)
    assert [line.split()[3] for line in changed_settings(config)] == ["model.hf_assets_path", "policy_loss.kl_weight"]


def test_a_state_taken_from_another_run_is_held_to_that_runs_settings(run_before, tmp_path):
    flags = ["--checkpoint.no_initial_load_model_only", "--rl.group_size=4", f"--job.dump_folder={tmp_path / 'other'}"]
    flags = [*flags, f"--checkpoint.initial_load_path={tmp_path / 'run' / 'checkpoint' / 'step-3'}"]
    with pytest.raises(ValueError, match="^rl.group_size is 4, and was 8 in the run"):
        check_settings(load_job_config([*run_before, *flags]))
    check_settings(load_job_config([*run_before, *flags, "--checkpoint.initial_load_model_only"]))


@pytest.mark.parametrize("content", [None, b"[rl\n", b'[job]\ndescription = "\xff"\n'])
def test_a_run_that_does_not_say_what_it_was_is_not_gone_on_with(run_before, tmp_path, content):
    file = tmp_path / "run" / "config.toml"
    file.write_bytes(content) if content else file.unlink()
    with pytest.raises(
        ValueError, match="^/.*config.toml, which says what the run was .* Set that back, or begin another"
    ):
        check_settings(load_job_config(run_before))


def test_the_record_of_a_run_that_is_gone_on_with_is_read_by_preflight_too(run_before, tmp_path):
    (tmp_path / "run" / "metrics.jsonl").write_text("x\n", encoding="utf-8")
    with pytest.raises(ValueError, match="metrics.jsonl line 1 is not a record of a step"):
        check(load_job_config(run_before))


@pytest.mark.parametrize(
    "flags, complaint",
    [
        (["--job.dump_folder="], "[job] dump_folder is empty: name a folder"),
        (["--job.dump_folder={file}"], "[job] dump_folder {file} cannot be written in: {file}: Not a directory"),
        (["--job.dump_folder={file}/x/y"], "[job] dump_folder {file}/x/y cannot be written in: {file}: Not"),
        (["--job.dump_folder=/proc/x/y"], "[job] dump_folder /proc/x/y cannot be written in: /proc: "),
        (["--checkpoint.folder=/etc"], "[checkpoint] folder = '/etc': it must be the name of a folder inside of"),
        (["--checkpoint.folder=../other"], "[checkpoint] folder = '../other': it must be the name of a folder"),
        (["--checkpoint.folder="], "[checkpoint] folder = '.': it must be the name of a folder inside of"),
        (["--metrics.save_tb_folder=/tb"], "[metrics] save_tb_folder = '/tb': it must be"),
        (["--comm.save_traces_folder=/tb"], "[comm] save_traces_folder = '/tb': it must be"),
        (["--generator.cores=9999"], "[generator] cores = '9999': this process may not run on 9999; it has "),
        (["--parallelism.tensor_parallel_degree=2", "--generator.tensor_parallel_degree=2"], "[parallelism] data_par"),
        (["--sampling.temperature=0"], "[sampling] temperature 0 makes the 8 completions of a prompt equal"),
        (["--sampling.top_k=1"], "[sampling] top_k 1 makes the 8 completions of a prompt equal"),
        (["--reward.weights", "gsm8k", "0"], "[reward.weights] gives no reward a weight"),
        (["--data.date=26 Jul 2024"], "[data] date = '26 Jul 2024': Invalid isoformat string"),
    ],
)
def test_places_dates_and_settings_that_teach_nothing_are_refused(flags, complaint, tmp_path):
    file = tmp_path / "file"
    file.touch()
    with pytest.raises(ValueError) as error:
        check(load_job_config([flag.format(file=file) for flag in flags]))
    [problem] = str(error.value).splitlines()
    assert problem.startswith(complaint.format(file=file))
    assert list(tmp_path.iterdir()) == [file]


def test_a_folder_may_begin_with_a_tilde():
    flags = ["--job.dump_folder=~/out", "--weight_sync.folder=~/w", "--checkpoint.initial_load_path=~/c"]
    config = load_job_config(flags)
    found = config.job.dump_folder, config.weight_sync.folder, config.checkpoint.initial_load_path
    assert found == tuple(str(Path.home() / name) for name in ("out", "w", "c"))


def test_the_config_of_each_start_is_kept(tmp_path):
    flags = [f"--job.dump_folder={tmp_path / 'run'}", "--metrics.no_enable_tensorboard", "--optimizer.lr"]
    for rate in ("1e-4", "1e-5", "1e-5", "1e-6"):
        with RunRecord(load_job_config([*flags, rate])):
            pass
    rates = {
        file.name: tomllib.loads(file.read_text(encoding="utf-8"))["optimizer"]["lr"]
        for file in (tmp_path / "run").glob("*.toml")
    }
    assert rates == {"config.1.toml": 1e-4, "config.2.toml": 1e-5, "config.toml": 1e-6}


def test_no_text_of_a_file_that_is_not_this_repositorys_becomes_code(tmp_path, monkeypatch):
    """Proves for each key that holds text that naming a module there does not import it, in preflight either."""
    (tmp_path / "planted.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w').close()\ndef f(sample): return 1.0\n")
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(tmp_path))
    values = tomllib.loads((TRAIN_CONFIGS / "debug_cpu.toml").read_text(encoding="utf-8"))
    file, tried = tmp_path / "job.toml", 0
    for path, key in KEYS.items():
        text = next((t for t in ("planted:f", ["planted:f"], {"planted:f": 1.0}) if fits(t, key.hint)), None)
        if text is None or key.refused or path == "job.config_file":
            continue
        section, _, name = path.rpartition(".")
        config = {**values, section: {**values.get(section, {}), name: text}}
        file.write_text(tomli_w.dumps(config), encoding="utf-8")
        try:
            check(
                load_job_config(["--job.config_file", str(file), "--evaluation.interval", "1", "--parity.check=off"])
            ).close()
        except ValueError:
            pass
        assert not (tmp_path / "ran").exists(), path
        tried += 1
    assert tried > 30
    check(
        load_job_config(["--evaluation.reward", "planted:f", "--evaluation.interval", "1", "--parity.check=off"])
    ).close()
    assert (tmp_path / "ran").exists()


def test_what_is_set_in_vain_is_remarked():
    """Proves for each such key that it is named while it does nothing, and not when it does something."""
    asked = {
        "[checkpoint] enable": ["--checkpoint.enable"],
        "[evaluation] interval": ["--evaluation.interval=5"],
        '[weight_sync] transport = "file"': ["--weight_sync.transport=file"],
        "a [policy_loss] name that clips": ["--policy_loss.name=dapo"],
        "[trajectory_queue] max_staleness": ["--trajectory_queue.max_staleness=1", "--parity.check=assert"],
        "[checkpoint] initial_load_path": [f"--checkpoint.initial_load_path={TRAIN_CONFIGS}"],
        "[parity] check": ["--trajectory_queue.max_staleness=1", "--parity.check=assert"],
        "[activation_checkpoint] mode": ["--activation_checkpoint.mode=selective"],
        "[metrics] enable_tensorboard": ["--metrics.enable_tensorboard"],
        "[cluster] trainer or generators": ["--cluster.trainer", "tcp://a:1"],
    }
    idle = ["--evaluation.interval=0", "--policy_loss.name=reinforce", "--metrics.no_enable_tensorboard"]
    idle += ["--parity.check=off", "--trajectory_queue.max_staleness=0"]
    for needed, paths, _ in IDLE:
        for path in paths:
            flags = other_value(load_job_config(idle), KEYS[path])
            lines = [line for line in warnings(load_job_config([*idle, *flags])) if f"without {needed}, " in line]
            assert len(lines) == 1 and "[{}] {}".format(*path.split(".")) in lines[0], (path, lines)
            lines = warnings(load_job_config([*idle, *flags, *asked[needed]]))
            assert not any(f"without {needed}, " in line for line in lines), (path, lines)
    for path in TRAIN_CONFIGS.glob("*.toml"):
        assert warnings(load_job_config(["--job.config_file", str(path)])) == []


def test_a_decay_that_the_warm_up_shortens_is_remarked():
    flags = ["--training.steps=6", "--lr_scheduler.warmup_steps=4", "--lr_scheduler.decay_ratio"]
    assert "warmup_steps leaves 2: the learning" in warnings(load_job_config([*flags, "0.9"]))[0]
    assert warnings(load_job_config([*flags, "0.3"])) == []
