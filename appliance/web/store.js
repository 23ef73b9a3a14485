// What the appliance says, live: one event stream, the last snapshot, and a few minutes of each value. Views subscribe; they never poll.

const KEPT = 300;
// Snapshots come every second. A pulled cable or a stuck loop breaks no connection, so silence is what tells.
const SILENCE_MS = 5000, LOOK_MS = 1000;

export const store = { snapshot: null, events: [], trail: new Map(), rates: new Map(), connected: false, boot: null };
const listeners = new Set();
let source = null, before = null, retry = null, watch = null, heard = 0;

export function subscribe(listener) {
  listeners.add(listener);
  return () => listeners.delete(listener);
}

function tell(what) { for (const listener of [...listeners]) listener(what); }

export function connect() {
  source?.close();
  heard = performance.now();
  watch ??= watched();
  source = new EventSource("/v2/appliance/stream");
  source.addEventListener("snapshot", (message) => take(JSON.parse(message.data)));
  source.addEventListener("event", (message) => {
    store.events.unshift(JSON.parse(message.data));
    store.events.length = Math.min(store.events.length, 500);
    tell("event");
  });
  source.onerror = () => {
    lost();
    // the browser tries again by itself unless the answer was an error; then we do
    if (source.readyState === EventSource.CLOSED) { clearTimeout(retry); retry = setTimeout(connect, 1000); }
  };
}

function lost() {
  if (store.connected) { store.connected = false; tell("link"); }
}

function watched() {
  let looked = performance.now();
  return setInterval(() => {
    const now = performance.now(), late = now - looked > 3 * LOOK_MS;
    looked = now;
    // a page that was itself asleep or busy has unread snapshots: they come first
    if (late || now - heard < SILENCE_MS) return;
    lost();
    connect();
  }, LOOK_MS);
}

function take(snapshot) {
  const now = performance.now();
  heard = now;
  if (store.boot !== snapshot.boot) { before = null; store.rates.clear(); store.boot = snapshot.boot; }
  if (before) {
    const seconds = (now - before.now) / 1000;
    for (const model of snapshot.models) {
      const key = `${model.name}:${model.version}`, old = before.models.get(key);
      if (old && seconds > 0) {
        const requests = model.success + model.fail - old.success - old.fail;
        const kept = store.rates.get(key) ?? requests / seconds;
        store.rates.set(key, kept + (requests / seconds - kept) * 0.3);
      }
    }
  }
  before = { now, models: new Map(snapshot.models.map((model) => [`${model.name}:${model.version}`, model])) };
  store.snapshot = snapshot;
  for (const [name, value] of Object.entries(snapshot.readings ?? {})) remember(name, value);
  remember("processor_temperature", snapshot.processor_temperature);
  remember("requests_per_s", snapshot.status.requests_per_s);
  remember("p99_us", Math.max(0, ...snapshot.models.map((model) => model.p99_us ?? 0)));
  const was = store.connected;
  store.connected = true;
  if (!was) tell("link");
  tell("snapshot");
}

function remember(name, value) {
  const trail = store.trail.get(name) ?? [];
  trail.push(typeof value === "number" ? value : null);
  if (trail.length > KEPT) trail.shift();
  store.trail.set(name, trail);
}

// A document of the appliance, or an Error with its own words.
export async function get(path) {
  const response = await fetch(path, { headers: { Accept: "application/json" } });
  return answer(response);
}

export async function post(path, body) {
  const response = await fetch(path, { method: "POST", headers: { "Content-Type": "application/json" }, body: body === undefined ? "" : JSON.stringify(body) });
  return answer(response);
}

async function answer(response) {
  const text = await response.text();
  let document = null;
  try { document = text ? JSON.parse(text) : null; } catch { /* a proxy's words, perhaps */ }
  if (!response.ok) throw new Error(document?.error ?? `${response.status} ${response.statusText}`);
  return document;
}
