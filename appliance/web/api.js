// The appliance's documents that views ask for, and their addresses: the only place that knows them.

import { get, post } from "./store.js";

const query = (values) => new URLSearchParams(Object.entries(values).filter(([, value]) => value !== undefined && value !== ""));

export const history = (names, since_s, until) => get(`/v2/appliance/history?${query({ names: names.join(","), since: since_s, until })}`);
export const pastEvents = (since_s, limit = 500) => get(`/v2/appliance/events/past?${query({ since: since_s, limit })}`);
export const energy = (since_s) => get(`/v2/appliance/energy?${query({ since: since_s })}`);
export const verification = (model) => get(`/v2/appliance/models/${encodeURIComponent(model)}/verification`);
export const workers = () => get("/v2/appliance/workers");
export const index = () => post("/v2/repository/index");
export const metadata = (model) => get(`/v2/models/${encodeURIComponent(model)}`);
export const configuration = (model) => get(`/v2/models/${encodeURIComponent(model)}/config`);
export const infer = (model, request) => post(`/v2/models/${encodeURIComponent(model)}/infer`, request);
export const load = (model) => post(`/v2/repository/models/${encodeURIComponent(model)}/load`);
export const unload = (model) => post(`/v2/repository/models/${encodeURIComponent(model)}/unload`);
