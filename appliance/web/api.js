// The appliance's documents that views ask for, and their addresses: the only place that knows them.

import { get, post } from "./store.js";

const query = (values) => new URLSearchParams(Object.entries(values).filter(([, value]) => value !== undefined && value !== ""));

// The recorder speaks of seconds since 1970; at most 64 names at a time.
export const history = (names, since, until) => get(`/v2/appliance/history?${query({ names: names.slice(0, 64).join(","), since: since.toFixed(0), until: until?.toFixed(0), points: 600 })}`);

// Recorded events in the shape of live ones, newest first.
export const pastEvents = async (since, limit = 500) => {
  const { events } = await get(`/v2/appliance/events?${query({ since: since.toFixed(0), limit })}`);
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
