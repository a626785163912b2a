# All rights reserved.
#
# This source code is licensed under the BSD-style license found in the
# LICENSE file in the root directory of this source tree.

"""Why completions end, and what is done with those that were cut off: a real engine."""

import json
import subprocess
import sys
from dataclasses import replace

import pytest
import torch
from torchtitan.experiments.rl.unified.config.checks import contradictions
from torchtitan.experiments.rl.unified.config.load import load_job_config, REPOSITORY
from torchtitan.experiments.rl.unified.messages import Trajectory
from torchtitan.experiments.rl.unified.rollout.task import Task
from transformers import AutoTokenizer

CHECKPOINT = REPOSITORY / "tests/assets/qwen3_tiny"


SAMPLE = """
import dataclasses, json, sys
from torchtitan.experiments.rl.unified.generator.generator import Generator
from torchtitan.experiments.rl.unified.config.environment import prepare_environment
from torchtitan.experiments.rl.unified.config.load import load_job_config
from torchtitan.experiments.rl.unified.rollout.task import Task

prepare_environment()
config = load_job_config(["--model.hf_assets_path", sys.argv[1]])
requests = Task(config).next_requests()
generator = Generator(config)
# The likeliest completion of this one is an EOS: its prompt holds the whole answer.
answered = dataclasses.replace(requests[0], prompt_ids=requests[0].prompt_ids + json.loads(sys.argv[2]))
kinds = {
    "plain": (requests, {}),
    "stop string": (requests, {"stop": [sys.argv[3]]}),
    "cut off": (requests, {"max_tokens": 3}),
    "empty": ([answered], {"temperature": 0.0}),
}
out = {}

def sample(kind, asked, changes):
    sampling = dataclasses.replace(config.sampling, **changes)
    answers = generator.generate([dataclasses.replace(request, sampling=sampling) for request in asked])
    out[kind] = [[t.completion_ids, len(t.logprobs), t.finish_reason, t.text] for t in answers]

for kind, (asked, changes) in kinds.items():
    sample(kind, asked, changes)
# The same model, of which <|im_end|> is no EOS: a special token that is sampled.
config.model.hf_assets_path = sys.argv[4]
generator = Generator(config)
for stop in ([], ["<|im_end|>"], ["never", "1<|im_end|>"]):
    for shown in (False, True):
        sample(f"{stop} {shown}", requests, {"stop": stop, "special_tokens_in_text": shown})
print(json.dumps(out))
"""


@pytest.mark.slow
def test_every_eos_and_stop_string_ends_a_completion_which_keeps_what_was_sampled(tmp_path):
    """Proves that ids, log-probs and text agree for each way to end; a request's settings win over the job's."""
    other = tmp_path / "other"
    for folder in (tmp_path, other):
        folder.mkdir(exist_ok=True)
        for file in CHECKPOINT.iterdir():
            (folder / file.name).write_bytes(file.read_bytes())
    for name, field, value in (
        ("generation_config.json", "eos_token_id", [0]),
        ("tokenizer_config.json", "eos_token", "<|endoftext|>"),
    ):
        settings = json.loads((other / name).read_text(encoding="utf-8")) | {field: value}
        (other / name).write_text(json.dumps(settings), encoding="utf-8")
    tokenizer = AutoTokenizer.from_pretrained(CHECKPOINT)
    # A third EOS that is an ordinary token: the blank between the mark and the number.
    (blank,) = tokenizer.encode(" 1")[:-1]
    end = tokenizer.eos_token_id
    (tmp_path / "generation_config.json").write_text(json.dumps({"eos_token_id": [end, 0, blank]}))
    eos, stop = {end, 0, blank}, "makes\n##"
    answer = tokenizer.encode("That makes\n####")
    args = [str(tmp_path), json.dumps([*answer, blank, *tokenizer.encode("7")]), stop, str(other)]
    done = subprocess.run([sys.executable, "-c", SAMPLE, *args], capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr
    sampled = json.loads(done.stdout.splitlines()[-1])
    of_other = {kind: sampled.pop(kind) for kind in list(sampled) if kind[0] == "["}

    for ids, logprobs, reason, text in sum(sampled.values(), []):
        assert len(ids) == logprobs > 0
        assert not eos & set(ids[:-1]), "nothing is sampled after an EOS"
        assert tokenizer.decode(ids, skip_special_tokens=True).startswith(text)
    plain = sampled["plain"]
    assert {ids[-1] for ids, _, reason, _ in plain if reason == "stop"} >= {blank}
    assert all((ids[-1] in eos) == (reason == "stop") for ids, _, reason, _ in plain)
    assert all(text == tokenizer.decode(ids[:-1]) for ids, _, reason, text in plain if reason == "stop")

    stopped = [s for s in sampled["stop string"] if s[0][-1] not in eos and s[2] == "stop"]
    assert stopped, "the string was never sampled"
    for ids, _, _, text in stopped:
        assert tokenizer.decode(ids).partition(stop)[:2] == (text, stop)
        assert stop not in tokenizer.decode(ids[:-1]), "the last token is the one that completed the string"
    assert all(stop not in text for _, _, _, text in sampled["stop string"])

    assert all((len(ids), reason) == (3, "length") for ids, _, reason, _ in sampled["cut off"] if ids[-1] not in eos)
    assert [(ids, reason, text) for ids, _, reason, text in sampled["empty"]] == [([end], "stop", "")]

    hidden, shown = of_other["[] False"], of_other["[] True"]
    assert [s[:3] for s in hidden] == [s[:3] for s in shown] and any(end in ids[:-1] for ids, *_ in hidden)
    for (ids, _, reason, without), (*_, text) in zip(hidden, shown, strict=True):
        ids = ids[:-1] if reason == "stop" else ids
        assert tokenizer.decode(ids).startswith(text) and tokenizer.decode(ids, skip_special_tokens=True) == without
    for kind in ("['<|im_end|>'] False", "['<|im_end|>'] True"):
        ends = [s for s in of_other[kind] if s[0][-1] == end]
        assert len(ends) > 100 and all((reason, end in ids[:-1]) == ("stop", False) for ids, _, reason, _ in ends)
        assert all(text == tokenizer.decode(ids[:-1]) for ids, _, _, text in ends)
    assert of_other["['never', '1<|im_end|>'] False"] == hidden, "what preflight refuses"
    held = [s for s in of_other["['never', '1<|im_end|>'] True"] if tokenizer.decode(s[0]).endswith("1<|im_end|>")]
    assert held and all(s[2] == "stop" for s in held)
    assert all(text == tokenizer.decode(ids).removesuffix("1<|im_end|>") for ids, _, _, text in held)


def test_zero_reward_is_for_truncated_completions_alone():
    config = load_job_config(["--rl.truncated_completions", "zero_reward", "--rl.prompts_per_step", "1"])
    task = Task(config)
    requests = task.next_requests()
    (answer,) = {p.answer for p in task.prompts.prompts if list(p.prompt_ids) == requests[0].prompt_ids}
    finished = [Trajectory(r, [5], torch.zeros(1), 0, "stop", f"{answer}\n") for r in requests]
    cut_off = replace(finished[0], finish_reason="length")
    rewards = task.score([cut_off, *finished[1:]]).rewards
    assert [r.total for r in rewards] == [0.0] + [1.0] * (len(requests) - 1)
    assert rewards[0].parts == {"gsm8k": 1.0}, "what it would have got stays on record"


def test_what_took_too_long_is_counted_for_its_step():
    flags = ["--reward.weights", "math_verify", "1", "--reward.timeout_seconds", "1", "--rl.prompts_per_step", "1"]
    task = Task(load_job_config(flags))
    finished = [Trajectory(r, [5], torch.zeros(1), 0, "stop", "#### 9^{9^{9}}+x") for r in task.next_requests()]
    quick = [replace(t, text="#### x+1") for t in finished]
    # One question of all eight, as they are equal.
    assert [task.score(batch).timeouts for batch in (quick, finished, quick)] == [0, 1, 0]
    task.close()


def test_zero_reward_keeps_a_penalty():
    config = load_job_config(["--rl.truncated_completions", "zero_reward", "--rl.prompts_per_step", "1"])
    config.reward.weights = {"soft_overlong": 1.0}
    task = Task(config)
    limit = config.sampling.max_tokens
    late = [Trajectory(r, [5] * limit, torch.zeros(limit), 0, "stop", "") for r in task.next_requests()]
    scored = task.score([replace(late[0], finish_reason="length"), *late[1:]])
    assert [r.total for r in scored.rewards] == [-1.0] * len(late)
    assert torch.equal(scored.advantages, torch.zeros(len(late)))


@pytest.mark.parametrize(
    ("flags", "complaint"),
    [
        (["--sampling.temperature", "0.001"], r"sampling.temperature = 0.001, but it must be 0 or at least 0.01"),
        (["--sampling.temperature", "-1"], r"temperature = -1.0, but it must be 0 or"),
        (["--sampling.max_tokens", "0"], r"max_tokens = 0, but it must be at least 1"),
        (["--sampling.top_p", "0"], r"top_p = 0.0, but it must be above 0 and at most 1"),
        (["--sampling.top_k", "-1"], r"top_k = -1, but it must be at least 0"),
    ],
)
def test_settings_that_cannot_be_sampled_with_are_refused(flags, complaint):
    with pytest.raises(ValueError, match=complaint):
        load_job_config(flags)


def test_an_empty_stop_string_is_refused():
    [problem] = contradictions(load_job_config(["--sampling.stop", ""]))
    assert problem.startswith("[sampling] stop has an empty string")
