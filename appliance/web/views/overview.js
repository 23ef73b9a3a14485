// Is it healthy, in one glance and one sentence; the few numbers that matter; the models; what happened last.

import { h, prose, replace, spark, table } from "../dom.js";
import { verdict } from "../health.js";
import { store, subscribe } from "../store.js";
import { bytes, duration, milliseconds, number, t } from "../text.js";
import { line, merged, recorded } from "./events.js";
import { state } from "./models.js";

const GPU_TILES = [["temperature", "°C"], ["power", "W"], ["memory.used", "bytes"], ["utilization", "%"]];
const HOST_TILES = [["host.cpu.load", "%"], ["host.memory.available", "bytes"]];

export function render(main) {
  const panel = h("section", { class: "panel verdict", id: "verdict" });
  // read out when something is new, not when a number has changed, which is every second
  const said = h("p", { class: "said", role: "status", "aria-live": "polite", id: "said" });
  const tiles = h("section", { class: "grid" }), models = h("section"), events = h("section");
  main.append(h("h1", { class: "quiet" }, t("nav.overview")), panel, said, tiles,
    h("div", { class: "two" }, h("div", {}, h("h2", {}, t("nav.models")), models), h("div", {}, h("h2", {}, t("overview.recent")), events)));
  let past = [];
  const draw = (what) => {
    if (!store.snapshot) { replace(panel, h("p", {}, t("link.connecting"))); return; }
    if (what !== "event") { drawVerdict(panel, said); drawTiles(tiles); drawModels(models); }
    const latest = merged(past).slice(0, 8);
    if (!events.querySelector("details[open]")) replace(events, latest.length ? h("div", { class: "panel" }, latest.map(line)) : h("p", { class: "empty" }, t("events.none_yet")));
  };
  draw();
  const leave = recorded(86400, 20, (found) => { past = found; draw("event"); }), end = subscribe(draw);
  return () => { leave(); end(); };
}

function drawVerdict(place, said) {
  const now = verdict(store.snapshot, store.connected);
  place.className = `panel verdict ${now.severity}`;
  const words = JSON.stringify(now), news = words.replace(/\d+([.,]\d+)*/g, "");
  if (place.dataset.words !== words)
    replace(place, h("div", {}, h("p", {}, h("strong", {}, now.sentence)),
      now.found.length ? h("ul", {}, now.found.map((item) => h("li", { class: item.severity }, item.text, item.fix ? h("span", { class: "fix" }, " → ", prose(item.fix)) : null))) : null));
  if (said.dataset.news !== news) said.textContent = [now.sentence, ...now.found.map((item) => item.text)].join(" ");
  place.dataset.words = words;
  said.dataset.news = news;
}

function tile(name, value, unit, more, trail) {
  return h("div", { class: "panel tile" }, h("div", { class: "name" }, name),
    h("div", { class: "value" }, value, unit ? h("span", { class: "unit" }, ` ${unit}`) : null), h("div", { class: "more" }, more ?? ""), spark(trail ?? []));
}

function drawTiles(place) {
  const { status, readings = {}, gpus = [], models, processor_temperature: processor } = store.snapshot;
  const [p99, p99Unit] = milliseconds(Math.max(0, ...models.map((model) => model.p99_us ?? 0))).split(" ");
  const found = [
    tile(t("tile.rate"), number(status.requests_per_s), t("unit.per_second"), t("tile.uptime", { uptime: duration(status.uptime_s) }), store.trail.get("requests_per_s")),
    tile(t("tile.p99"), p99, p99Unit, t("tile.p99_more"), store.trail.get("p99_us")),
  ];
  for (const gpu of gpus.filter((one) => one.state !== "OK"))
    found.push(h("div", { class: "panel tile" }, h("div", { class: "name" }, `GPU ${gpu.index} · ${gpu.name}`), h("div", { class: "value bad" }, t(`gpu.${gpu.state}`)), h("div", { class: "more" }, prose(gpu.action))));
  for (const gpu of gpus) for (const [what, unit] of GPU_TILES) {
    const name = `gpu.${gpu.index}.${what}`;
    const title = `GPU ${gpu.index} · ${t(`reading.${what}`)}`;
    if (typeof readings[name] === "number") found.push(reading(name, title, unit, readings[name], gpu.integrated && what === "memory.used" ? `${gpu.name} · ${t("gpu.hosts_memory")}` : gpu.name));
    else if (gpu.state === "OK" && gpu.missing?.[what]) found.push(tile(title, "–", "", gpu.missing[what]));
  }
  for (const gpu of gpus) for (const one of gpu.mig ?? []) {
    const [used, unit] = bytes(one.used).split(" ");
    found.push(tile(`GPU ${gpu.index} · MIG ${one.index}`, used, unit, t("mig.of", { total: bytes(one.total) })));
  }
  if (typeof processor === "number") found.push(tile(t("reading.processor_temperature"), number(processor), "°C", "", store.trail.get("processor_temperature")));
  for (const [name, unit] of HOST_TILES) if (typeof readings[name] === "number") found.push(reading(name, t(`reading.${name}`), unit, readings[name]));
  replace(place, found);
}

function reading(name, title, unit, value, more) {
  const [shown, shownUnit] = unit === "bytes" ? bytes(value).split(" ") : [number(value), unit];
  return tile(title, shown, shownUnit, more ?? "", store.trail.get(name));
}

function drawModels(place) {
  const rows = store.snapshot.models.map((model) => ({
    cells: [h("a", { href: `#models/${encodeURIComponent(model.name)}` }, model.name), model.version || "–", state(model), number(store.rates.get(`${model.name}:${model.version}`) ?? 0), milliseconds(model.p99_us)],
    key: model.name,
  }));
  replace(place, h("div", { class: "panel" }, table(
    [{ title: t("models.name"), text: true }, { title: t("models.version") }, { title: t("models.state"), text: true }, { title: t("models.rate") }, { title: "p99" }],
    rows, t("models.none"))));
}
