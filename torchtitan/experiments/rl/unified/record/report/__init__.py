# All rights reserved.
#
# This source code is licensed under the BSD-style license found in the
# LICENSE file in the root directory of this source tree.

"""A run's report: one HTML file with charts, samples and settings that opens anywhere, without a network.

It is made from the run's files alone, so it can be made again at any time:

    python -m torchtitan.experiments.rl.unified.record.report outputs/debug_cpu

Its size is bounded whatever the run's: long series are cut to MAX_POINTS, samples to MAX_SAMPLES and
MAX_SAMPLE_CHARACTERS.
"""

import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import jinja2
import tomli
from markupsafe import Markup
from torchtitan.experiments.rl.unified.record import jsonl

MAX_POINTS = 500
MAX_SAMPLES = 600
MAX_SAMPLE_CHARACTERS = 2_000_000

# A chart's title, its kind (report.js), its metrics with their names in the legend. What a run has not measured is
# left out; "prefix*" takes every metric that starts so. A metric that is in no chart gets one of its own at the end.
CHARTS: list[tuple[str, str, dict[str, str]]] = [
    ("Reward", "line", {"reward_mean": "mean reward"}),
    ("Held-out pass rate", "line", {"eval_pass@*": ""}),
    ("Loss", "line", {"loss": "policy loss"}),
    ("KL divergence", "line", {"kl_generator_trainer": "generator, trainer", "kl_reference": "trainer, reference"}),
    ("Entropy", "line", {"entropy": "nats a token"}),
    ("Gradient norm", "line", {"grad_norm": "before clipping"}),
    ("Completion length", "line", {"completion_tokens_mean": "mean tokens", "completion_tokens_max": "longest"}),
    (
        "Fractions",
        "line",
        {
            "truncated_fraction": "truncated completions",
            "clip_fraction": "clipped tokens",
            "tis_truncated_fraction": "cut importance weights",
            "groups_without_signal": "groups of equal rewards",
            "weights_changed": "weights an update changed",
        },
    ),
    # Two timelines, side by side: the trainer waits for its batch while the generators sample it.
    (
        "Trainer, seconds a step",
        "stack",
        {f"seconds_{name}": name for name in ("wait", "reward", "train", "sync", "evaluate", "save")},
    ),
    (
        "Generators, seconds a step",
        "stack",
        {f"seconds_{name}": name for name in ("generate", "update")} | {"seconds_*": ""},
    ),
    (
        "Parity",
        "area",
        {
            "tokens_sampled": "tokens sampled",
            "tokens_compared": "tokens compared",
            "mismatched_tokens": "with other bits",
        },
    ),
    ("Rewards that took too long", "line", {"reward_timeouts": "samples that got 0"}),
    ("Staleness", "line", {"staleness_max": "oldest, in versions"}),
    (
        "Stale tokens",
        "line",
        {
            "stale_tokens": "tokens",
            "left_out_tokens": "outside the current top-k or top-p",
            "tokens_unverifiable": "whose weights are gone",
        },
    ),
    ("Throughput", "line", {"tokens_per_second": "sampled tokens a second"}),
]
NOT_DRAWN = {"step", "policy_version", "version_min", "seconds"}


def write_report(folder: Path, ending: str = "") -> Path:
    """Writes `report.html` into a run's folder, from the files there; returns its path.

    Args:
        folder: holds metrics.jsonl, and where the run wrote them samples.jsonl, config.toml and provenance.json.
        ending: how the run ended if it did not end well, e.g. "failed: ..." (the step it came to is known).
    """
    path = folder / "report.html"
    draft = path.with_suffix(".tmp")
    # A lone surrogate, which JSON can carry and UTF-8 cannot, stays the escape that it was.
    draft.write_bytes(render(folder, ending).encode("utf-8", "backslashreplace"))
    draft.rename(path)
    return path


def render(folder: Path, ending: str = "") -> str:
    """The report of a run's folder as HTML."""
    metrics = list(jsonl.read(folder / "metrics.jsonl"))
    toml = _text(folder / "config.toml")
    config = tomli.loads(toml)
    provenance = json.loads(_text(folder / "provenance.json") or "{}")
    here = Path(__file__).parent
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(here), autoescape=True, trim_blocks=True, lstrip_blocks=True
    )
    samples, total = pick_samples(folder / "samples.jsonl", [m["step"] for m in metrics])
    return environment.get_template("template.html").render(
        title=config.get("job", {}).get("description") or folder.resolve().name,
        folder=folder.resolve().name,
        status=_status(metrics, config, ending),
        headline=headline(metrics),
        css=Markup((here / "report.css").read_text()),
        js=Markup((here / "report.js").read_text()),
        data=_embedded({"charts": charts(metrics), "samples": samples, "samples_total": total}),
        config=toml,
        starts=provenance.get("starts", []),
        checkpoint=provenance.get("checkpoint", {}),
        mode=config.get("rl", {}).get("mode", ""),
        flavor=" ".join(config.get("model", {}).get(key, "") for key in ("name", "flavor")),
    )


def headline(metrics: list[dict[str, Any]]) -> list[tuple[str, str, str]]:
    """What a run came to, as (name, figure, remark)."""
    if not metrics:
        return []
    first, last = metrics[:10], metrics[-10:]
    found = [("Reward", f"{_mean(first, 'reward_mean'):.3f} \u2192 {_mean(last, 'reward_mean'):.3f}", "")]
    found[0] = (*found[0][:2], f"means of the first and the last {len(first)} steps")
    rows = with_step_0(metrics)
    for key in [key for key in _keys(rows) if key.startswith("eval_pass@")]:
        values = [(row["step"], row[key]) for row in rows if _is_number(row.get(key))]
        ends = [values[0], values[-1]] if len(values) > 1 else values
        remark = "held out, " + (f"steps {ends[0][0]} and {ends[1][0]}" if len(ends) > 1 else f"step {ends[0][0]}")
        found.append((_name(key), " \u2192 ".join(f"{value:.3f}" for _, value in ends), remark))
    names = ("mismatched_tokens", "tokens_compared", "tokens_sampled")
    mismatched, compared, sampled = (sum(m.get(name, 0) for m in metrics) for name in names)
    remark = f"sampled tokens differ between generator and trainer, compared {compared:,} of {sampled:,}"
    found.append(("Parity", f"{mismatched:,}", remark if compared else "no tokens were compared"))
    seconds = sum(m.get("seconds", 0.0) for m in metrics)
    found.append(("Steps", f"{metrics[-1]['step']:,}", f"{_duration(seconds)}, {seconds / len(metrics):.2f} s a step"))
    if any("tokens_per_second" in m for m in metrics):
        found.append(("Throughput", f"{_mean(metrics, 'tokens_per_second'):,.0f}", "sampled tokens a second, mean"))
    return found


def charts(metrics: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """The charts that `metrics` has figures for, as report.js reads them."""
    metrics = with_step_0(metrics)
    left, found = [key for key in _keys(metrics) if key not in NOT_DRAWN], []
    for title, kind, wanted in CHARTS:
        series = []
        for pattern, name in wanted.items():
            matching = [key for key in left if key == pattern or (pattern[-1] == "*" and key.startswith(pattern[:-1]))]
            series += [(key, name or _name(key)) for key in matching]
            left = [key for key in left if key not in matching]
        if series:
            found.append(_chart(title, kind, series, metrics))
    found += [_chart(_name(key), "line", [(key, _name(key))], metrics) | {"more": True} for key in left]
    return found


def with_step_0(metrics: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """The rows, after one for step 0 if the policy was evaluated before training (`eval_before_*` of the first)."""
    prefix = "eval_before_"
    before = {"eval_" + key.removeprefix(prefix): m[key] for m in metrics[:1] for key in m if key.startswith(prefix)}
    rows = [{key: value for key, value in m.items() if not key.startswith(prefix)} for m in metrics]
    return [{"step": 0, **before}, *rows] if before else rows


def thin(steps: list[int], values: list[float | None], kind: str, points: int = MAX_POINTS) -> dict[str, list[Any]]:
    """A series of at most `points` points; a longer one is cut into runs of steps, each one point.

    Returns:
        "steps" (the last of each run) and "values": the mean of a run, its sum for `kind` "area" (counts). A cut line
        has "low" and "high", too: the least and the largest of each run.
    """
    if len(steps) <= points:
        return {"steps": steps, "values": [_rounded(v) for v in values]}
    size = -(-len(steps) // points)
    runs = [[v for v in values[i : i + size] if v is not None] for i in range(0, len(values), size)]
    total = sum if kind == "area" else lambda run: sum(run) / len(run)
    cut = {
        "steps": [steps[min(i + size, len(steps)) - 1] for i in range(0, len(steps), size)],
        "values": [_rounded(total(run)) if run else None for run in runs],
    }
    if kind == "line":
        cut |= {name: [_rounded(f(r)) if r else None for r in runs] for name, f in (("low", min), ("high", max))}
    return cut


def pick_samples(path: Path, steps: list[int]) -> tuple[list[dict[str, Any]], int]:
    """Samples of evenly spread steps, the first and the last among them, and how many the file holds.

    Args:
        path: samples.jsonl; it is read line by line.
        steps: of the run.
    """
    total = sum(1 for _ in jsonl.read(path))
    if not total or not steps:
        return [], total
    each = -(-total // len(steps))
    count = max(1, MAX_SAMPLES // each)
    if count < len(steps):
        steps = [steps[round(i * (len(steps) - 1) / max(1, count - 1))] for i in range(count)]
    wanted = set(steps)
    samples = [row for row in jsonl.read(path) if row["step"] in wanted][:MAX_SAMPLES]
    limit = max(200, MAX_SAMPLE_CHARACTERS // (2 * max(1, len(samples))))
    for sample in samples:
        for key in ("prompt", "completion"):
            sample[key] = _excerpt(str(sample.get(key, "")), limit)
        sample.pop("prompt_ids", None)
    return samples, total


def _chart(title: str, kind: str, series: list[tuple[str, str]], metrics: list[dict[str, Any]]) -> dict[str, Any]:
    metrics = [m for m in metrics if any(_is_number(m.get(key)) for key, _ in series)]
    steps = [m["step"] for m in metrics]
    drawn = []
    for key, name in series:
        values = [m.get(key) for m in metrics]
        drawn.append({"key": key, "name": name, **thin(steps, [v if _is_number(v) else None for v in values], kind)})
    return {"title": title, "kind": kind, "series": drawn}


def _keys(metrics: list[dict[str, Any]]) -> list[str]:
    """Names of all numeric metrics, in the order of their first appearance."""
    return list(dict.fromkeys(key for m in metrics for key, value in m.items() if _is_number(value)))


def _is_number(value: Any) -> bool:
    # JSON as Python writes it has NaN and Infinity.
    return isinstance(value, (int, float)) and abs(value) < float("inf")


def _rounded(value: float | None) -> float | None:
    return value if value is None or isinstance(value, int) else float(f"{value:.6g}")


def _mean(rows: list[dict[str, Any]], key: str) -> float:
    values = [row[key] for row in rows if _is_number(row.get(key))]
    return sum(values) / max(1, len(values))


def _name(key: str) -> str:
    return key.removeprefix("seconds_").removeprefix("eval_" if "@" in key else "").replace("_", " ")


def _duration(seconds: float) -> str:
    minutes, seconds = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours} h {minutes} min" if hours else f"{minutes} min {seconds} s" if minutes else f"{seconds} s"


def _status(metrics: list[dict[str, Any]], config: dict[str, Any], ending: str) -> str:
    taken, wanted = metrics[-1]["step"] if metrics else 0, config.get("training", {}).get("steps")
    stands = f"step {taken} of {wanted}" if wanted else f"step {taken}"
    if ending:
        return f"{ending} (after {stands})"
    return f"finished, {taken} steps" if taken == wanted else f"stopped after {stands}"


def _excerpt(text: str, limit: int) -> str:
    if len(text) <= limit:
        return text
    return f"{text[: limit // 2]}\n[... {len(text) - limit} characters left out ...]\n{text[-limit // 2 :]}"


def _embedded(data: dict[str, Any]) -> Markup:
    """JSON that no text inside it can end or open an element of the page with."""
    text = json.dumps(data, ensure_ascii=False, allow_nan=False, separators=(",", ":"))
    for character in "<>&\u2028\u2029":
        text = text.replace(character, f"\\u{ord(character):04x}")
    return Markup(text)


def _text(path: Path) -> str:
    return path.read_text() if path.exists() else ""


def main(folders: Iterable[str]) -> None:
    """Writes the report of each folder and prints its path."""
    for folder in folders:
        if not (Path(folder) / "metrics.jsonl").exists():
            raise SystemExit(f"error: {folder} holds no metrics.jsonl: give the folder of a run")
        print(write_report(Path(folder)))
