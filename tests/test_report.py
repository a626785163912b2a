# All rights reserved.
#
# This source code is licensed under the BSD-style license found in the
# LICENSE file in the root directory of this source tree.

"""A run's report, made from files and looked at in a browser."""

import json
import math
import re
import shutil
import socket
import subprocess
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import tomli_w
from torchtitan.experiments.rl.unified.record.report import (
    charts,
    headline,
    MAX_POINTS,
    pick_samples,
    render,
    thin,
    write_report,
)

HOSTILE = "</script><img src=x onerror=\"document.title='owned'\"><!-- \u2028 & \ud83d"


def row(step: int) -> dict[str, Any]:
    return {
        "step": step,
        "policy_version": step,
        "reward_mean": 0.5 + 0.3 * math.sin(step / 9),
        "loss": -0.1 / step,
        "grad_norm": 1 + 1 / step,
        "tokens_sampled": 1200,
        "tokens_compared": 1000,
        "mismatched_tokens": 0,
        "kl_generator_trainer": 0.0,
        "entropy": 2.0,
        "completion_tokens_mean": 20.0,
        "completion_tokens_max": 64,
        "truncated_fraction": 0.1,
        "staleness_max": 1,
        "tokens_per_second": 4321.0,
        "seconds": 1.5,
        "seconds_generate": 0.7,
        "seconds_train": 0.6,
        "seconds_sync": 0.2,
        "home_made": float(step),
        **({"eval_pass@1": 0.4 + step / 200} if step % 10 == 0 else {}),
        **({"eval_before_pass@1": 0.35} if step == 1 else {}),
    }


def sample(step: int, kind: str = "best", completion: str = "It is #### 4") -> dict[str, Any]:
    return {
        "step": step,
        "kind": kind,
        "prompt_uid": f"epoch 0 row {step}",
        "prompt": f"What is 2 + 2? ({step})",
        "answer": "#### 4",
        "completion": completion,
        "completion_tokens": 12,
        "finish_reason": "stop",
        "reward": 1.0,
        "reward_parts": {"gsm8k": 1.0},
        "advantage": 0.5,
        "policy_version": step - 1,
    }


def make_run(folder: Path, steps: int = 60, samples: list[dict[str, Any]] | None = None) -> Path:
    """A folder as a run leaves it, with hostile text wherever text comes from outside."""
    samples = samples or [
        sample(step, kind, HOSTILE if kind == "worst" else f"answer of {step}")
        for step in range(1, steps + 1)
        for kind in ("best", "worst", "truncated")
    ]
    folder.mkdir(exist_ok=True)
    (folder / "metrics.jsonl").write_text("".join(json.dumps(row(step)) + "\n" for step in range(1, steps + 1)))
    (folder / "samples.jsonl").write_text("".join(json.dumps(s) + "\n" for s in samples))
    config = {"job": {"description": "<b>" + HOSTILE[:-1]}, "training": {"steps": steps}}
    (folder / "config.toml").write_text(tomli_w.dumps(config))
    start = {"first_step": 0, "versions": {"torch": "2"}, "machine": {"cpu": "x", "cpu_flags": ["a", "b"]}}
    start |= {"threads": {"torch": 1}, "seeds": {"debug.seed": 42}}
    (folder / "provenance.json").write_text(json.dumps({"checkpoint": {"model": "00"}, "starts": [start]}))
    return folder


def test_text_of_a_run_cannot_become_markup(tmp_path):
    page = write_report(make_run(tmp_path)).read_text()
    assert page.count("</script>") == 2, "the page's own two"
    assert "<img" not in page and "<b>" not in page and "<!--" not in page.lower().replace("<!doctype", "")


def test_what_was_not_measured_is_left_out_and_what_is_unknown_gets_a_chart():
    titles = [chart["title"] for chart in charts([row(2), row(3)])]
    assert "Reward" in titles and "Held-out pass rate" not in titles
    assert [chart["title"] for chart in charts([row(1)]) if chart.get("more")] == ["home made"]
    assert [chart["title"] for chart in charts([{"step": 1, "reward_mean": math.nan, "loss": 1.0}])] == ["Loss"]
    assert charts([]) == [] and headline([]) == []


def test_the_headline_counts_every_step():
    rows = [row(step) | {"mismatched_tokens": int(step == 7)} for step in range(1, 21)]
    figures = {name: (figure, remark) for name, figure, remark in headline(rows)}
    assert figures["Parity"] == (
        "1",
        "sampled tokens differ between generator and trainer, compared 20,000 of 24,000",
    )
    assert figures["pass@1"] == ("0.350 \u2192 0.500", "held out, steps 0 and 20")
    (evaluation,) = [chart for chart in charts(rows) if chart["title"] == "Held-out pass rate"]
    assert (evaluation["series"][0]["steps"], evaluation["series"][0]["values"]) == ([0, 10, 20], [0.35, 0.45, 0.5])
    assert figures["Steps"] == ("20", "30 s, 1.50 s a step")


def test_a_long_series_is_cut_without_losing_counts_or_extremes():
    steps = list(range(1, 10_001))
    spike = [0.0] * 4_000 + [9.0] + [0.0] * 5_999
    line, area = (thin(steps, spike, kind) for kind in ("line", "area"))
    assert len(line["steps"]) == len(line["values"]) <= MAX_POINTS
    assert max(line["high"]) == 9 and max(line["values"]) < 1 and line["steps"][-1] == 10_000
    assert sum(area["values"]) == 9
    assert thin([1, 2], [None, 0.1 + 0.2], "line") == {"steps": [1, 2], "values": [None, 0.3]}


def test_a_big_run_gives_a_small_report(tmp_path):
    """10,000 steps; samples of 20 kB."""
    samples = [sample(step, completion="x" * 20_000) for step in range(1, 10_001, 5)]
    make_run(tmp_path, 10_000, samples)
    assert len(render(tmp_path)) < 5_000_000
    picked, total = pick_samples(tmp_path / "samples.jsonl", [s["step"] for s in samples])
    assert total == 2_000 and 100 < len(picked) <= 600
    assert (picked[0]["step"], picked[-1]["step"]) == (1, 9_996)
    assert "characters left out" in picked[0]["completion"]


@pytest.mark.parametrize(
    ("ending", "taken", "says"),
    [
        ("", 60, "finished, 60 steps"),
        ("", 7, "stopped after step 7 of 60"),
        ("failed: <lost>", 7, "failed: &lt;lost&gt; (after step 7 of 60)"),
    ],
)
def test_the_report_says_how_the_run_ended(tmp_path, ending, taken, says):
    make_run(tmp_path, taken)
    (tmp_path / "config.toml").write_text("[training]\nsteps = 60\n")
    assert says in render(tmp_path, ending)


def test_the_record_of_an_earlier_version_is_enough(tmp_path):
    (tmp_path / "metrics.jsonl").write_text('{"step": 1, "reward_mean": 0.5, "loss": 1.0}\n{"step": 2, "rew')
    (tmp_path / "samples.jsonl").write_text('{"step": 1, "prompt_ids": [1], "completion": "x", "reward": 1.0}\n')
    assert "step 1" in render(tmp_path)


class Browser:
    """Headless Chromium, driven through ChromeDriver (the W3C's WebDriver protocol)."""

    def __init__(self, folder: Path) -> None:
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
        log = open(folder / "chromedriver.log", "w")
        self.driver = subprocess.Popen(["chromedriver", f"--port={port}"], stdout=log, stderr=log)
        self.url = f"http://127.0.0.1:{port}"
        # Without these Chromium looks for updates and for its maker's hosts.
        flags = "--headless --no-sandbox --disable-gpu --disable-quic --no-first-run --disable-background-networking"
        flags += f" --disable-component-update --disable-sync --user-data-dir={folder / 'profile'}"
        options = {"args": flags.split(), "perfLoggingPrefs": {"enableNetwork": True}}
        logs = {"browser": "ALL", "performance": "ALL"}
        capabilities = {"browserName": "chrome", "goog:chromeOptions": options, "goog:loggingPrefs": logs}
        deadline = time.monotonic() + 60
        while True:
            try:
                session = self._post("/session", {"capabilities": {"alwaysMatch": capabilities}})
                break
            except urllib.error.URLError:
                if time.monotonic() > deadline or self.driver.poll() is not None:
                    self.driver.kill()
                    raise
                time.sleep(0.1)
        self.url += f"/session/{session['sessionId']}"

    def open(self, page: Path, width: int, dark: bool = False) -> None:
        self.devtools("Emulation.setDeviceMetricsOverride", width=width, height=900, deviceScaleFactor=1, mobile=False)
        scheme = {"name": "prefers-color-scheme", "value": "dark" if dark else "light"}
        self.devtools("Emulation.setEmulatedMedia", features=[scheme])
        self._post("/url", {"url": page.as_uri()})

    def run(self, script: str) -> Any:
        return self._post("/execute/sync", {"script": script, "args": []})

    def devtools(self, command: str, **params: Any) -> Any:
        return self._post("/goog/cdp/execute", {"cmd": command, "params": params})

    def logs(self, kind: str) -> list[dict[str, Any]]:
        return self._post("/se/log", {"type": kind})

    def requests(self, page: Path) -> list[str]:
        """URLs that `page` asked for since the last call (the browser's own start page asks for many)."""
        events = [json.loads(entry["message"])["message"] for entry in self.logs("performance")]
        sent = [event["params"] for event in events if event["method"] == "Network.requestWillBeSent"]
        return [params["request"]["url"] for params in sent if params["documentURL"] == page.as_uri()]

    def close(self) -> None:
        try:
            urllib.request.urlopen(urllib.request.Request(self.url, method="DELETE"), timeout=60)
        finally:
            self.driver.kill()
            self.driver.wait()

    def _post(self, path: str, body: dict[str, Any]) -> Any:
        request = urllib.request.Request(
            self.url + path, json.dumps(body).encode(), {"Content-Type": "application/json"}
        )
        with urllib.request.urlopen(request, timeout=120) as answer:
            return json.load(answer)["value"]


@pytest.fixture(scope="module")
def browser(tmp_path_factory) -> Iterator[Browser]:
    if not shutil.which("chromedriver"):
        pytest.skip("no chromedriver here; on Debian and Ubuntu: apt-get install chromium chromium-driver")
    browser = Browser(tmp_path_factory.mktemp("browser"))
    yield browser
    browser.close()


@pytest.mark.slow
@pytest.mark.parametrize(("width", "dark"), [(1280, False), (390, True)])
def test_the_report_opens_in_a_browser(browser, tmp_path, width, dark):
    """Proves that the page is whole by itself: no request, no console error, no sideways scrolling, charts drawn."""
    page = write_report(make_run(tmp_path))
    browser.open(page, width, dark)
    assert set(browser.requests(page)) - {"data:,"} == {page.as_uri()}
    assert browser.logs("browser") == []
    assert browser.run("return innerWidth") == width
    assert browser.run("return document.documentElement.scrollWidth") <= width
    wider = (
        "return [...document.querySelectorAll('main *')].filter(e => e.getBoundingClientRect().right > innerWidth + 1"
    )
    wider += " && !e.closest('pre')).map(e => e.outerHTML.slice(0, 200))"
    assert browser.run(wider) == []
    expected = len(charts([row(step) for step in range(1, 61)]))
    assert browser.run("return document.querySelectorAll('.chart svg path').length") >= expected
    assert browser.run("return document.title.toWellFormed()").startswith("<b></script><img")
    assert not re.search("NaN|undefined|Infinity", browser.run("return document.body.innerText.toWellFormed()"))


@pytest.mark.slow
def test_samples_are_searched_and_filtered_in_the_page(browser, tmp_path):
    """Proves the list of samples: search, kind, order, and hostile text shown as text."""
    browser.open(write_report(make_run(tmp_path)), 1280)

    def choose(identifier: str, value: str) -> list[str]:
        browser.run(
            f"const e = document.getElementById('{identifier}'); e.value = {json.dumps(value)};"
            "e.dispatchEvent(new Event('input'))"
        )
        return browser.run("return [...document.querySelectorAll('.sample')].map(e => e.innerText.toWellFormed())")

    assert len(choose("kind", "worst")) == 30
    assert browser.run("return document.getElementById('count').textContent") == "60 of 180"
    assert all("</script><img src=x" in text for text in choose("order", "-step"))
    assert "What is 2 + 2? (60)" in choose("kind", "best")[0]
    assert len(choose("search", "ANSWER OF 17")) == 1
    browser.run("document.getElementById('search').value = ''; document.getElementById('more-rows').click()")
    assert browser.run("return document.querySelectorAll('.sample').length") == 60
    hover = "const svg = document.querySelector('.chart svg'), box = svg.getBoundingClientRect();"
    hover += "svg.dispatchEvent(new PointerEvent('pointermove', {clientX: box.left + 46, clientY: box.top + 9}));"
    assert "step 1\n" in browser.run(hover + "return document.querySelector('.legend').innerText")
    assert browser.logs("browser") == []
