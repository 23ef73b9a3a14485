// The appliance's documents that views ask for, and their addresses: the only place that knows them.

import { get, post } from "./store.js";

const query = (values) => new URLSearchParams(Object.entries(values).filter(([, value]) => value !== undefined && value !== ""));

// The recorder speaks of seconds since 1970 and answers for so many names at a time.
const NAMES_AT_ONCE = 64;

// By name: {time, min, mean, max, step_s, tier_s}. `step_s` asks for moments that far apart; without it there are up to 600 of them.
export async function history(names, since, until, step_s) {
  const found = {};
  for (let first = 0; first < names.length; first += NAMES_AT_ONCE) {
    const asked = names.slice(first, first + NAMES_AT_ONCE).join(",");
    const answer = await get(`/v2/appliance/history?${query({ names: asked, since, until, step: step_s, points: 600 })}`);
    for (const [name, columns] of Object.entries(answer.series)) found[name] = { ...columns, time: answer.times, step_s: answer.step_s, tier_s: answer.tier_s };
  }
  return found;
}

// Recorded events in the shape of live ones, newest first; `kinds` as ["gpu", "model.state"], all if there are none.
export const pastEvents = async (since, { until, kinds = [], limit = 500 } = {}) => {
  const { events } = await get(`/v2/appliance/events?${query({ since: since.toFixed(0), until: until && Math.ceil(until), kind: kinds.join(","), limit })}`);
  return events.reverse().map((event) => ({ id: event.id, topic: event.kind, time: new Date(event.time * 1000).toISOString(), data: event.fields, severity: event.severity }));
};

export const energy = async (since) => (await get(`/v2/appliance/energy?${query({ since: since.toFixed(0) })}`)).energy;
export const verification = (model) => get(`/v2/appliance/models/${encodeURIComponent(model)}/verification`);
export const workers = () => get("/v2/appliance/workers");
export const index = () => post("/v2/repository/index");
export const metadata = (model) => get(`/v2/models/${encodeURIComponent(model)}`);
export const configuration = (model) => get(`/v2/models/${encodeURIComponent(model)}/config`);
export const infer = (model, request) => post(`/v2/models/${encodeURIComponent(model)}/infer`, request);
export const load = (model) => post(`/v2/repository/models/${encodeURIComponent(model)}/load`);
export const unload = (model) => post(`/v2/repository/models/${encodeURIComponent(model)}/unload`);
