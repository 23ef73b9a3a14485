// The models: state, provider, rate, percentiles; one of them in full: queue against compute, batch sizes, workers, verification; load and unload.

import * as api from "../api.js";
import { breakable, columns, h, meter, replace, table } from "../dom.js";
import { answers } from "../health.js";
import { store, subscribe } from "../store.js";
import { bytes, milliseconds, number, t } from "../text.js";

const CLASS = { READY: "good", LOADING: "notice", UNLOADING: "notice", UNAVAILABLE: "bad" };

export function state(model) {
  const shown = model.state === "READY" && !answers(model) ? "UNAVAILABLE" : model.state;
  return h("span", { class: `pill ${CLASS[shown] ?? "off"}`, title: model.reason || null }, t(`state.${shown || "UNLOADED"}`),
    model.state === "LOADING" && model.detail ? ` ${model.detail}` : "");
}

export function render(main, [chosen]) {
  const message = h("p", { role: "alert", class: "bad" });
  const list = h("section", { class: "panel" }), detail = h("section", { class: "stack" });
  main.append(h("h1", {}, t("nav.models")), message, list, detail);
  const shown = { index: [], workers: [], report: null, reportFor: null };
  const say = (error) => { message.textContent = error ? error.message : ""; };
  const refresh = async () => {
    try { [shown.index, shown.workers] = await Promise.all([api.index(), api.workers()]); } catch (error) { if (store.connected) say(error); }
    draw();
  };
  const act = async (button, work) => {
    button.disabled = true;
    say(null);
    try { await work(); } catch (error) { say(error); }
    await refresh();
  };
  const draw = () => {
    if (!store.snapshot) return;
    drawList(list, shown, act, chosen);
    if (chosen) drawDetail(detail, shown, chosen);
  };
  if (chosen) api.verification(chosen).then((record) => { shown.report = record.report; }, () => { shown.report = null; }).then(() => { shown.reportFor = chosen; draw(); });
  refresh();
  const end = subscribe((what) => {
    if (what === "event" && /^(model|worker|operator)\./.test(store.events[0]?.topic ?? "")) refresh();
    else if (what !== "event" && !list.contains(document.activeElement)) draw();
  });
  return end;
}

function drawList(place, shown, act, chosen) {
  const live = new Map(store.snapshot.models.map((model) => [`${model.name}:${model.version}`, model]));
  const entries = shown.index.length ? shown.index : store.snapshot.models;
  const rows = entries.map((entry) => {
    const model = live.get(`${entry.name}:${entry.version}`) ?? { ...entry };
    const ready = entry.state === "READY";
    const button = h("button", { type: "button" }, ready ? t("models.unload") : t("models.load"));
    button.addEventListener("click", (event) => {
      event.stopPropagation();
      if (ready && !confirm(t("models.unload_sure", { model: entry.name }))) return;
      act(button, () => (ready ? api.unload(entry.name) : api.load(entry.name)));
    });
    return {
      key: entry.name,
      onclick: () => { location.hash = chosen === entry.name ? "#models" : `#models/${encodeURIComponent(entry.name)}`; },
      cells: [entry.name, entry.version || "–", state({ ...model, state: entry.state, reason: entry.reason }), breakable(model.engine || model.provider || "–"),
        number(store.rates.get(`${entry.name}:${entry.version}`) ?? 0), milliseconds(model.p50_us), milliseconds(model.p95_us), milliseconds(model.p99_us),
        number(model.pending ?? 0), button],
      note: entry.reason ? t("models.because", { reason: entry.reason }) : null,
    };
  });
  replace(place, table([{ title: t("models.name"), text: true }, { title: t("models.version") }, { title: t("models.state"), text: true }, { title: t("models.engine"), text: true },
    { title: t("models.rate") }, { title: "p50" }, { title: "p95" }, { title: "p99" }, { title: t("models.pending") }, { title: "" }], rows, t("models.none")));
}

function drawDetail(place, shown, name) {
  const models = store.snapshot.models.filter((model) => model.name === name);
  replace(place, models.map((model) => {
    const queue = model.queue_ns ?? 0, compute = model.compute_ns ?? 0, requests = model.success || 1;
    const batches = Object.entries(model.batches ?? {}).map(([size, count]) => [size, count]).sort((a, b) => a[0] - b[0]);
    return h("div", { class: "two" },
      h("div", { class: "panel" }, h("h2", {}, `${model.name} ${model.version}`),
        h("dl", {}, [["models.state", `${model.detail} ${model.reason}`], ["models.engine", model.engine || t("models.as_is")], ["models.provider", model.provider || "–"],
          ["models.requests", number(model.success)], ["models.failed", number(model.fail)], ["models.restarts", number(model.restarts)]].map(([key, value]) => [h("dt", {}, t(key)), h("dd", {}, value)])),
        h("h2", {}, t("models.where")), meter(queue, compute),
        h("p", { class: "row" }, h("span", { class: "notice" }, `■ ${t("models.queue")} ${number(queue / requests / 1e6)} ms`), h("span", { class: "accent" }, `■ ${t("models.compute")} ${number(compute / requests / 1e6)} ms`))),
      h("div", { class: "panel" }, h("h2", {}, t("models.batches")), batches.length ? columns(batches) : h("p", { class: "empty" }, t("models.no_batches"))),
      h("div", { class: "panel" }, h("h2", {}, t("models.workers")), workers(shown.workers.filter((worker) => worker.model === name && worker.version === model.version))),
      h("div", { class: "panel", id: "verification" }, h("h2", {}, t("models.verification")), report(shown)));
  }));
}

function workers(found) {
  return table([{ title: "PID" }, { title: t("models.provider"), text: true }, { title: t("models.memory") }, { title: t("models.batches_run") }, { title: t("models.state"), text: true }],
    found.map((worker) => [worker.pid, worker.provider, bytes(worker.rss_bytes), number(worker.batches), worker.state]), t("models.no_workers"));
}

function report({ report: found }) {
  if (!found) return h("p", { class: "empty" }, t("models.no_report"));
  return [h("p", { class: found.passed ? "good" : "bad" }, h("strong", {}, found.passed ? t("models.passed") : t("models.not_passed"))),
    found.failures?.length ? h("ul", {}, found.failures.map((text) => h("li", {}, text))) : null,
    table([{ title: t("models.output"), text: true }, { title: t("models.max_error") }, { title: t("models.mean_error") }, { title: "cosine" }],
      (found.outputs ?? []).map((output) => [output.name, exponent(output.max_absolute), exponent(output.mean_absolute), number(output.cosine, 6)]), t("models.no_report")),
    metric(found)];
}

function metric({ metric_reference: reference, metric_candidate: candidate }) {
  if (!reference || !candidate) return null;
  const names = ["accuracy", "precision", "recall", "f1", "mse", "mae"].filter((name) => name in candidate);
  return table([{ title: "", text: true }, ...names.map((name) => ({ title: name }))],
    [[t("models.reference"), ...names.map((name) => number(reference[name], 4))], [t("models.candidate"), ...names.map((name) => number(candidate[name], 4))]], "");
}

function exponent(value) { return typeof value === "number" ? value.toExponential(2) : "–"; }
