// All rights reserved.
//
// This source code is licensed under the BSD-style license found in the
// LICENSE file in the root directory of this source tree.

// Charts and the list of samples. Text from the run reaches the page through textContent alone.
"use strict";
const data = JSON.parse(document.getElementById("data").textContent);
const HEIGHT = 190, LEFT = 46, RIGHT = 10, TOP = 8, BOTTOM = 22;
const SMOOTH_FROM = 40;

function element(tag, attributes = {}, text = "") {
  const made = document.createElement(tag);
  for (const [name, value] of Object.entries(attributes)) made.setAttribute(name, value);
  made.textContent = text;
  return made;
}

function shape(parent, tag, attributes, text = "") {
  const made = document.createElementNS("http://www.w3.org/2000/svg", tag);
  for (const [name, value] of Object.entries(attributes)) made.setAttribute(name, value);
  made.textContent = text;
  return parent.appendChild(made);
}

function short(value) {
  if (value === null || value === undefined) return "-";
  const size = Math.abs(value);
  if (size !== 0 && size < 0.001) return value.toExponential(1);
  if (size >= 1e6) return (value / 1e6).toFixed(1) + "M";
  if (size >= 1e4) return (value / 1e3).toFixed(0) + "k";
  return String(Number(value.toPrecision(4)));
}

// Round numbers that span [low, high].
function ticks(low, high, count, whole = false) {
  const rough = (high - low) / count || 1;
  const power = 10 ** Math.floor(Math.log10(rough));
  let step = [1, 2, 5, 10].map((m) => m * power).find((s) => s >= rough * 0.999);
  if (whole) step = Math.max(1, Math.round(step));
  const found = [];
  for (let i = Math.ceil(low / step - 1e-9); i * step <= high + step * 1e-9; i++) found.push(i * step);
  return found;
}

// Mean over a window around each point.
function smooth(values, half) {
  return values.map((value, i) => {
    const near = values.slice(Math.max(0, i - half), i + half + 1).filter((v) => v !== null);
    return value === null || !near.length ? null : near.reduce((a, b) => a + b) / near.length;
  });
}

function path(points) {
  return points.map(([x, y], i) => `${i ? "L" : "M"}${x.toFixed(1)} ${y.toFixed(1)}`).join("");
}

function color(chart, index) {
  if (chart.series[index].key === "mismatched_tokens") return "var(--bad)";
  return chart.kind === "area" ? "var(--s2)" : `var(--s${Math.min(index, 6)})`;
}

function drawChart(chart, parent) {
  const box = parent.appendChild(element("div", { class: "chart" }));
  box.appendChild(element("h3", {}, chart.title));
  const legend = box.appendChild(element("div", { class: "legend" }));
  const svg = shape(box, "svg", { height: HEIGHT, tabindex: 0, role: "img", "aria-label": chart.title });
  const steps = chart.series[0].steps;
  const stacked = chart.kind === "stack";
  const tops = [];  // upper edge of each layer of a stack
  chart.series.forEach((s, i) =>
    tops.push(s.values.map((v, k) => (v || 0) + (i && stacked ? tops[i - 1][k] : 0))));
  const extremes = stacked ? tops : chart.series.flatMap((s) => [s.values, s.low || [], s.high || []]);
  const known = extremes.flat().filter((v) => v !== null);
  let low = Math.min(...known), high = Math.max(...known);
  // Quantities that cannot be negative start at zero; a flat line gets some room.
  if (low >= 0) low = 0;
  if (low === high) [low, high] = low === 0 ? [0, 1] : [Math.min(low - Math.abs(low) / 2, 0), high + Math.abs(high) / 2];
  high += (high - low) * 0.05;
  // A slow first step would flatten all the others.
  const totals = stacked ? [...tops[tops.length - 1]].sort((a, b) => a - b) : [];
  const usual = totals[Math.floor(totals.length * 0.9)] * 1.5;
  const cut = totals.length >= 10 && high > 2 * usual;
  if (cut) high = usual;
  const smoothed = chart.kind === "line" && chart.series.length === 1 && chart.series[0].values.filter((v) => v !== null).length >= SMOOTH_FROM;
  let cursor = null, at = -1, x, y;

  function label(index) {
    legend.textContent = "";
    legend.appendChild(element("span", {}, index < 0 ? "last" : `step ${steps[index]}`));
    chart.series.forEach((s, i) => {
      const item = legend.appendChild(element("span"));
      item.appendChild(element("i", { style: `background:${color(chart, i)}` }));
      item.append(s.name + " ");
      const last = s.values.reduce((found, v) => (v === null ? found : v), null);
      item.appendChild(element("b", {}, short(index < 0 ? last : s.values[index])));
    });
    if (cut) legend.appendChild(element("span", {}, `highest ${short(totals[totals.length - 1])}, cut off`));
  }

  function point(index) {
    at = Math.max(0, Math.min(steps.length - 1, index));
    cursor.setAttribute("x1", x(steps[at]));
    cursor.setAttribute("x2", x(steps[at]));
    cursor.setAttribute("visibility", "visible");
    label(at);
  }

  function leave() {
    at = -1;
    cursor.setAttribute("visibility", "hidden");
    label(-1);
  }

  function draw() {
    const width = svg.clientWidth || 360;
    svg.textContent = "";
    svg.setAttribute("viewBox", `0 0 ${width} ${HEIGHT}`);
    const first = steps[0], span = Math.max(1, steps[steps.length - 1] - first);
    x = (step) => LEFT + ((step - first) / span) * (width - LEFT - RIGHT);
    y = (value) => TOP + (1 - (Math.min(value, high) - low) / (high - low)) * (HEIGHT - TOP - BOTTOM);
    shape(svg, "text", { x: LEFT - 6, y: HEIGHT - 6, "text-anchor": "end" }, "step");
    for (const tick of ticks(low, high, 4)) {
      shape(svg, "line", { x1: LEFT, x2: width - RIGHT, y1: y(tick), y2: y(tick), class: tick === 0 ? "axis" : "gridline" });
      shape(svg, "text", { x: LEFT - 6, y: y(tick) + 4, "text-anchor": "end" }, short(tick));
    }
    for (const tick of ticks(first, first + span, Math.max(2, width / 90), true)) {
      if (tick < first || tick > steps[steps.length - 1]) continue;
      shape(svg, "text", { x: x(tick), y: HEIGHT - 6, "text-anchor": "middle" }, short(tick));
    }
    chart.series.forEach((s, i) => {
      const paint = color(chart, i);
      if (stacked || chart.kind === "area") {
        const upper = steps.map((step, k) => [x(step), y(tops[i][k])]);
        const lower = steps.map((step, k) => [x(step), y(i && stacked ? tops[i - 1][k] : 0)]).reverse();
        shape(svg, "path", { d: path([...upper, ...lower]) + "Z", fill: paint, "fill-opacity": stacked ? 0.85 : 0.35 });
        if (!stacked) shape(svg, "path", { d: path(upper), fill: "none", stroke: paint, "stroke-width": 1.5 });
        return;
      }
      const line = (values) => path(steps.map((step, k) => [step, values[k]]).filter((p) => p[1] !== null).map(([a, b]) => [x(a), y(b)]));
      if (s.low) {
        const edge = (values) => steps.map((step, k) => [step, values[k]]).filter((p) => p[1] !== null).map(([a, b]) => [x(a), y(b)]);
        shape(svg, "path", { d: path([...edge(s.high), ...edge(s.low).reverse()]) + "Z", fill: paint, "fill-opacity": 0.18 });
      }
      shape(svg, "path", { d: line(s.values), fill: "none", stroke: paint, "stroke-width": smoothed ? 1 : 1.75, "stroke-opacity": smoothed ? 0.4 : 1 });
      if (smoothed) {
        const half = Math.max(2, Math.round(s.values.length / 40));
        shape(svg, "path", { d: line(smooth(s.values, half)), fill: "none", stroke: paint, "stroke-width": 2 });
      }
      const sparse = s.values.filter((v) => v !== null).length <= 24;
      if (sparse) s.values.forEach((v, k) => v !== null && shape(svg, "circle", { cx: x(steps[k]), cy: y(v), r: 2.5, fill: paint }));
    });
    cursor = shape(svg, "line", { y1: TOP, y2: HEIGHT - BOTTOM, class: "cursor" });
    if (at < 0) leave();
    else point(at);
  }

  function nearest(event) {
    const where = event.clientX - svg.getBoundingClientRect().left;
    let best = 0;
    steps.forEach((step, i) => {
      if (Math.abs(x(step) - where) < Math.abs(x(steps[best]) - where)) best = i;
    });
    point(best);
  }
  svg.addEventListener("pointermove", nearest);
  svg.addEventListener("pointerdown", nearest);
  svg.addEventListener("pointerleave", leave);
  svg.addEventListener("blur", leave);
  svg.addEventListener("keydown", (event) => {
    const move = { ArrowLeft: -1, ArrowRight: 1 }[event.key];
    if (move) point((at < 0 ? steps.length - 1 : at) + move);
  });
  new ResizeObserver(draw).observe(svg);
}

function drawCharts() {
  for (const chart of data.charts)
    drawChart(chart, document.getElementById(chart.more ? "more-charts" : "charts"));
  document.getElementById("more").hidden = !data.charts.some((chart) => chart.more);
  const longest = Math.max(0, ...data.charts.map((chart) => chart.series[0].values.length));
  const notes = [];
  if (longest >= SMOOTH_FROM) notes.push("Thin line: each point; thick line: running mean.");
  if (data.charts.some((chart) => chart.series[0].low)) notes.push("Each point is the mean of several steps (parity: the sum), the band spans the least to the largest.");
  if (longest) notes.push("Touch a chart, or use the arrow keys in it, to read values.");
  document.getElementById("chart-note").textContent = notes.join(" ");
}

const PAGE = 30;
let shown = PAGE;

function card(sample) {
  const box = element("article", { class: "sample" });
  const list = box.appendChild(element("dl"));
  if (sample.kind) list.appendChild(element("span", { class: `tag ${sample.kind}` }, sample.kind));
  const facts = [["step", sample.step], ["reward", short(sample.reward)]];
  for (const [name, value] of Object.entries(sample.reward_parts || {})) facts.push([name, short(value)]);
  facts.push(["advantage", short(sample.advantage)], ["tokens", sample.completion_tokens], ["ended by", sample.finish_reason]);
  facts.push(["prompt", sample.prompt_uid], ["version", sample.policy_version]);
  for (const [name, value] of facts) {
    if (value === undefined || value === "-") continue;
    const row = list.appendChild(element("div"));
    row.appendChild(element("dt", {}, name));
    row.appendChild(element("dd", {}, String(value)));
  }
  for (const [name, text] of [["Prompt", sample.prompt], ["Completion", sample.completion]]) {
    const cell = box.appendChild(element("div", { class: "text", tabindex: 0 }));
    cell.appendChild(element("b", {}, name));
    cell.append(text);
    if (name === "Prompt" && sample.answer) {
      cell.appendChild(element("b", {}, "Reference answer"));
      cell.append(sample.answer);
    }
  }
  return box;
}

function drawSamples() {
  const value = (id) => document.getElementById(id).value;
  const words = value("search").toLowerCase(), kind = value("kind"), order = value("order");
  const key = order.replace("-", ""), sign = order.startsWith("-") ? -1 : 1;
  const found = data.samples
    .filter((s) => (!kind || s.kind === kind) && (!words || `${s.prompt}\n${s.completion}\n${s.prompt_uid}`.toLowerCase().includes(words)))
    .sort((a, b) => sign * (a[key] - b[key]));
  document.getElementById("rows").replaceChildren(...found.slice(0, shown).map(card));
  document.getElementById("more-rows").hidden = found.length <= shown;
  const of = data.samples.length < data.samples_total ? `${data.samples.length} here, ${data.samples_total} in samples.jsonl` : data.samples.length;
  document.getElementById("count").textContent = `${found.length} of ${of}`;
}

for (const id of ["search", "kind", "order"])
  document.getElementById(id).addEventListener("input", () => { shown = PAGE; drawSamples(); });
document.getElementById("more-rows").addEventListener("click", () => { shown += PAGE; drawSamples(); });
drawCharts();
drawSamples();
