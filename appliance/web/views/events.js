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
  // a folder that is wrong has no version
  if (event.topic === "model.state" && !data.version) return t("event.model.folder", { model: data.model, state: data.state, reason: data.reason ?? "" });
  if (has(`event.${event.topic}`)) return t(`event.${event.topic}`, { ...Object.fromEntries(Object.keys(data).map((key) => [key, data[key]])), reason: data.reason ?? "" });
  return Object.entries(data).filter(([, value]) => !Array.isArray(value) || value.length).map(([key, value]) => `${key} ${typeof value === "object" ? JSON.stringify(value) : value}`).join(" · ");
}

export function line(event) {
  return h("details", { class: "event" }, h("summary", {}, h("time", { datetime: event.time }, clock(event.time)), " ", h("span", { class: severity(event) }, event.topic), " ", prose(describe(event))),
    h("pre", {}, JSON.stringify(event, null, 2)));
}

// An operator's wish is recorded as operator.action with the action among its fields.
const base = (event) => event.topic.replace(/^operator\..*/, "operator");
const content = (event) => JSON.stringify(event.topic.startsWith("operator.") ? event.data?.action ?? event.topic.slice(9) : Object.entries(event.data ?? {}).sort(([a], [b]) => (a < b ? -1 : 1)));
const TWIN_MS = 1000;

// Live and recorded events, newest first. What came while we looked is in the record, too, stamped a moment later: it is shown once.
export function merged(past) {
  const live = new Map();
  for (const event of store.events) live.set(base(event), [...(live.get(base(event)) ?? []), { time: Date.parse(event.time), content: content(event) }]);
  const told = (event) => live.get(base(event))?.some((one) => Math.abs(one.time - Date.parse(event.time)) < TWIN_MS && one.content === content(event));
  return [...store.events, ...past.filter((event) => !told(event))].sort((a, b) => Date.parse(b.time) - Date.parse(a.time));
}

// Fetch recorded events now, whenever the link comes back (what happened meanwhile was told to nobody), and once more when the
// recorder has had its second to write. `take` gets them; returns what ends it.
export function recorded(seconds, limit, take) {
  const ask = () => api.pastEvents(Date.now() / 1000 - seconds, { limit }).then(take, () => {});
  let again = null;
  ask();
  const end = subscribe((what) => {
    if (what !== "link" || !store.connected) return;
    ask();
    clearTimeout(again);
    again = setTimeout(ask, 3000);
  });
  return () => { clearTimeout(again); end(); };
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
  const redraw = () => { if (!list.querySelector("details[open]")) draw(); };
  const leave = recorded(7 * 86400, 500, (events) => { past = events; redraw(); });
  draw();
  const end = subscribe((what) => { if (what === "event") redraw(); });
  return () => { leave(); end(); };
}
