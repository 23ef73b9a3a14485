// GPU and host over time, an hour to a year: one time axis for all, with the throttle and governor lanes and marks for events.

import * as api from "../api.js";
import { axis, colour, CONFIG, layout, plotly, SERIES } from "../chart.js";
import { h, replace } from "../dom.js";
import { store, subscribe } from "../store.js";
import { has, number, t } from "../text.js";
import { describe, severity } from "./events.js";

const RANGES = { "1h": 3600, "6h": 6 * 3600, "24h": 86400, "7d": 7 * 86400, "30d": 30 * 86400, "1y": 365 * 86400 };
const PANELS = [
  { key: "temperature", unit: "°C", match: /^gpu\.\d+\.temperature(\.memory)?$|^host\.temperature\.[^.]+$/ },
  { key: "power", unit: "W", match: /^gpu\.\d+\.power(\.limit)?$|^host\.rail\..*\.power$/ },
  { key: "clock", unit: "MHz", match: /^gpu\.\d+\.clock\.(graphics|sm|memory)$/ },
  { key: "load", zero: true, unit: "%", match: /^gpu\.\d+\.(utilization|fan\.\d+)$|^host\.cpu\.load$/ },
  { key: "memory", unit: "GB", scale: 1e-9, match: /^gpu\.\d+\.memory\.used$|^host\.memory\.available$/ },
  { key: "processes", unit: "MB", scale: 1e-6, match: /^process\..*\.rss$/ },
  { key: "requests", zero: true, unit: "1/s", match: /^requests\.rate$/ },
  { key: "latency", zero: true, unit: "ms", scale: 1e-3, match: /^requests\.p99$/ },
];
const LANES = [["throttle", /^gpu\.\d+\.throttle$/], ["governor", /^governor\.level$/]];
const LEVELS = ["NOMINAL", "WARM", "HOT", "CRITICAL"];
const MARKED = ["worker.lost", "governor.level", "gpu.xid", "gpu.event", "gpu.throttle", "gpu.ecc", "gpu.mig", "daemon", "finding.raised", "memory.leak", "memory.refused",
  "engine.gave_out", "clock.step", "requests.refused", "operator", "recorder", "config"];
// The newest so many, and of one kind no more than so many: refusals by the hundred must not crowd out a lost worker.
const MARKS = 60, MARKS_OF_A_KIND = 15, NAMED_MARKS = 40;
// After so many refreshes all is read anew: the record is thinned out with time, and a clock may have been set.
const REFRESHES = 60;

export function render(main, [range]) {
  const chosen = range in RANGES ? range : "1h";
  const bar = h("div", { class: "row" }, Object.keys(RANGES).map((name) =>
    h("button", { type: "button", "aria-pressed": String(name === chosen), onclick: () => { location.hash = `#history/${name}`; } }, t(`range.${name}`))));
  // in a panel, not one itself: the library takes an element's width with its padding for its own
  const place = h("div", { class: "chart", id: "chart" }, h("p", { class: "empty" }, t("history.loading")));
  main.append(h("div", { class: "row spread" }, h("h1", {}, t("nav.history")), bar), h("p", { class: "quiet" }, t("history.hint")), h("div", { class: "panel" }, place));
  const state = { ended: false, window: null, drawn: false, kept: null, refreshes: 0, asked: 0 };
  const draw = async () => {
    const asked = ++state.asked;
    try {
      const since = state.window ? state.window[0] : Date.now() / 1000 - RANGES[chosen], until = state.window?.[1];
      const [series, events] = await Promise.all([state.window ? api.history(names(), since, until) : refresh(state, since), api.pastEvents(since, { until, kinds: MARKED }).catch(() => [])]);
      // a later question was asked meanwhile: its answer counts
      if (state.ended || asked !== state.asked) return;
      await plot(place, series, events, chosen, state, draw);
    } catch (error) {
      if (!state.ended && asked === state.asked) { globalThis.Plotly?.purge(place); state.drawn = false; replace(place, h("p", { class: "bad", role: "alert" }, error.message)); }
    }
  };
  const wait = store.snapshot ? draw() : new Promise((go) => setTimeout(go, 800)).then(draw);
  const timer = setInterval(() => { if (!state.window && !document.hidden && store.connected) draw(); }, chosen === "1h" ? 5000 : 60000);
  const repaint = () => draw();
  document.addEventListener("theme", repaint);
  const end = subscribe((what) => { if (what === "link" && store.connected) { state.kept = null; draw(); } });
  return () => { state.ended = true; end(); clearInterval(timer); document.removeEventListener("theme", repaint); wait.then(() => globalThis.Plotly?.purge(place)); };
}

// What to ask for, lanes and requests first: however many sensors there are, these are few.
function names() {
  const first = [...(store.snapshot?.gpus ?? []).map((gpu) => `gpu.${gpu.index}.throttle`), "governor.level", "requests.rate", "requests.p99"];
  const wanted = [...PANELS.map((panel) => panel.match), ...LANES.map(([, match]) => match)];
  return [...new Set([...first, ...Object.keys(store.snapshot?.readings ?? {})])].filter((name) => wanted.some((match) => match.test(name)));
}

// All series since that time. What was read before is kept, and only what is new is asked for: from the last moment on, which was not over.
async function refresh(state, since) {
  const wanted = names(), kept = state.kept;
  const steps = new Set(wanted.map((name) => `${kept?.[name]?.tier_s} ${kept?.[name]?.step_s}`)), lasts = wanted.map((name) => kept?.[name]?.time.at(-1));
  const usable = kept && steps.size === 1 && lasts.every((last) => last !== undefined) && state.refreshes++ < REFRESHES;
  const from = usable ? Math.min(...lasts) : since;
  const fresh = await api.history(wanted, from, undefined, usable ? kept[wanted[0]].step_s : undefined);
  const joined = usable ? Object.fromEntries(wanted.map((name) => [name, joint(kept[name], fresh[name], from, since)])) : fresh;
  if (Object.values(joined).some((series) => series === null)) {
    state.kept = null;
    return refresh(state, since);
  }
  if (!usable) state.refreshes = 0;
  return (state.kept = joined);
}

// The old columns up to `from`, the fresh ones after them, nothing before `since`; null if they do not belong together.
function joint(old, fresh, from, since) {
  if (!fresh?.time.length || fresh.time[0] !== from || fresh.step_s !== old.step_s || fresh.tier_s !== old.tier_s) return null;
  const last = old.time.indexOf(from), first = old.time.findIndex((time) => time >= since);
  if (last < 0 || first < 0) return null;
  const columns = ["time", "min", "mean", "max"].map((key) => [key, [...old[key].slice(Math.min(first, last), last), ...fresh[key]]]);
  return { ...fresh, ...Object.fromEntries(columns) };
}

async function plot(place, all, events, chosen, state, redraw) {
  const Plotly = await plotly();
  const found = Object.entries(all).filter(([, series]) => series.mean.some((value) => value !== null));
  const panels = PANELS.map((panel) => ({ ...panel, lines: found.filter(([name]) => panel.match.test(name)) })).filter((panel) => panel.lines.length);
  const lanes = LANES.map(([key, match]) => ({ key, lines: found.filter(([name]) => match.test(name)) })).filter((lane) => lane.lines.length);
  if (!panels.length) { replace(place, h("p", { class: "empty" }, t("history.nothing"))); return; }
  if (!state.drawn) replace(place);
  // below the lanes: the time axis, then the names in rows of at least four
  const names = panels.flatMap((panel) => panel.lines).length, below = 56 + 20 * Math.ceil(names / 4), plotted = 180 * panels.length + 50 * lanes.length;
  const pixels = plotted + below;
  place.style.height = `${pixels}px`;
  const heights = [...panels.map(() => 1), ...lanes.map(() => 0.22)], whole = heights.reduce((sum, height) => sum + height, 0), gap = 0.025;
  const traces = [], axes = {};
  let top = 1;
  [...panels, ...lanes].forEach((part, index) => {
    const suffix = index ? String(index + 1) : "", height = (heights[index] / whole) * (1 - gap * (heights.length - 1));
    const domain = [Math.max(0, top - height), top];
    top -= height + gap;
    axes[`yaxis${suffix}`] = part.match
      ? axis({ domain, title: { text: `${t(`panel.${part.key}`)} (${part.unit})`, font: { size: 11 } }, rangemode: part.zero ? fromZero(part.lines) : "normal" })
      : axis({ domain, title: { text: t(`lane.${part.key}`), font: { size: 11 } }, range: [0, 1], showticklabels: false, ticks: "", showgrid: false, zeroline: false });
    part.lines.forEach(([name, series], place_) => traces.push(...(part.match ? lines(name, series, part, place_, suffix) : [lane(name, series, part.key, suffix)])));
  });
  const bottom = heights.length > 1 ? `y${heights.length}` : "y";
  const span = found.flatMap(([, series]) => [series.time[0], series.time.at(-1)]);
  const marks = fewest(events.filter((event) => Date.parse(event.time) / 1000 >= Math.min(...span)))
    .map((event) => ({ event, x: new Date(event.time), colour: colour(severity(event)) }));
  await Plotly.react(place, traces, layout({
    ...axes, height: pixels, margin: { l: 56, r: 16, t: 8, b: below }, legend: { orientation: "h", yanchor: "top", y: -44 / plotted, font: { size: 11 } }, bargap: 0, uirevision: chosen,
    xaxis: axis({ type: "date", anchor: bottom, ...(state.window ? { range: state.window.map((second) => new Date(second * 1000)) } : {}) }),
    // dates, as in the traces: the library draws a date in the reader's time, but a text as it is written, whatever zone it names
    shapes: marks.map(({ x, colour: ink }) => ({ type: "line", xref: "x", yref: "paper", x0: x, x1: x, y0: 0, y1: 1, line: { width: 1, dash: "dot", color: ink } })),
    annotations: marks.slice(0, NAMED_MARKS).map(({ event, x, colour: ink }) => ({ x, y: 1, xref: "x", yref: "paper", text: "▼", hovertext: `${event.topic}: ${describe(event)}`, showarrow: false, yanchor: "bottom", font: { size: 9, color: ink } })),
  }), CONFIG);
  if (!state.drawn) {
    state.drawn = true;
    place.on("plotly_relayout", (change) => {
      if (change["xaxis.range[0]"]) { state.window = [change["xaxis.range[0]"], change["xaxis.range[1]"]].map(seconds); redraw(); }
      else if (change["xaxis.autorange"]) { state.window = null; redraw(); }
    });
  }
}

export function fewest(newestFirst) {
  const seen = new Map();
  return newestFirst.filter(({ topic }) => seen.set(topic, (seen.get(topic) ?? 0) + 1).get(topic) <= MARKS_OF_A_KIND).slice(0, MARKS);
}

// From 0 upwards; where all is 0 the library would draw -1 to 1.
const fromZero = (lines_) => (lines_.some(([, series]) => series.max.some((value) => value > 0)) ? "tozero" : "nonnegative");

function label(name) {
  const short = name.replace(/^gpu\.(\d+)\./, "").replace(/^host\.temperature\./, "").replace(/^process\.(.*)\.rss$/, "$1");
  const gpu = /^gpu\.(\d+)\./.exec(name)?.[1];
  const text = has(`reading.${short}`) ? t(`reading.${short}`) : short;
  return gpu === undefined ? text : `GPU ${gpu} ${text}`;
}

// Of the library's "2026-11-25 08:00", in the reader's time; a day alone would be read as UTC.
const seconds = (text) => Date.parse(text.length > 10 ? text.replace(" ", "T") : `${text}T00:00`) / 1000;

const times = (series) => series.time.map((second) => new Date(second * 1000));

function lines(name, series, panel, place, suffix) {
  const scale = panel.scale ?? 1, scaled = (values) => values.map((value) => (value === null ? null : value * scale)), line_ = SERIES[place % SERIES.length];
  const base = { x: times(series), yaxis: `y${suffix}`, xaxis: "x", type: "scatter", mode: "lines", legendgroup: name, connectgaps: false };
  const found = [];
  if (series.step_s > 1) {
    found.push({ ...base, y: scaled(series.max), line: { width: 0 }, showlegend: false, hoverinfo: "skip" });
    found.push({ ...base, y: scaled(series.min), line: { width: 0 }, fill: "tonexty", fillcolor: `${line_}33`, showlegend: false, hoverinfo: "skip" });
  }
  found.push({ ...base, y: scaled(series.mean), name: label(name), line: { width: 1.6, color: line_ }, hovertemplate: `%{y:.4~g} ${panel.unit}` });
  return found;
}

// How long each moment lasts, in seconds: until the next one, though the clock of the samples skips a second now and then; or as long as
// a step, if nothing was recorded after it. What is sampled seldom lasts longer.
const LASTS_S = 5;
export function lengths(time, step) {
  const gaps = time.slice(1).map((next, index) => next - time[index]), usual = [...gaps].sort((a, b) => a - b)[gaps.length >> 1] ?? step;
  const most = Math.max(LASTS_S, 1.5 * step, 1.5 * usual);
  return time.map((_, index) => (gaps[index] > 0 && gaps[index] < most ? gaps[index] : step));
}

// A lane is a row of bars: one for each moment, coloured by how bad it was.
function lane(name, series, key, suffix) {
  const colours = key === "governor" ? [colour("good"), colour("notice"), "#d9652b", colour("bad")] : [colour("soft"), colour("bad")];
  const worst = series.max.map((value) => (value === null ? null : Math.round(value)));
  return {
    type: "bar", offset: 0, x: times(series), y: worst.map((value) => (value === null ? null : 1)), yaxis: `y${suffix}`, xaxis: "x", width: lengths(series.time, series.step_s).map((length) => length * 1000), showlegend: false,
    marker: { color: worst.map((value) => colours[value ?? 0]), line: { width: 0 } }, name: label(name), hovertemplate: "%{text}<extra></extra>", textposition: "none",
    text: worst.map((value) => (key === "governor" ? t(`level.${LEVELS[value ?? 0]}`) : value ? t("history.throttled") : t("history.not_throttled"))),
  };
}
