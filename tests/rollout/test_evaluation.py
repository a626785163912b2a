# All rights reserved.
#
# This source code is licensed under the BSD-style license found in the
# LICENSE file in the root directory of this source tree.

import itertools
import json
from pathlib import Path

import pytest
import torch
from torchtitan.experiments.rl.unified.config.load import load_job_config
from torchtitan.experiments.rl.unified.messages import Request, Trajectory
from torchtitan.experiments.rl.unified.preflight import check
from torchtitan.experiments.rl.unified.rollout.evaluation import Evaluation, pass_at_k
from torchtitan.experiments.rl.unified.rollout.task import Task

TWO_OF_FOUR = ["--evaluation.problems", "2", "--evaluation.samples", "4", "--evaluation.temperature", "0.5"]


def evaluation(*flags: str) -> Evaluation:
    return Evaluation(load_job_config(["--training.steps", "7", "--evaluation.interval", "3", *flags]))


def answered(request: Request, text: str, version: int, reason: str = "stop") -> Trajectory:
    return Trajectory(request, [5] * len(text), torch.zeros(len(text)), version, reason, text)


@pytest.mark.parametrize("k", [1, 2, 3, 5])
def test_pass_at_k_is_the_mean_over_all_subsets(k):
    passed = [True, True, False, False, False]
    subsets = list(itertools.combinations(passed, k))
    assert pass_at_k(5, 2, k) == pytest.approx(sum(map(any, subsets)) / len(subsets), abs=1e-15)


def test_due_before_during_and_after_training():
    assert [version for version in range(8) if evaluation().due(version)] == [0, 3, 6, 7]
    assert not any(Evaluation(load_job_config(["--evaluation.interval", "0"])).due(v) for v in range(100))


def test_requests_are_held_out_problems_with_settings_and_seeds_of_their_own():
    job = load_job_config(["--evaluation.interval", "3", *TWO_OF_FOUR])
    requests = Evaluation(job).requests()
    assert [r.sample for r in requests] == [0, 1, 2, 3] * 2 and len({r.uid for r in requests}) == 2
    assert {r.sampling.temperature for r in requests} == {0.5} and job.sampling.temperature == 1.0
    assert {r.sampling.max_tokens for r in requests} == {job.sampling.max_tokens}
    task = Task(job)
    trained = task.next_requests()
    assert not {r.seed for r in requests} & {r.seed for r in trained} and len({r.seed for r in requests}) == 8
    assert not {tuple(r.prompt_ids) for r in requests} & {tuple(p.prompt_ids) for p in task.prompts.prompts}


def test_every_evaluation_asks_the_same_whatever_the_training_seed():
    ours = evaluation(*TWO_OF_FOUR)
    assert ours.requests() == ours.requests() == evaluation(*TWO_OF_FOUR, "--debug.seed", "7").requests()
    assert evaluation(*TWO_OF_FOUR, "--evaluation.seed", "1").requests() != ours.requests()


def test_score_by_hand():
    ours = evaluation(*TWO_OF_FOUR, "--evaluation.k", "1", "2", "4")
    first, second = (problem.answer for problem in ours.problems)
    texts = [first, "wrong", first, "wrong", "wrong", "wrong", "wrong", second]
    trajectories = [answered(r, text, 3) for r, text in zip(ours.requests(), texts, strict=True)]
    trajectories[1] = answered(trajectories[1].request, "wrong", 3, "length")
    metrics = ours.score(trajectories)
    # 2 of 4 and 1 of 4 pass; pairs without a pass: 1 of 6 and 3 of 6.
    assert metrics["eval_pass@1"] == (2 / 4 + 1 / 4) / 2
    assert metrics["eval_pass@2"] == pytest.approx((5 / 6 + 3 / 6) / 2, abs=1e-15)
    assert metrics["eval_pass@4"] == 1.0
    assert metrics["eval_truncated_fraction"] == 1 / 8
    assert metrics["eval_completion_tokens_mean"] == sum(map(len, texts)) / 8


def test_the_policy_before_training_has_metrics_of_its_own():
    ours = evaluation(*TWO_OF_FOUR)
    before = ours.score([answered(r, "wrong", 0) for r in ours.requests()])
    after = ours.score([answered(r, "wrong", 1) for r in ours.requests()])
    assert {
        name.replace("eval_before_", "eval_") for name in before
    } == after.keys() and not before.keys() & after.keys()


def test_held_out_rows_of_ones_own(tmp_path):
    rows = [{"question": f"What is {n} more than {n}?", "answer": f"#### {2 * n}"} for n in range(5)]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    ours = evaluation("--evaluation.problems", "0", "--evaluation.dataset_path", str(tmp_path / "rows.jsonl"))
    assert sorted(p.row for p in ours.problems) == [0, 1, 2, 3, 4]


def one_file(tmp_path: Path) -> list[str]:
    (tmp_path / "rows.jsonl").write_text('{"question": "1+1?", "answer": "#### 2"}\n')
    return ["--training.dataset", "local", "--training.dataset_path", str(tmp_path / "rows.jsonl")]


def link(path: Path, target: Path) -> Path:
    path.symlink_to(target)
    return path


def no_numbers(tmp_path: Path) -> list[str]:
    (tmp_path / "rows.jsonl").write_text('{"question": "1+1?", "answer": "two"}\n')
    return ["--evaluation.dataset_path", str(tmp_path / "rows.jsonl")]


@pytest.mark.parametrize(
    "flags, complaint",
    [
        (lambda t: ["--evaluation.k", "5"], r"k = \[5\] with samples = 4: pass@k takes at least k samples"),
        (lambda t: ["--evaluation.temperature", "0"], "samples = 4 at temperature 0 would all be the same"),
        (lambda t: ["--evaluation.reward", "gsm9k"], "'gsm9k' does not exist; choose from gsm8k"),
        (one_file, r"\[evaluation\] 1 of its 1 problems are among those that the job trains on \(.*give held-out rows"),
        (
            lambda t: [*one_file(t), "--evaluation.dataset_path", str(link(t / "again.jsonl", t / "rows.jsonl"))],
            "problems are among those that the job trains on",
        ),
        (no_numbers, "rows.jsonl, line 1: the reference answer 'two' has no number"),
    ],
)
def test_bad_settings_are_refused(tmp_path, flags, complaint):
    with pytest.raises(ValueError, match=complaint):
        check(load_job_config(["--evaluation.interval", "3", *TWO_OF_FOUR, *flags(tmp_path)]))


def test_some_problems_that_are_trained_on_and_too_few_of_them_are_warnings(tmp_path):
    rows = [{"question": f"{n}+{n}?", "answer": f"#### {2 * n}"} for n in range(3)]
    for name, part in (("train", rows[:2]), ("test", rows[1:])):
        (tmp_path / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in part))
    flags = ["--training.dataset", "local", "--training.dataset_path", str(tmp_path)]
    job = check(load_job_config([*flags, "--evaluation.problems", "9", f"--job.dump_folder={tmp_path / 'run'}"]))
    job.close()
    assert any("problems = 9: there are only 2" in line for line in job.warnings)
    assert any("1 of its 2 problems are among those that the job trains on" in line for line in job.warnings)
