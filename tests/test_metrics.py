# All rights reserved.
#
# This source code is licensed under the BSD-style license found in the
# LICENSE file in the root directory of this source tree.

"""A run's record, written step by step without a trainer or an engine."""

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torchtitan.experiments.rl.unified.config.load import load_job_config
from torchtitan.experiments.rl.unified.messages import (
    ParityReport,
    Request,
    RewardResult,
    Scored,
    StepResult,
    TokenStats,
    Trajectory,
)
from torchtitan.experiments.rl.unified.record import run
from torchtitan.experiments.rl.unified.record.run import check_aside, RunRecord, set_aside
from torchtitan.experiments.rl.unified.record.step import notable
from torchtitan.experiments.rl.unified.record.timing import timed


def config_of(folder: Path, *flags: str):
    flags = ("--job.dump_folder", str(folder / "run"), "--metrics.no-enable_tensorboard", *flags)
    return load_job_config(["--training.steps", "4", "--rl.log_samples", "3", *flags])


def trajectories_of(step: int, version: int | None = None) -> list[Trajectory]:
    """Four completions of 2, 3, 4 and 5 tokens, the third one truncated."""
    return [
        Trajectory(
            request=Request(f"epoch 0 row {step}", sample, [1, 2, 3], seed=10 * step + sample),
            completion_ids=list(range(sample + 2)),
            logprobs=torch.linspace(-3, -0.1, sample + 2),
            policy_version=step - 1 if version is None else version,
            finish_reason="length" if sample == 2 else "stop",
            text=f"text {step}.{sample}",
        )
        for sample in range(4)
    ]


def take(record: RunRecord, step: int, version: int | None = None, evaluation: dict | None = None) -> None:
    trajectories = trajectories_of(step, version)
    rewards = [RewardResult(total, {"gsm8k": total}) for total in (0.0, 1.0, 0.0, 0.5)]
    asked = [(f"prompt {step}", "#### 1")] * len(trajectories)
    scored = Scored(rewards, torch.tensor([-1.0, 1.0, -1.0, 0.0]), asked, without_signal=0.25, timeouts=3)
    entry = record.first()
    with timed(entry.phases, "train"):
        pass
    entry.phases["generate"] = 2.5
    entry.evaluation = evaluation or {}
    result = StepResult(
        step=step,
        loss=0.1,
        grad_norm=1.0,
        lr=1e-4,
        parity=ParityReport(tokens_compared=14),
        stats=TokenStats(tokens=14, entropy=28.0),
        checkpoint_due=False,
    )
    entry.finish(trajectories, scored, [result])
    record.write(entry)


def lines(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_a_step_leaves_its_metrics_and_the_samples_worth_reading(tmp_path):
    with RunRecord(config_of(tmp_path)) as record:
        take(record, 1, evaluation={"eval_pass@1": 0.5})
        take(record, 2)
        take(record, 3, version=1)
    metrics, samples = (lines(tmp_path / "run" / name) for name in ("metrics.jsonl", "samples.jsonl"))
    assert [(m["version_min"], m["staleness_max"]) for m in metrics] == [(0, 0), (1, 0), (1, 1)]
    assert [(m["groups_without_signal"], m["reward_timeouts"]) for m in metrics] == [(0.25, 3)] * 3
    assert metrics[0]["entropy"] == 2.0 and "kl_reference" not in metrics[0]
    assert metrics[0]["seconds_generate"] == 2.5 and metrics[0]["seconds_train"] >= 0
    assert [m.get("eval_pass@1") for m in metrics] == [0.5, None, None]
    first = [(s["kind"], s["completion"], s["reward"], s["advantage"]) for s in samples if s["step"] == 1]
    assert first == [
        ("worst", "text 1.0", 0.0, -1.0),
        ("best", "text 1.1", 1.0, 1.0),
        ("truncated", "text 1.2", 0.0, -1.0),
    ]
    assert samples[0]["prompt"] == "prompt 1" and samples[0]["answer"] == "#### 1"
    assert "finished" not in (tmp_path / "run/report.html").read_text() and len(metrics) < 4


def test_notable_completions_take_turns():
    trajectories = trajectories_of(1)
    rewards = [0.0, 1.0, 0.0, 0.5]
    assert notable(trajectories, rewards, 1) == {1: "best"}
    assert notable(trajectories, rewards, 9) == {1: "best", 0: "worst", 2: "truncated", 3: "best"}
    assert notable(trajectories, rewards, 0) == {}
    others = [replace(t, request=replace(t.request, uid="another")) for t in trajectories]
    assert notable(trajectories + others, [1.0] * 8, 4) == {0: "best", 4: "worst", 2: "truncated", 5: "best"}


def test_a_failed_run_has_its_report_all_the_same(tmp_path):
    with pytest.raises(RuntimeError), RunRecord(config_of(tmp_path)) as record:
        take(record, 1)
        raise RuntimeError("boom & bust")
    assert "failed: boom &amp; bust (after step 1 of 4)" in (tmp_path / "run/report.html").read_text()


def test_rewind_forgets_what_came_after(tmp_path):
    config = config_of(tmp_path, "--checkpoint.enable", "--checkpoint.interval", "1")
    with RunRecord(config) as record:
        for step in (1, 2, 3):
            take(record, step)
        record.rewind(1)
        take(record, 2)
    folder = tmp_path / "run"
    assert [m["step"] for m in lines(folder / "metrics.jsonl")] == [1, 2]
    assert [s["step"] for s in lines(folder / "samples.jsonl")] == [1] * 3 + [2] * 3
    assert sorted(path.name for path in (folder / "replay").glob("step-*")) == [
        "step-1.safetensors",
        "step-2.safetensors",
    ]


def test_going_on_drops_the_steps_after_the_checkpoint_and_a_half_written_line(tmp_path):
    config = config_of(tmp_path)
    with RunRecord(config) as record:
        take(record, 1)
        take(record, 2)
    with open(tmp_path / "run/metrics.jsonl", "a") as file:
        file.write('{"step": 3, "rew')
    with RunRecord(config, first_step=1) as record:
        take(record, 2)
    assert [m["step"] for m in lines(tmp_path / "run/metrics.jsonl")] == [1, 2]
    starts = json.loads((tmp_path / "run/provenance.json").read_text())["starts"]
    assert [start["first_step"] for start in starts] == [0, 1]


@pytest.mark.parametrize("damage", [b'{"step": 1\n', b"\xff\xfe\n", b"[1]\n", b'{"reward_mean": 1}\n', b"\n"])
@pytest.mark.parametrize("name", ["metrics.jsonl", "samples.jsonl"])
def test_a_record_that_cannot_be_read_is_refused_and_kept(tmp_path, name, damage):
    config = config_of(tmp_path, "--checkpoint.enable")
    folder = tmp_path / "run"
    (folder / "checkpoint").mkdir(parents=True)
    content = b'{"step": 1}\n' + damage + b'{"step": 2}\n'
    (folder / name).write_bytes(content)
    with pytest.raises(ValueError, match=rf"{name} line 2 is not a record of a step .* mend it or move it away"):
        set_aside(config)
    assert (folder / name).read_bytes() == content and [path.name for path in tmp_path.iterdir()] == ["run"]


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs a device that is always full")
def test_a_full_disk_is_named_and_the_report_is_written_where_it_can_be(tmp_path):
    with pytest.raises(OSError, match=r"No space left on device: '/dev/full'"):
        with RunRecord(config_of(tmp_path)) as record:
            record._samples = open("/dev/full", "w", encoding="utf-8")
            take(record, 1)
    assert "No space left on device" in (tmp_path / "run/report.html").read_text()


def test_a_report_that_fails_is_a_warning(tmp_path, caplog):
    with RunRecord(config_of(tmp_path)):
        (tmp_path / "run/report.html").mkdir()
    assert "no report of" in caplog.text and "IsADirectoryError" in caplog.text


@pytest.mark.parametrize("place, why", [("here", "where you are"), ("mount", "a mount point")])
def test_a_folder_that_cannot_be_moved_aside_is_one_error(tmp_path, monkeypatch, place, why):
    config = config_of(tmp_path)
    folder = Path(config.job.dump_folder)
    folder.mkdir(exist_ok=True)
    assert not check_aside(config)
    (folder / "metrics.jsonl").touch()
    assert check_aside(config)
    if place == "here":
        monkeypatch.chdir(folder)
        config.job.dump_folder = "."
    else:
        monkeypatch.setattr(Path, "is_mount", lambda path: path == folder)
    with pytest.raises(ValueError, match=f"holds an earlier run, which would be moved aside, and is {why}"):
        check_aside(config)


def test_without_a_terminal_the_progress_is_plain_lines(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(run, "SECONDS_A_LINE", 0.0)
    with RunRecord(config_of(tmp_path)) as record:
        for step in range(1, 4):
            take(record, step)
    lines = capsys.readouterr().err.split("\n")
    assert not any("\r" in line for line in lines)
    assert [line.partition("[")[0] for line in lines if "reward" in line][-1].split() == ["unified:", "75%", "3/4"]
    assert len([line for line in lines if "reward" in line]) == 4  # The last one again, at the end.
