"use strict";
const data = JSON.parse(document.getElementById("data").textContent);
const COLORS = ["#3b82c4", "#e08214", "#2ca25f", "#c44e8a", "#8a63d2", "#a6761d", "#17a2b8", "#d9534f"];
const hidden = new Set();
let order = { column: null, descending: false };

const byId = (id) => document.getElementById(id);
const color = (i) => COLORS[i % COLORS.length];
const dash = (i) => (i < COLORS.length ? null : "6 3");

function element(name, properties = {}, ...children) {
  const node = Object.assign(document.createElement(name), properties);
  node.append(...children);
  return node;
}

function shape(name, attributes = {}, text = null) {
  const node = document.createElementNS("http://www.w3.org/2000/svg", name);
  for (const [key, value] of Object.entries(attributes)) if (value !== null) node.setAttribute(key, value);
  if (text !== null) node.textContent = text;
  return node;
}

function number(value, digits = 4) {
  return value === null || value === undefined ? "" : value.toFixed(digits);
}

function count(value) {
  return value === null || value === undefined ? "" : Math.round(value).toLocaleString("en");
}

function interval(value, sign = false) {
  if (!value) return "";
  const text = (x) => (sign && x > 0 ? "+" : "") + number(x);
  const limits = value.low === null ? "" : ` [${text(value.low)}, ${text(value.high)}]`;
  return text(value.estimate) + limits;
}

// A dotted key that may be broken after each dot.
const breakable = (key) => key.split(/(?<=\.)/).flatMap((part) => [part, document.createElement("wbr")]);

// A value, its limits and its notes, that may be broken only between them.
const unbroken = (text) => text.split(/ (?=[[(])/).flatMap((part) => [element("span", { className: "together", textContent: part }), " "]).slice(0, -1);

const wrapped = (value) => (String(value).length > 16 ? "wrapped" : "together"); // the class of a cell

// ---------------------------------------------------------------- the table of groups

const mean = (values) => values.reduce((sum, x) => sum + x, 0) / values.length;

// Whether the metrics of group i are of the held-out text (and, for losses, the tokens) of the chosen group.
const comparable = (i) => data.groups[i].scale === data.groups[Number(byId("baseline").value)].scale;

// The mean difference of group i to the chosen one with its interval, paired by seed; without a common seed, the
// difference of the means without limits.
function difference(i) {
  const chosen = Number(byId("baseline").value);
  const [values, others] = [data.groups[i].values, data.groups[chosen].values];
  const present = (group) => Object.values(group);
  if (i === chosen || !comparable(i) || !present(values).length || !present(others).length) return null;
  const seeds = Object.keys(values).filter((seed) => seed in others);
  const pairs = seeds.map((seed) => [values[seed], others[seed]]);
  const used = seeds.length ? pairs.flat() : [...present(values), ...present(others)];
  if (used.includes(null)) return null; // a run that diverged
  if (!seeds.length) return { estimate: mean(present(values)) - mean(present(others)), low: null, high: null };
  const gains = pairs.map(([a, b]) => a - b);
  const [n, estimate] = [gains.length, mean(gains)];
  if (n < 2) return { estimate, low: null, high: null };
  const variance = gains.reduce((sum, x) => sum + (x - estimate) ** 2, 0) / (n - 1);
  const half = data.quantiles[n] * Math.sqrt(variance / n);
  return { estimate, low: estimate - half, high: estimate + half };
}

function seedsText(g) {
  const unfinished = g.runs.filter((run) => !run.done).length;
  return unfinished ? `${g.seeds.length}, ${unfinished} not finished` : String(g.seeds.length);
}

// The best value, with its number of rows if the result is over another number.
const bestText = (g) => number(g.best?.value) + (g.best?.is_of_other_examples ? ` (${g.best.examples})` : "");

function columns() {
  const options = data.options.map((key) => ({
    title: key, key: (g) => g.options[key], text: (g) => String(g.options[key]), style: (g) => wrapped(g.options[key]),
  }));
  const label = { title: "group", key: (g) => g.label, text: (g) => g.label, style: (g) => wrapped(g.label) };
  return [
    ...(options.length ? options : [label]),
    { title: "seeds", key: (g) => g.seeds.length, text: seedsText, number: true },
    { title: data.main_metric.label, key: (g) => g.result?.estimate, text: (g) => interval(g.result), number: true },
    {
      title: "difference", key: (g, i) => difference(i)?.estimate, number: true,
      text: (g, i) => (comparable(i) ? interval(difference(i), true) : "other text or tokens"),
      style: (g, i) => {
        const d = difference(i);
        return !d || d.low === null ? "" : d.high < 0 ? "better" : d.low > 0 ? "worse" : "";
      },
    },
    { title: "best", key: (g) => g.best?.value, within: (g) => g.best?.examples, text: bestText, number: true },
    { title: "tokens/s", key: (g) => g.tokens_per_second, text: (g) => count(g.tokens_per_second), number: true },
    { title: "memory, MiB", key: (g) => g.memory, text: (g) => count(g.memory), number: true },
    { title: "parameters", key: (g) => g.parameters, text: (g) => count(g.parameters), number: true },
    { title: "trainable", key: (g) => g.trainable, text: (g) => count(g.trainable), number: true },
  ];
}

const missing = (x) => x === null || x === undefined;

function compare(a, b) {
  if (missing(a) || missing(b)) return missing(a) - missing(b);
  return typeof a === "number" && typeof b === "number" ? a - b : String(a).localeCompare(String(b), "en", { numeric: true });
}

function drawGroups() {
  const table = byId("groups");
  const heads = columns().map((column, c) => {
    const arrow = order.column === c ? (order.descending ? " ↓" : " ↑") : "";
    const button = element("button", { type: "button" }, ...breakable(column.title), arrow);
    button.addEventListener("click", () => {
      order = { column: c, descending: order.column === c && !order.descending };
      drawGroups();
    });
    const sorted = order.column === c ? (order.descending ? "descending" : "ascending") : "none";
    const head = element("th", { scope: "col" }, button);
    head.setAttribute("aria-sort", sorted);
    return head;
  });
  const words = byId("filter").value.toLowerCase().split(/[\s,]+/).filter(Boolean);
  let rows = data.groups.map((g, i) => [g, i]);
  rows = rows.filter(([g]) => {
    const text = [g.label, ...Object.entries(g.options).map(([k, v]) => `${k}=${v}`)].join(" ").toLowerCase();
    return words.every((word) => text.includes(word));
  });
  if (order.column !== null) {
    const { key, within = () => 0 } = columns()[order.column];
    const sign = (x, y) => (order.descending && !missing(x) && !missing(y) ? -1 : 1); // what is missing comes last
    const sorted = (x, y) => compare(x, y) * sign(x, y);
    rows.sort(([a, i], [b, j]) => compare(within(a), within(b)) || sorted(key(a, i), key(b, j)));
  }
  const body = rows.map(([g, i]) => {
    const cells = columns().map((column) => element("td", {
      className: [column.number ? "number" : "", column.style?.(g, i) ?? ""].join(" ").trim(),
    }, ...(column.number ? unbroken(column.text(g, i)) : [column.text(g, i)])));
    return element("tr", { className: String(i) === byId("baseline").value ? "baseline" : "" }, ...cells);
  });
  table.replaceChildren(element("thead", {}, element("tr", {}, ...heads)), element("tbody", {}, ...body));
}

// ---------------------------------------------------------------- curves

function ticks(low, high, wanted = 5) {
  const step = 10 ** Math.floor(Math.log10((high - low) / wanted || 1));
  const unit = [1, 2, 5, 10].find((m) => (high - low) / (m * step) <= wanted) * step;
  const result = [];
  for (let i = Math.ceil(low / unit); i * unit <= high + 1e-9 * unit; i++) result.push(i * unit);
  return result;
}

const tickText = (x) => (Math.abs(x) >= 1e5 || (x !== 0 && Math.abs(x) < 1e-3) ? x.toExponential(0) : String(Number(x.toPrecision(6))));

function drawCurves() {
  const metric = byId("metric").value;
  const empty = { step: [], mean: [], low: [], high: [] };
  const drawn = data.groups.map((g, i) => [g.curves[metric] ?? empty, g.final_points[metric], i])
    .filter(([c, end, i]) => (c.step.length || end) && !hidden.has(i));
  const plot = byId("curves");
  byId("caption").textContent = caption(metric);
  if (!drawn.length) {
    plot.replaceChildren(element("p", { className: "note", textContent: "No run has measured this." }));
    return;
  }
  const log = byId("log").checked && drawn.every(([c, end]) => [...c.low, ...(end ? [end.low] : [])].every((y) => y > 0));
  const value = (y) => (log ? Math.log10(y) : y);
  const width = Math.max(300, plot.clientWidth);
  const [height, left, bottom] = [Math.max(240, Math.min(380, width / 2)), 58, 34];
  const all = (key) => drawn.flatMap(([c, end]) => [...c[key], ...(end ? [end[key]] : [])]);
  const [xs, lows, highs] = [all("step"), all("low").map(value), all("high").map(value)];
  const [x0, x1] = [Math.min(...xs), Math.max(...xs)];
  let [y0, y1] = [Math.min(...lows), Math.max(...highs)];
  if (y0 === y1) [y0, y1] = [y0 - 0.5, y1 + 0.5];
  const x = (s) => left + ((s - x0) / (x1 - x0 || 1)) * (width - left - 10);
  const y = (v) => height - bottom - ((value(v) - y0) / (y1 - y0)) * (height - bottom - 10);
  const svg = shape("svg", { viewBox: `0 0 ${width} ${height}`, role: "img", "aria-label": `${metric} by step` });
  for (const tick of ticks(y0, y1)) {
    const at = log ? 10 ** tick : tick;
    svg.append(shape("line", { x1: left, x2: width - 10, y1: y(at), y2: y(at), class: "axis" }));
    svg.append(shape("text", { x: left - 6, y: y(at) + 4, "text-anchor": "end" }, tickText(at)));
  }
  for (const tick of ticks(x0, x1, width / 120)) svg.append(shape("text", { x: x(tick), y: height - 14, "text-anchor": "middle" }, tickText(tick)));
  svg.append(shape("text", { x: width - 10, y: height - 3, "text-anchor": "end" }, "step"));
  for (const [c, end, i] of drawn) {
    const band = [...c.step.map((s, k) => [s, c.high[k]]), ...c.step.map((s, k) => [s, c.low[k]]).reverse()];
    if (data.groups[i].seeds.length > 1) {
      svg.append(shape("polygon", { points: band.map(([s, v]) => `${x(s)},${y(v)}`).join(" "), fill: color(i), "fill-opacity": 0.18 }));
    }
    const points = c.step.map((s, k) => `${x(s).toFixed(1)},${y(c.mean[k]).toFixed(1)}`).join(" ");
    const line = shape("polyline", { points, fill: "none", stroke: color(i), "stroke-width": 2, "stroke-dasharray": dash(i) });
    line.append(shape("title", {}, data.groups[i].label));
    svg.append(line);
    if (c.step.length === 1) svg.append(shape("circle", { cx: x(c.step[0]), cy: y(c.mean[0]), r: 4, fill: color(i) }));
    if (!end) continue;
    const [cx, cy, r] = [x(end.step), y(end.mean), 6];
    svg.append(shape("line", { x1: cx, x2: cx, y1: y(end.low), y2: y(end.high), stroke: color(i), "stroke-width": 2 }));
    const diamond = shape("path", { d: `M${cx - r} ${cy}L${cx} ${cy - r}L${cx + r} ${cy}L${cx} ${cy + r}Z`, fill: color(i), class: "final" });
    diamond.append(shape("title", {}, `${data.groups[i].label}: ${number(end.mean)}`));
    svg.append(diamond);
  }
  plot.replaceChildren(svg);
}

// What the lines and the diamonds are, with the numbers of rows.
function caption(metric) {
  const shown = data.groups.filter((g, i) => !hidden.has(i));
  const examples = (key) => [...new Set(shown.map((g) => g[key][metric]?.examples).filter(Boolean))].join(" or ");
  const [lines, ends] = [examples("curves"), examples("final_points")];
  return "Mean over the seeds; the band is from minimum to maximum." + (lines && ` Lines: evaluations over ${lines}.`) +
    (ends && ` Diamonds: final evaluation over ${ends}, not comparable with the lines.`);
}

function drawLegend() {
  byId("legend").replaceChildren(...data.groups.map((g, i) => {
    const swatch = element("span", { className: "swatch" });
    swatch.style.background = color(i);
    const button = element("button", { type: "button" }, swatch, g.label);
    button.setAttribute("aria-pressed", String(!hidden.has(i)));
    button.addEventListener("click", () => {
      if (!hidden.delete(i)) hidden.add(i);
      drawLegend();
      drawCurves();
    });
    return element("li", {}, button);
  }));
}

// ---------------------------------------------------------------- parallel coordinates

// A text of at most `length` characters: the middle is left out.
function shortened(text, length) {
  const [start, end] = [Math.ceil(length / 2) - 1, Math.floor(length / 2) - 1];
  return text.length <= length ? text : `${text.slice(0, start)}…${text.slice(-end)}`;
}

function drawParallel() {
  const shown = data.groups.map((g, i) => [g, i]).filter(([g]) => g.result);
  if (!data.options.length || shown.length < 2) {
    byId("parallel-section").hidden = true;
    return;
  }
  const axes = [
    ...data.options.map((key) => ({ title: key, value: (g) => g.options[key] })),
    { title: data.main_metric.label, value: (g) => g.result.estimate },
  ];
  const [height, top, margin] = [320, 40, 170];
  const gap = Math.max(110, Math.min(240, (byId("parallel").clientWidth - margin) / (axes.length - 1)));
  const width = gap * (axes.length - 1) + margin;
  const svg = shape("svg", { viewBox: `0 0 ${width} ${height}`, role: "img", "aria-label": "options and result of every group" });
  svg.style.width = `${width}px`; // a narrow window scrolls it, so that its text stays legible
  axes.forEach((axis, a) => {
    const values = [...new Set(shown.map(([g]) => axis.value(g)))].sort(compare);
    const numeric = values.every((v) => typeof v === "number");
    const log = numeric && values[0] > 0 && values[values.length - 1] / values[0] > 20;
    const scale = (v) => (log ? Math.log(v) : v);
    const [low, high] = numeric ? [scale(values[0]), scale(values[values.length - 1])] : [0, values.length - 1];
    axis.x = 80 + a * gap;
    axis.y = (g) => {
      const at = numeric ? scale(axis.value(g)) : values.indexOf(axis.value(g));
      return height - 24 - (high === low ? 0.5 : (at - low) / (high - low)) * (height - top - 40);
    };
    svg.append(shape("line", { x1: axis.x, x2: axis.x, y1: top, y2: height - 16, class: "axis" }));
    svg.append(shape("text", { x: axis.x, y: 16 + 14 * (a % 2), "text-anchor": "middle" }, axis.title));
    const drawn = []; // heights of the labels: the two ends, and of the others those that fit between
    for (const v of new Set([values[0], values[values.length - 1], ...values])) {
      const at = axis.y({ options: { [axis.title]: v }, result: { estimate: v } });
      if (drawn.some((other) => Math.abs(other - at) < 14)) continue;
      drawn.push(at);
      svg.append(shape("text", { x: axis.x + 5, y: at - 3, class: "mark" }, typeof v === "number" ? tickText(v) : shortened(String(v), (gap - 10) / 7)));
    }
  });
  const results = shown.map(([g]) => g.result.estimate);
  const [least, most] = [Math.min(...results), Math.max(...results)];
  for (const [g, i] of shown) {
    const share = most === least ? 0 : (g.result.estimate - least) / (most - least);
    const line = shape("polyline", {
      points: axes.map((axis) => `${axis.x},${axis.y(g)}`).join(" "), fill: "none",
      stroke: `hsl(${140 - 130 * share} 60% 48%)`, "stroke-width": 2, "stroke-opacity": 0.8,
    });
    line.append(shape("title", {}, `${g.label}: ${interval(g.result)}`));
    svg.append(line);
  }
  byId("parallel").replaceChildren(svg);
}

// ---------------------------------------------------------------- the rest

function drawTable(id, heads, rows) {
  const head = element("tr", {}, ...heads.map((text) => element("th", { scope: "col", textContent: text })));
  const body = rows.map((row) => element("tr", {}, ...row.map((cell) => (cell instanceof Node ? cell : element("td", { textContent: cell })))));
  byId(id).replaceChildren(element("thead", {}, head), element("tbody", {}, ...body));
}

const cell = (value) => element("td", { textContent: String(value), className: wrapped(value) });

function bar(value, most, text) {
  const mark = element("span", { className: "bar" });
  mark.style.width = `${most ? (7 * value) / most : 0}rem`;
  return element("td", {}, ...(value === null || value === undefined ? [] : [mark, text]));
}

function drawRest() {
  const total = data.groups.reduce((n, g) => n + g.runs.length, 0);
  const many = (n, noun) => `${n} ${noun}${n === 1 ? "" : "s"}`;
  const scales = new Set(data.groups.map((g) => g.scale)).size;
  byId("summary").textContent = `${many(total, "run")} in ${many(data.groups.length, "group")}; runs of a group differ in the seed alone. ` +
    `Intervals are 95 % over the seeds, differences are paired by seed; unfinished runs are in neither. ` +
    (scales > 1 ? "Groups with other held-out texts (or, for losses, tokenizers) have no difference: their metrics cannot be compared. " : "") +
    (data.note && `Note: ${data.note}. `) + `${data.date}.`;
  const most = (key) => Math.max(...data.groups.map((g) => g[key] ?? 0));
  drawTable("resources", ["group", "tokens/s", "memory, MiB", "minutes"], data.groups.map((g) => [
    cell(g.label), bar(g.tokens_per_second, most("tokens_per_second"), count(g.tokens_per_second)),
    bar(g.memory, most("memory"), count(g.memory)), bar(g.minutes, most("minutes"), number(g.minutes, 1)),
  ]));
  byId("options-section").hidden = !data.options.length;
  drawTable("options", ["option", ...data.groups.map((g) => g.label)], data.options.map((key) => [key, ...data.groups.map((g) => cell(g.options[key]))]));
  drawTable("common", ["option", "value"], Object.entries(data.common).map(([key, value]) => [key, element("td", { className: "wide", textContent: value })]));
  drawTable("runs", ["run", "group", "step", "state"], data.groups.flatMap((g) => g.runs.map((r) => [
    cell(r.name), cell(g.label), `${r.step} of ${r.steps}`, r.done ? "done" : "not finished",
  ])));
  const withSamples = data.groups.filter((g) => g.samples.length);
  byId("samples-section").hidden = !withSamples.length;
  byId("samples").replaceChildren(...withSamples.map((g) => element("details", {},
    element("summary", { textContent: g.label }),
    ...g.samples.flatMap((s) => [element("p", { className: "note", textContent: `step ${s.step}` }), element("pre", { textContent: s.text })]),
  )));
}

byId("baseline").append(...data.groups.map((g, i) => element("option", { value: i, textContent: g.label })));
byId("metric").append(...data.metrics.map((name) => element("option", { value: name, textContent: name })));
byId("filter").addEventListener("input", drawGroups);
byId("baseline").addEventListener("change", drawGroups);
byId("metric").addEventListener("change", drawCurves);
byId("log").addEventListener("change", drawCurves);
window.addEventListener("resize", () => { drawCurves(); drawParallel(); });
drawGroups();
drawCurves();
drawLegend();
drawParallel();
drawRest();
