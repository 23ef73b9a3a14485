// What the box took: kWh, cost and CO2 of a period, by device and by model, with what is active, idle and unattributed shown apart.

import * as api from "../api.js";
import { h, meter, replace, table } from "../dom.js";
import { number, t } from "../text.js";

const PERIODS = { "24h": 86400, "7d": 7 * 86400, "30d": 30 * 86400, "1y": 365 * 86400 };

export function render(main) {
  const kept = (name, otherwise) => localStorage.getItem(name) ?? otherwise;
  const period = h("select", { "aria-label": t("energy.period") }, Object.keys(PERIODS).map((name) => h("option", { value: name, selected: name === kept("period", "7d") }, t(`range.${name}`))));
  const price = h("input", { type: "number", min: 0, step: 0.01, value: kept("price", "0.30"), "aria-label": t("energy.price") });
  const carbon = h("input", { type: "number", min: 0, step: 1, value: kept("carbon", "380"), "aria-label": t("energy.carbon") });
  const place = h("section", { class: "stack" });
  main.append(h("h1", {}, t("nav.energy")), h("div", { class: "panel row" }, h("label", { class: "row" }, t("energy.period"), period), h("label", { class: "row" }, t("energy.price"), price), h("label", { class: "row" }, t("energy.carbon"), carbon)), place);
  let ended = false;
  const draw = async () => {
    for (const [name, field] of [["period", period], ["price", price], ["carbon", carbon]]) localStorage.setItem(name, field.value);
    try {
      const sums = await api.energy(Date.now() / 1000 - PERIODS[period.value]);
      if (!ended) show(place, accounts(sums), Number(price.value), Number(carbon.value));
    } catch (error) { if (!ended) replace(place, h("p", { class: "bad", role: "alert" }, error.message)); }
  };
  for (const field of [period, price, carbon]) field.addEventListener("change", draw);
  draw();
  const timer = setInterval(draw, 30000);
  return () => { ended = true; clearInterval(timer); };
}

// The record's sums, in microjoules by device and kind, as one row a device, one a model, and a total. What is within another
// device (a Jetson's GPU in its board) counts once: there.
export function accounts(sums) {
  const devices = new Map(), models = new Map();
  for (const sum of sums) {
    const device = devices.get(sum.device) ?? { device: sum.device, within: sum.within ?? "", source: sum.source, estimated: false, total_j: 0, active_j: 0, idle_j: 0, unattributed_j: 0 };
    devices.set(sum.device, device);
    device.estimated ||= sum.estimated;
    if (sum.kind !== "model") { device[`${sum.kind}_j`] += sum.uj / 1e6; continue; }
    device.active_j += sum.uj / 1e6;
    if (device.within) continue;
    const split = sum.model.lastIndexOf(":");
    const model = models.get(sum.model) ?? { model: sum.model.slice(0, split), version: sum.model.slice(split + 1), joules: 0, inferences: 0 };
    models.set(sum.model, model);
    model.joules += sum.uj / 1e6;
    model.inferences += sum.items;
  }
  const total_j = [...devices.values()].reduce((sum, device) => sum + (device.within ? 0 : device.total_j), 0);
  return { devices: [...devices.values()], models: [...models.values()], total_j };
}

function show(place, { devices, models, total_j }, price, carbon) {
  if (!devices.length) { replace(place, h("p", { class: "panel empty" }, t("energy.nothing"))); return; }
  const kwh = total_j / 3.6e6;
  const tile = (name, value, unit) => h("div", { class: "panel tile" }, h("div", { class: "name" }, t(name)), h("div", { class: "value" }, value, h("span", { class: "unit" }, ` ${unit}`)));
  replace(place, h("div", { class: "grid" }, tile("energy.total", number(kwh, 3), "kWh"), tile("energy.cost", number(kwh * price, 2), ""), tile("energy.co2", number((kwh * carbon) / 1000, 3), "kg")),
    h("div", { class: "panel" }, h("h2", {}, t("energy.devices")), table(
      [{ title: t("energy.device"), text: true }, { title: t("energy.source"), text: true }, { title: "kWh" }, { title: t("energy.active") }, { title: t("energy.idle") }, { title: t("energy.unattributed") }, { title: "", text: true }],
      devices.map((device) => [device.within ? `${device.device} ⊂ ${device.within}` : device.device, device.estimated ? `${device.source} (${t("energy.estimate")})` : device.source, number(device.total_j / 3.6e6, 3), number(device.active_j / 3.6e6, 3), number(device.idle_j / 3.6e6, 3), number(device.unattributed_j / 3.6e6, 3), h("span", { class: "bar" }, meter(device.idle_j + device.unattributed_j, device.active_j))]), "")),
    h("div", { class: "panel" }, h("h2", {}, t("energy.by_model")), table(
      [{ title: t("models.name"), text: true }, { title: t("models.version") }, { title: "kWh" }, { title: t("energy.inferences") }, { title: t("energy.per_thousand") }, { title: t("energy.cost") }],
      models.map((model) => [model.model, model.version, number(model.joules / 3.6e6, 4), number(model.inferences), model.inferences ? `${number((model.joules / model.inferences) * 1000)} J` : "–", number((model.joules / 3.6e6) * price, 3)]), t("energy.no_models"))));
}
