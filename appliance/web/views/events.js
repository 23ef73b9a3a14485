// What happened, newest first: what was recorded, and what comes while one looks. A filter by words; each event in full on demand.

import * as api from "../api.js";
import { h, prose, replace } from "../dom.js";
import { store, subscribe } from "../store.js";
import { clock, has, t } from "../text.js";

const BAD = /lost|failed|crash|damaged|xid|critical|error/i, NOTICE = /refused|throttle|governor|leak|drift|clock|warning/i;

export function severity(event) {
  const said = event.severity ?? event.data?.severity;
  const text = `${event.topic} ${event.data?.state ?? ""} ${event.data?.level ?? ""}`;
  if (said === "info" && /^(gpu|governor|finding)\./.test(event.topic)) return "quiet";
  if (said === "error" || BAD.test(text)) return "bad";
  return said === "warning" || NOTICE.test(text) ? "notice" : "quiet";
}

export function describe(event) {
  const data = event.data ?? {};
  if (event.topic === "gpu.throttle" && !data.reasons?.length) return t("event.gpu.throttle.over", { gpu: data.gpu });
  if (event.topic === "gpu.mig" && !data.mode) return t("event.gpu.mig.off", { gpu: data.gpu });
  if (has(`event.${event.topic}`)) return t(`event.${event.topic}`, { ...Object.fromEntries(Object.keys(data).map((key) => [key, data[key]])), reason: data.reason ?? "" });
  return Object.entries(data).map(([key, value]) => `${key} ${typeof value === "object" ? JSON.stringify(value) : value}`).join(" · ");
}

export function line(event) {
  return h("details", { class: "event" }, h("summary", {}, h("time", { datetime: event.time }, clock(event.time)), " ", h("span", { class: severity(event) }, event.topic), " ", prose(describe(event))),
    h("pre", {}, JSON.stringify(event, null, 2)));
}

// Live events before recorded ones, newest first; what came while we looked is in the record, too.
export function merged(past) {
  const oldest = store.events.at(-1)?.time;
  return [...store.events, ...past.filter((event) => !oldest || Date.parse(event.time) < Date.parse(oldest) - 1)];
}

export function render(main) {
  const filter = h("input", { type: "search", placeholder: t("events.filter"), "aria-label": t("events.filter") });
  const list = h("section", { class: "panel", id: "events", "aria-live": "polite" });
  main.append(h("div", { class: "row spread" }, h("h1", {}, t("nav.events")), filter), list);
  let past = [];
  const draw = () => {
    const words = filter.value.toLowerCase().split(/\s+/).filter(Boolean);
    const all = merged(past)
      .filter((event) => { const text = `${event.topic} ${JSON.stringify(event.data)}`.toLowerCase(); return words.every((word) => text.includes(word)); });
    replace(list, all.length ? all.slice(0, 500).map(line) : h("p", { class: "empty" }, t(words.length ? "events.none_match" : "events.none_yet")));
  };
  filter.addEventListener("input", draw);
  api.pastEvents(Date.now() / 1000 - 7 * 86400).then((events) => { past = events; }, () => { past = []; }).then(draw);
  draw();
  return subscribe((what) => { if (what === "event" && !list.querySelector("details[open]")) draw(); });
}
