# All rights reserved.
#
# This source code is licensed under the BSD-style license found in the
# LICENSE file in the root directory of this source tree.

"""Checkpoints: which of them a job goes on from, what they hold, what an export is worth."""

import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import torch.distributed.checkpoint as dcp
from safetensors.torch import load_file, save_file
from torch.distributed.checkpoint import FileSystemReader
from torch.distributed.checkpoint.default_planner import _EmptyStateDictLoadPlanner
from torch.distributed.checkpoint.state_dict_loader import _load_state_dict
from torchtitan.experiments.rl.unified import simple_rl_multiprocess
from torchtitan.experiments.rl.unified.config.load import JobConfig, load_job_config, write_toml
from torchtitan.experiments.rl.unified.dcp import read_metadata
from torchtitan.experiments.rl.unified.devices import this_device
from torchtitan.experiments.rl.unified.errors import CheckpointError
from torchtitan.experiments.rl.unified.families import model_of_checkpoint, policy_train_spec
from torchtitan.experiments.rl.unified.families.files import load_tensors, read_checkpoint
from torchtitan.experiments.rl.unified.messages import Request, Trajectory
from torchtitan.experiments.rl.unified.record.checkpoints import find_start, list_saved, prepare_folder
from torchtitan.experiments.rl.unified.record.replay import ReplayFolder
from torchtitan.experiments.rl.unified.record.run import RunRecord

TINY = Path(__file__).parent / "assets/qwen3_tiny"
FULL = ["--checkpoint.enable", "--checkpoint.no-last_save_model_only", "--evaluation.interval", "0"]


def job(folder: Path, *flags: str) -> JobConfig:
    return load_job_config(["--job.dump_folder", str(folder), "--checkpoint.enable", *flags])


def run(folder: Path, *flags: str) -> subprocess.CompletedProcess:
    """The job's command, to its end."""
    small = ["--rl.prompts_per_step", "4", "--rl.group_size", "4"]
    command = [sys.executable, simple_rl_multiprocess.__file__, "--job.dump_folder", str(folder), *small, *flags]
    return subprocess.run(command, capture_output=True, text=True, timeout=300, cwd=folder.parent)


def lines(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def write_checkpoint(folder: Path, step: int, *, full: bool = True, flavor: str = "tiny") -> Path:
    """A checkpoint of the random model, written by DCP; `full` adds what marks one that can be trained on from."""
    spec = policy_train_spec("qwen3")
    state = dict(spec.model_cls(spec.model_args[flavor]).state_dict())
    path = folder / "checkpoint" / f"step-{step}"
    dcp.save(state | ({"train_state": {"step": step}} if full else {}), checkpoint_id=path, no_dist=True)
    return path


def contents(path: Path) -> dict:
    """Everything a DCP checkpoint holds, by name."""
    state: dict = {}
    planner = _EmptyStateDictLoadPlanner()
    _load_state_dict(state, storage_reader=FileSystemReader(path), planner=planner, no_dist=True)
    return state


def flat(value, name: str = "") -> dict:
    if isinstance(value, dict):
        return {key: leaf for k, item in value.items() for key, leaf in flat(item, f"{name}.{k}").items()}
    return {name: value}


def assert_equal_checkpoints(one: Path, other: Path) -> None:
    a, b = flat(contents(one)), flat(contents(other))
    assert a.keys() == b.keys() and any("exp_avg_sq" in name for name in a)
    for name, value in a.items():
        equal = torch.equal(value, b[name]) if isinstance(value, torch.Tensor) else value == b[name]
        assert equal, name


def test_the_newest_whole_checkpoint_is_chosen_and_the_rest_cleared_away(tmp_path):
    for step in (2, 4, 6, 8):
        write_checkpoint(tmp_path, step)
    folder = tmp_path / "checkpoint"
    (folder / "step-8" / ".metadata").unlink()  # As after a kill: DCP writes it last.
    shard = folder / "step-6" / "__0_0.distcp"
    shard.write_bytes(shard.read_bytes()[:-100])
    config = job(tmp_path, "--training.steps", "10")
    start = find_start(config)
    assert start.saved.step == 4 and not start.finished
    six, eight = start.notes
    assert "step-6 is damaged: __0_0.distcp is truncated" in six and six.endswith("going on from step 4")
    assert "step-8 was cut off while it was written" in eight
    prepare_folder(config, start)
    assert sorted(p.name for p in folder.iterdir()) == ["set_aside", "step-2", "step-4"]
    assert sorted(p.name for p in (folder / "set_aside").iterdir()) == ["step-6", "step-8"], "nothing is deleted"
    shard = folder / "step-4" / "__0_0.distcp"
    shard.unlink()
    assert find_start(config).saved.step == 2
    (folder / "step-2" / ".metadata").write_bytes(b"")
    with pytest.raises(ValueError, match="no checkpoint to go on from: .*step-2.*unreadable.*step-4.*is missing"):
        find_start(config)


def test_a_run_whose_first_checkpoint_was_cut_off_starts_anew(tmp_path):
    (write_checkpoint(tmp_path, 2) / ".metadata").unlink()
    start = find_start(job(tmp_path))
    assert start.saved is None and "cut off while it was written; starting anew" in start.notes[0]


def test_weights_alone_finish_a_run_but_do_not_continue_one(tmp_path):
    write_checkpoint(tmp_path, 6, full=False)
    assert find_start(job(tmp_path, "--training.steps", "6")).finished
    with pytest.raises(ValueError, match="holds the model alone .*no optimizer state.*Take another"):
        find_start(job(tmp_path, "--training.steps", "8"))
    write_checkpoint(tmp_path, 4)
    assert find_start(job(tmp_path, "--training.steps", "8")).saved.step == 4
    with pytest.raises(ValueError, match="load_step 6: .*holds the model alone"):
        find_start(job(tmp_path, "--training.steps", "8", "--checkpoint.load_step", "6"))


REFUSED = {
    "another model": ([], "(64, 128) in the job's model; and 88 more. Take another [job] dump_folder"),
    "no such step": (["--checkpoint.load_step", "7"], "load_step 7: "),
    "pinned memory": (["--checkpoint.async_mode", "async_with_pinned_mem"], 'here use "async"'),
    "one checkpoint": (["--checkpoint.keep_latest_k", "1"], "keep_latest_k = 1, but it must be 0 or at least 2"),
    "no interval": (["--checkpoint.interval", "0"], "interval = 0, but it must be at least 1"),
    "export of everything": (["--checkpoint.last_save_in_hf", "--checkpoint.no-last_save_model_only"], "weights alone"),
    "no such start": (["--checkpoint.initial_load_path", "/no/such"], "no checkpoint directory /no/such"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_cannot_be_resumed_is_one_error_before_anything_is_spawned(case, tmp_path, capsys):
    flags, complaint = REFUSED[case]
    if case != "no such start":
        write_checkpoint(tmp_path, 2, flavor="debugmodel" if case == "another model" else "tiny")
        write_toml(job(tmp_path), tmp_path / "config.toml")
    before = sorted(tmp_path.rglob("*"))
    status = simple_rl_multiprocess.main(["--job.dump_folder", str(tmp_path), "--checkpoint.enable", *flags])
    error = capsys.readouterr().err.strip()
    assert status == 1
    assert error.startswith("error: ") and complaint in error and "\n" not in error
    assert sorted(tmp_path.rglob("*")) == before


def test_a_finished_run_says_so(tmp_path, capsys):
    write_checkpoint(tmp_path, 3)
    write_toml(job(tmp_path), tmp_path / "config.toml")
    flags = ["--job.dump_folder", str(tmp_path), "--training.steps", "3", *FULL]
    assert simple_rl_multiprocess.main(flags) == 0
    assert capsys.readouterr().out.startswith("no step was taken: ")


@pytest.fixture
def trainer(monkeypatch):
    """Builds RLTrainers, one at a time, of one rank in this process."""
    rank = {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "1", "MASTER_ADDR": "localhost", "MASTER_PORT": "0"}
    for name, value in rank.items():
        monkeypatch.setenv(name, value)
    this_device().prepare_trainer()
    from torchtitan.experiments.rl.unified.trainer.trainer import RLTrainer

    def build(folder: Path, *flags: str) -> RLTrainer:
        if torch.distributed.is_initialized():
            torch.distributed.destroy_process_group()
        one = ["--parallelism.data_parallel_replicate_degree", "1", "--parity.check", "off"]
        trainer = RLTrainer(job(folder, *one, *flags))
        trainer.load()
        return trainer

    yield build
    torch.distributed.destroy_process_group()


def take_steps(trainer, count: int) -> None:
    for _ in range(count):
        generator = torch.Generator().manual_seed(trainer.step)
        ids = torch.randint(3, 512, (8, 30), generator=generator).tolist()
        trajectories = [
            Trajectory(Request(str(i), 0, row[:10], 0), row[10:], torch.full((20,), -6.0), trainer.step, "stop", "")
            for i, row in enumerate(ids)
        ]
        if trainer.step_on(trajectories, torch.linspace(-1, 1, 8)).checkpoint_due:
            trainer.save({"position": trainer.step})
    trainer.close()


EACH_STEP = ["--checkpoint.interval", "1", "--training.steps", "6", "--checkpoint.no-last_save_model_only"]


def test_background_saves_hold_the_step_they_belong_to(trainer, tmp_path):
    take_steps(trainer(tmp_path / "sync", *EACH_STEP), 4)
    take_steps(trainer(tmp_path / "async", *EACH_STEP, "--checkpoint.async_mode", "async"), 4)
    for step in range(1, 5):
        assert_equal_checkpoints(*(tmp_path / mode / f"checkpoint/step-{step}" for mode in ("sync", "async")))


def test_only_the_newest_k_are_kept(trainer, tmp_path):
    take_steps(trainer(tmp_path, *EACH_STEP, "--checkpoint.keep_latest_k", "2"), 5)
    assert [saved.step for saved in list_saved(tmp_path / "checkpoint")] == [4, 5]


def test_a_damaged_checkpoint_costs_its_steps_and_no_bits(trainer, tmp_path):
    take_steps(trainer(tmp_path / "whole", *EACH_STEP), 5)
    shutil.copytree(tmp_path / "whole", tmp_path / "damaged")
    shard = tmp_path / "damaged/checkpoint/step-5/__0_0.distcp"
    shard.write_bytes(shard.read_bytes()[:1000])
    (tmp_path / "damaged/checkpoint/step-4/.metadata").unlink()
    resumed = trainer(tmp_path / "damaged", *EACH_STEP)
    assert resumed.step == 3 and resumed.task_state == {"position": 3}
    take_steps(resumed, 2)
    assert_equal_checkpoints(tmp_path / "whole/checkpoint/step-5", tmp_path / "damaged/checkpoint/step-5")


def test_nothing_whole_means_the_initial_weights(trainer, tmp_path):
    initial = dict(trainer(tmp_path / "none").policy_weights(torch.float32))
    (tmp_path / "cut/checkpoint/step-2").mkdir(parents=True)
    weights = dict(trainer(tmp_path / "cut").policy_weights(torch.float32))
    assert all(torch.equal(weights[name], initial[name]) for name in initial)
    assert not list_saved(tmp_path / "cut/checkpoint")


def test_weights_of_a_checkpoint_can_begin_another_run(trainer, tmp_path):
    take_steps(trainer(tmp_path / "one", *EACH_STEP), 2)
    path = tmp_path / "one/checkpoint/step-2"
    second = trainer(tmp_path / "two", "--checkpoint.initial_load_path", str(path), "--policy_loss.kl_weight", "0.1")
    assert second.step == 0 and second.reference is not None
    saved = contents(path)
    assert all(torch.equal(weight, saved[name]) for name, weight in second.policy_weights(torch.float32))


def test_an_export_is_the_policy(trainer, tmp_path):
    from transformers import AutoModelForCausalLM, AutoTokenizer

    flags = ["--training.steps", "2", "--checkpoint.last_save_in_hf"]
    for dtype in ("float32", "bfloat16"):
        policy = trainer(tmp_path / dtype, *flags, "--checkpoint.export_dtype", dtype)
        take_steps(policy, 2)
        export = tmp_path / dtype / "checkpoint/step-2"
        assert {p.suffix for p in export.iterdir()} == {".json", ".safetensors"}
        sent = policy.train_spec.state_dict_adapter(policy.model_args, None).to_hf(
            dict(policy.policy_weights(getattr(torch, dtype)))
        )
        (weights,) = export.glob("*.safetensors")
        exported = load_file(weights)
        assert exported.keys() == sent.keys()
        assert all(exported[n].dtype == sent[n].dtype and torch.equal(exported[n], sent[n]) for n in sent)
        model = AutoModelForCausalLM.from_pretrained(export)
        assert model.dtype == getattr(torch, dtype)
        assert AutoTokenizer.from_pretrained(export).chat_template
        if dtype == "float32":
            ids = torch.arange(3, 60)[None]
            ours = policy.model_parts[0](ids, attention_masks=one_sequence(57), positions=torch.arange(57)[None])
            assert (model(ids).logits - ours).abs().max() < 1e-5
    again = trainer(tmp_path / "again", "--model.hf_assets_path", str(tmp_path / "float32/checkpoint/step-2"))
    ours = dict(again.policy_weights(torch.bfloat16))
    assert all(torch.equal(ours[name], weight) for name, weight in policy.policy_weights(torch.bfloat16))


def test_an_export_of_a_sharded_checkpoint_is_whole(trainer, tmp_path):
    """Its files take their names from the index of the checkpoint that training began with."""
    from safetensors.torch import save_file
    from transformers import AutoModelForCausalLM

    begin = tmp_path / "begin"
    shutil.copytree(TINY, begin)
    tensors = sorted(load_file(begin / "model.safetensors").items())
    (begin / "model.safetensors").unlink()
    weight_map = {}
    for number in range(2):
        name = f"model-0000{number + 1}-of-00002.safetensors"
        save_file(dict(tensors[number::2]), begin / name)
        weight_map |= dict.fromkeys(dict(tensors[number::2]), name)
    (begin / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}), encoding="utf-8")
    flags = ["--training.steps", "1", "--checkpoint.last_save_in_hf", "--model.hf_assets_path", str(begin)]
    policy = trainer(tmp_path / "run", *flags)
    take_steps(policy, 1)
    export = tmp_path / "run/checkpoint/step-1"
    exported = json.loads((export / "model.safetensors.index.json").read_text(encoding="utf-8"))["weight_map"]
    assert exported == weight_map
    sent = policy.train_spec.state_dict_adapter(policy.model_args, None).to_hf(
        dict(policy.policy_weights(torch.float32))
    )
    state = AutoModelForCausalLM.from_pretrained(export, dtype=torch.float32).state_dict()
    assert all(torch.equal(state[name], tensor) for name, tensor in sent.items())
    assert trainer(tmp_path / "again", "--model.hf_assets_path", str(export)).step == 0


def one_sequence(tokens: int):
    from torchtitan.models.attention import VarlenMetadata

    bounds = torch.tensor([0, tokens], dtype=torch.int32)
    return VarlenMetadata(bounds, bounds, tokens, tokens)


@pytest.fixture
def small_disk(tmp_path):
    """A file system of 12 MB: room for one checkpoint of 7 MB."""
    disk = tmp_path / "disk"
    disk.mkdir()
    mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=12m", "tmpfs", disk], capture_output=True, text=True)
    if mounted.returncode:
        pytest.skip(f"mounting a small file system takes root: {mounted.stderr.strip()}")
    yield disk
    subprocess.run(["umount", "-l", disk], check=True)


@pytest.mark.parametrize("mode", ["disabled", "async"])
def test_a_full_disk_names_the_step_and_leaves_the_last_checkpoint(trainer, small_disk, mode):
    flags = [*EACH_STEP, "--checkpoint.async_mode", mode]
    with pytest.raises(CheckpointError, match=r"of step 2 could not be saved in .*step-2: no space left on the disk"):
        take_steps(trainer(small_disk / "run", *flags), 3)
    (saved,) = list_saved(small_disk / "run/checkpoint")
    assert saved.step == 1 and saved.kind == "full"
    assert trainer(small_disk / "run", *flags).step == 1


LAYOUTS = {
    "FSDP 2": ["--parallelism.data_parallel_shard_degree", "2"],
    "DDP 2": ["--parallelism.data_parallel_replicate_degree", "2"],
    "TP 2": ["--parallelism.tensor_parallel_degree", "2", "--generator.tensor_parallel_degree", "2"],
}


@pytest.mark.slow
def test_a_checkpoint_of_one_layout_is_resumed_in_others(tmp_path):
    """Proves that FSDP shards become DDP replicas and TP shards, in trainer and generator, with parity kept."""
    flags = ["--training.steps", "4", *FULL, "--checkpoint.interval", "2"]
    flags += ["--parallelism.data_parallel_replicate_degree", "1"]
    first = run(tmp_path / "FSDP 2", *flags, *LAYOUTS["FSDP 2"])
    assert first.returncode == 0, first.stderr
    expected = lines(tmp_path / "FSDP 2" / "metrics.jsonl")
    for name in ("DDP 2", "TP 2"):
        shutil.copytree(tmp_path / "FSDP 2", tmp_path / name)
        shutil.rmtree(tmp_path / name / "checkpoint" / "step-4")
        done = run(tmp_path / name, *flags, *LAYOUTS[name])
        assert done.returncode == 0, done.stderr
        resumed = lines(tmp_path / name / "metrics.jsonl")
        assert resumed[:2] == expected[:2] and len(resumed) == 4
        for one, other in zip(expected[2:], resumed[2:], strict=True):
            assert other["mismatched_tokens"] == 0 and other["tokens_compared"] == one["tokens_compared"]
            for key in ("loss", "grad_norm"):
                assert other[key] == pytest.approx(one[key], rel=1e-5), (name, key)


@pytest.mark.slow
def test_a_full_disk_stops_the_job_with_one_error(small_disk):
    """Proves that the cause reaches the command's last line, from the trainer's process, and nothing hangs."""
    flags = ["--training.steps", "4", *FULL, "--checkpoint.interval", "1"]
    done = run(small_disk / "run", *flags)
    assert done.returncode == 1
    (error,) = [line for line in done.stderr.splitlines() if line.startswith("error: ")]
    assert "the checkpoint of step 2 could not be saved" in error and "no space left on the disk" in error
    assert [saved.step for saved in list_saved(small_disk / "run/checkpoint")] == [1]
    assert "train_state.step" in read_metadata(small_disk / "run/checkpoint/step-1").state_dict_metadata


def test_a_damaged_step_to_start_from_is_one_error_before_anything_is_spawned(tmp_path, capsys):
    with RunRecord(job(tmp_path / "run")):  # Writes the run's config.toml.
        step = write_checkpoint(tmp_path / "run", 2)
    shard = step / "__0_0.distcp"
    shard.write_bytes(shard.read_bytes()[:-100])
    flags = [f"--model.hf_assets_path={step}", f"--job.dump_folder={tmp_path / 'new'}"]
    for flags in (flags, [*flags, "--checkpoint.enable"]):
        assert simple_rl_multiprocess.main(flags) == 1
        error = capsys.readouterr().err.strip().splitlines()[-1]
        assert error.startswith("error: [checkpoint] initial_load_path: ") and "__0_0.distcp is truncated" in error
    assert not (tmp_path / "new").exists()


# Each argument is a checkpoint: what infer.py writes, and tokens with log-probs of an engine of its own.
ENGINES = """
import gc, json, sys
from torchtitan.experiments.rl.unified import infer
from torchtitan.experiments.rl.unified.config.checkpoint_path import directory_of_model
from torchtitan.experiments.rl.unified.config.environment import prepare_environment
from torchtitan.experiments.rl.unified.generator.engine import build_engine

prepare_environment()
for path in sys.argv[1:]:
    text = infer.generate(infer.parse_args(["--model-ckpt-path", path, "--temperature", "0"]))[1]
    gc.collect()
    engine = build_engine(
        directory_of_model(path), weights=path, mode="unified", model_name="", flavor="", max_model_len=128,
        tensor_parallel_degree=1, batch_invariant=True, dtype="float32", kv_cache_memory_bytes=2**26, block_size=32,
    )
    from vllm import SamplingParams, TokensPrompt
    sampling = [SamplingParams(max_tokens=24, seed=seed, logprobs=0) for seed in range(4)]
    prompts = [TokensPrompt(prompt_token_ids=[5 + 7 * seed, 6, 9]) for seed in range(4)]
    found = [one.outputs[0] for one in engine.generate(prompts, sampling, use_tqdm=False)]
    logprobs = [[step[i].logprob for step, i in zip(one.logprobs, one.token_ids)] for one in found]
    print("FOUND", json.dumps([text, [one.text for one in found], logprobs]))
    del engine
    gc.collect()
"""


@pytest.mark.slow
def test_a_saved_step_four_shards_and_torchtitans_names_are_one_model_by_their_path_alone(trainer, tmp_path):
    with RunRecord(job(tmp_path / "run", *EACH_STEP)):  # Writes the run's config.toml.
        take_steps(trainer(tmp_path / "run", *EACH_STEP), 1)
    step, shards, titan = tmp_path / "run/checkpoint/step-1", tmp_path / "shards", tmp_path / "titan"
    state = dict(load_tensors(read_checkpoint(step)))
    for folder in (shards, titan):
        shutil.copytree(TINY, folder, ignore=shutil.ignore_patterns("*.safetensors"))
    save_file(state, titan / "weights.safetensors")
    model = model_of_checkpoint(str(TINY))
    named = sorted(model.train_spec().state_dict_adapter(model.args, None).to_hf(state).items())
    places = {name: f"model-{number % 4}.safetensors" for number, (name, _) in enumerate(named)}
    for file in set(places.values()):
        save_file({name: tensor.clone() for name, tensor in named if places[name] == file}, shards / file)
    (shards / "model.safetensors.index.json").write_text(json.dumps({"weight_map": places}))
    for form in (step, shards, titan):
        policy = trainer(tmp_path / f"from {form.name}", f"--model.hf_assets_path={form}")
        weights = dict(policy.policy_weights(torch.float32))
        assert weights.keys() == state.keys() - {"output.weight"}  # One with the embedding.
        assert all(torch.equal(each, state[name]) for name, each in weights.items())
        policy.close()
    paths = [str(form) for form in (step, shards, titan, TINY)]
    done = subprocess.run([sys.executable, "-c", ENGINES, *paths], capture_output=True, text=True, timeout=300)
    found = [line for line in done.stdout.splitlines() if line.startswith("FOUND")]
    assert len(found) == 4, done.stderr[-2000:]
    assert found[0] == found[1] == found[2] != found[3]


def test_a_checkpoint_with_other_bytes_than_were_saved_is_passed_over(tmp_path):
    config = job(tmp_path, "--training.steps", "10")
    for step in (2, 4):
        write_checkpoint(tmp_path, step)
    ReplayFolder(config).record_checkpoints()
    assert find_start(config).saved.step == 4
    shard = tmp_path / "checkpoint/step-4/__0_0.distcp"
    shard.write_bytes(bytes(shard.stat().st_size))  # As a disk may give it back: of its size, all zeros.
    start = find_start(config)
    assert start.saved.step == 2 and "step-4 is damaged: " in start.notes[0]
    assert start.notes[0].endswith("is not what was saved; going on from step 2")
    config.checkpoint.load_step = 4
    with pytest.raises(ValueError, match=r"load_step 4: .*step-4 is damaged: .* is not what was saved"):
        find_start(config)
