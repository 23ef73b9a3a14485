// From a snapshot to one sentence: how it is, how bad that is, and what to do. Pure; the overview and the tab's title use it.

import { number, t } from "./text.js";

export const SEVERITY = { good: 0, notice: 1, bad: 2 };

// What the overview shows and the tab's title marks: as of now, or that nobody answers.
export function verdict(snapshot, connected) {
  return connected ? health(snapshot) : { severity: "off", found: [], sentence: t("link.lost_long") };
}

export function health(snapshot) {
  const found = [];
  const say = (severity, text, fix = "") => found.push({ severity, text, fix });
  if (snapshot.status.draining) say("notice", t("health.draining"));
  for (const model of snapshot.models) {
    if (model.detail === "FAILED") say("bad", t(model.version ? "health.failed" : "health.folder", { model: model.name, version: model.version, reason: model.reason }));
    else if (model.state === "LOADING") say("notice", t("health.loading", { model: model.name, detail: model.detail, reason: model.reason }));
  }
  const governor = snapshot.governor;
  if (governor && governor.level !== "NOMINAL") say(governor.level === "WARM" ? "notice" : "bad", t("health.governor", { level: t(`level.${governor.level}`), reason: governor.reason }));
  if (snapshot.recorder?.problem) say("notice", t("health.recorder", { reason: snapshot.recorder.problem }));
  for (const finding of snapshot.findings ?? []) say(finding.severity === "error" ? "bad" : "notice", finding.text, finding.fix);
  // a model that does not answer has a reason above, as a rule
  if (!snapshot.status.ready && !snapshot.status.draining && !found.some((item) => item.severity === "bad")) say("bad", t("health.not_ready"));
  const severity = found.some((item) => item.severity === "bad") ? "bad" : found.length ? "notice" : "good";
  return { severity, found: found.sort((a, b) => SEVERITY[b.severity] - SEVERITY[a.severity]), sentence: sentence(snapshot, severity, found) };
}

function sentence(snapshot, severity, found) {
  const answering = new Set(snapshot.models.filter((model) => answers(model)).map((model) => model.name)).size;
  const parts = [t("health.models", { n: answering }), t("health.rate", { rate: number(snapshot.status.requests_per_s) })];
  const hottest = Math.max(...Object.entries(snapshot.readings ?? {}).filter(([name, value]) => /^gpu\.\d+\.temperature$/.test(name) && value !== null).map(([, value]) => value));
  if (Number.isFinite(hottest)) parts.push(t("health.gpu", { temperature: number(hottest, 0) }));
  const facts = parts.join(t("list.comma"));
  if (severity === "good") return t("health.good", { facts });
  return t(severity === "bad" ? "health.bad" : "health.notice", { n: found.filter((item) => item.severity === severity).length, facts });
}

export const answers = (model) => model.state === "READY" && model.answering !== false;
