// Try a model: drop a picture (or write numbers), see labels and probabilities, take the same call home as curl, Python or C++.

import * as api from "../api.js";
import { h, meter, prose, replace } from "../dom.js";
import { store, subscribe } from "../store.js";
import { number, t } from "../text.js";

const FLOATS = new Set(["FP32", "FP64", "FP16"]);
const JSON_TYPES = new Set(["FP32", "FP64", "INT8", "INT16", "INT32", "INT64", "UINT8", "UINT16", "UINT32", "UINT64", "BOOL", "BYTES"]);
const TOP = 5;

// (height, width, channels, channels first?) if an input looks like one picture; null otherwise.
export function picture(shape) {
  const [batch, a, b, c] = shape;
  if (shape.length !== 4 || batch > 1) return null;
  if ([1, 3].includes(c) && a > 3 && b > 3) return { height: a, width: b, channels: c, first: false };
  if ([1, 3].includes(a) && b > 3 && c > 3) return { height: b, width: c, channels: a, first: true };
  return null;
}

// The picture's pixels as that input wants them: 0..1 for floats, 0..255 for integers.
export function pixels(rgba, form, datatype) {
  const { height, width, channels, first } = form, scale = FLOATS.has(datatype) ? 1 / 255 : 1, count = height * width;
  const found = new Array(count * channels);
  for (let place = 0; place < count; place++) {
    const [red, green, blue] = [rgba[place * 4], rgba[place * 4 + 1], rgba[place * 4 + 2]];
    const values = channels === 1 ? [0.299 * red + 0.587 * green + 0.114 * blue] : [red, green, blue];
    values.forEach((value, channel) => { found[first ? channel * count + place : place * channels + channel] = scale === 1 ? Math.round(value) : value * scale; });
  }
  return found;
}

export function render(main, [wanted]) {
  const choice = h("select", { "aria-label": t("try.model") }), body = h("section", { class: "two" });
  main.append(h("div", { class: "row spread" }, h("h1", {}, t("nav.try")), h("label", { class: "row" }, t("try.model"), choice)), body);
  let names = "";
  const fill = () => {
    const found = [...new Set((store.snapshot?.models ?? []).filter((model) => model.state === "READY").map((model) => model.name))].sort();
    if (found.join() === names && body.children.length) return;
    names = found.join();
    const keep = choice.value || wanted;
    replace(choice, found.map((name) => h("option", { value: name, selected: name === keep }, name)));
    if (found.length) open(body, choice.value);
    else replace(body, h("p", { class: "empty" }, t("models.none")));
  };
  choice.addEventListener("change", () => open(body, choice.value));
  fill();
  return subscribe((what) => { if (what === "snapshot") fill(); });
}

async function open(body, name) {
  let model, configuration;
  try { [model, configuration] = await Promise.all([api.metadata(name), api.configuration(name)]); } catch (error) { replace(body, h("p", { class: "bad", role: "alert" }, error.message)); return; }
  const shape = (input) => input.shape.map((size) => (size < 0 ? 1 : size));
  const result = h("div", { class: "panel", id: "result", role: "status", "aria-live": "polite" }, h("p", { class: "empty" }, t("try.nothing_yet")));
  const code = h("div", { class: "panel" });
  const request = { inputs: model.inputs.map((input) => ({ name: input.name, datatype: input.datatype, shape: shape(input), data: new Array(shape(input).reduce((product, size) => product * size, 1)).fill(input.datatype === "BYTES" ? "" : 0) })) };
  const bare = model.inputs.find((input) => !JSON_TYPES.has(input.datatype));
  const run = async () => {
    if (bare) { replace(result, h("p", { class: "bad" }, t("try.binary_only", { input: bare.name, datatype: bare.datatype }))); return; }
    const begun = performance.now();
    try { show(result, await api.infer(name, request), configuration, performance.now() - begun); } catch (error) { replace(result, h("p", { class: "bad", role: "alert" }, error.message)); }
  };
  const inputs = request.inputs.map((input, index) => {
    const form = picture(model.inputs[index].shape);
    return h("div", {}, h("h2", {}, `${input.name} · ${input.datatype} [${model.inputs[index].shape.join(", ")}]`), form ? drop(input, form, run) : numbers(input));
  });
  replace(body, h("div", { class: "panel stack" }, inputs, h("button", { type: "button", class: "primary", onclick: run }, t("try.run"))), h("div", { class: "stack" }, result, code));
  snippets(code, name, model);
}

function drop(input, form, run) {
  const canvas = h("canvas", { width: form.width, height: form.height, hidden: true });
  const file = h("input", { type: "file", accept: "image/*", hidden: true });
  const zone = h("div", { class: "drop", tabindex: 0, role: "button", "aria-label": t("try.drop") }, h("p", {}, t("try.drop")), canvas, file);
  const take = async (blob) => {
    if (!blob) return;
    const bitmap = await createImageBitmap(blob), context = canvas.getContext("2d", { willReadFrequently: true });
    context.imageSmoothingQuality = "high";
    context.drawImage(bitmap, 0, 0, form.width, form.height);
    canvas.hidden = false;
    input.data = pixels(context.getImageData(0, 0, form.width, form.height).data, form, input.datatype);
    await run();
  };
  const said = (error) => replace(zone.querySelector("p"), t("try.no_picture", { reason: error.message }));
  zone.addEventListener("click", () => file.click());
  file.addEventListener("click", (event) => event.stopPropagation());
  zone.addEventListener("keydown", (event) => { if (event.key === "Enter" || event.key === " ") { event.preventDefault(); file.click(); } });
  file.addEventListener("change", () => take(file.files[0]).catch(said));
  zone.addEventListener("dragover", (event) => { event.preventDefault(); zone.classList.add("over"); });
  zone.addEventListener("dragleave", () => zone.classList.remove("over"));
  zone.addEventListener("drop", (event) => { event.preventDefault(); zone.classList.remove("over"); take(event.dataTransfer.files[0]).catch(said); });
  return zone;
}

function numbers(input) {
  const area = h("textarea", { spellcheck: "false", "aria-label": input.name }, JSON.stringify(input.data.slice(0, 2000)));
  area.addEventListener("input", () => {
    try { input.data = JSON.parse(area.value); area.setCustomValidity(""); } catch (error) { area.setCustomValidity(error.message); area.reportValidity(); }
  });
  return area;
}

function labels(configuration) {
  const text = configuration.parameters?.labels?.string_value ?? configuration.parameters?.labels;
  return Array.isArray(text) ? text : typeof text === "string" ? text.split("\n") : [];
}

function show(place, answer, configuration, milliseconds) {
  const names = labels(configuration);
  replace(place, h("p", { class: "quiet" }, t("try.answered", { model: answer.model_name, version: answer.model_version, ms: number(milliseconds) })),
    answer.outputs.map((output) => {
      const values = output.data, classes = values.length > 1 && values.length <= 10000 && values.every((value) => typeof value === "number");
      const sums = classes && Math.abs(values.reduce((sum, value) => sum + value, 0) - 1) < 0.01 && values.every((value) => value >= 0);
      const best = classes ? values.map((value, index) => [value, index]).sort((a, b) => b[0] - a[0]).slice(0, TOP) : [];
      return h("div", {}, h("h2", {}, `${output.name} · ${output.datatype} [${output.shape.join(", ")}]`),
        sums ? h("div", { class: "result" }, best.map(([value, index]) => [h("strong", {}, names[index] ?? String(index)), meter(0, value * 100).classList ? bar(value) : null, h("span", {}, `${number(value * 100, 1)} %`)]))
          : h("pre", {}, JSON.stringify(values.slice(0, 200)) + (values.length > 200 ? ` … ${values.length}` : "")));
    }));
}

function bar(share) {
  const found = meter(0, 1);
  found.querySelector(".second").setAttribute("width", share * 100);
  return found;
}

// By datatype: numpy's name, and nothing in JSON, in Python. numpy has no bfloat16; the client takes float32 for it.
const NUMPY = { FP64: "float64", FP32: "float32", FP16: "float16", BF16: "float32", BOOL: "bool_" };
const NOTHING = { BOOL: "False", BYTES: '""' };

// The same call as text, every input filled with nothing; `origin` is this page's, `endpoint` where programs ask.
export function calls(name, model, origin, endpoint) {
  const inputs = model.inputs.map((input) => ({ ...input, shape: input.shape.map((size) => (size < 0 ? 1 : size)) }));
  const quoted = JSON.stringify, bare = inputs.find((input) => !JSON_TYPES.has(input.datatype));
  const tensor = ({ name: called, datatype, shape }) => `{"name": ${quoted(called)}, "datatype": "${datatype}", "shape": ${quoted(shape)}, "data": [${NOTHING[datatype] ?? 0}] * ${shape.reduce((product, size) => product * size, 1)}}`;
  const array = ({ datatype, shape }) => (datatype === "BYTES" ? `np.full(${quoted(shape)}, b"", object)` : `np.zeros(${quoted(shape)}, np.${NUMPY[datatype] ?? datatype.toLowerCase()})`);
  const [first] = inputs, off = t("try.no_zmq"), single = inputs.length === 1 && first.datatype === "FP32";
  return {
    curl: bare ? `# ${t("try.binary_only", { input: bare.name, datatype: bare.datatype })}`
      : `python3 -c 'import json; print(json.dumps({"inputs": [${inputs.map(tensor).join(", ")}]}))' |\n  curl -s ${origin}/v2/models/${encodeURIComponent(name)}/infer -H 'Content-Type: application/json' -d @-`,
    Python: !endpoint ? `# ${off}` : `import numpy as np\nfrom appliance.client import Client\n\nwith Client("${endpoint}") as client:\n    inputs = {\n${inputs.map((input) => `        ${quoted(input.name)}: ${array(input)},\n`).join("")}    }\n    result = client.infer(${quoted(name)}, inputs, ttl_ms=1000)\n    print(result.outputs[${quoted(model.outputs[0].name)}])`,
    "C++": !endpoint ? `// ${off}` : `// docs/examples/cpp/infer.cpp: g++ -std=c++17 -O2 -o infer infer.cpp -lzmq\n${single ? `./infer ${endpoint} ${name} ${first.name} ${first.shape.join(",")}` : `// ${t("try.cpp_one")}`}`,
  };
}

// Whether it was copied. Only pages of this machine or over TLS have the clipboard; elsewhere the old way still works.
async function copied(element) {
  try {
    if (navigator.clipboard) { await navigator.clipboard.writeText(element.textContent); return true; }
  } catch { /* not allowed: the old way */ }
  getSelection().selectAllChildren(element);
  return document.execCommand("copy");
}

// Where a program asks: over TCP, else on this machine; "" where ZeroMQ is off. One that listens everywhere is reached as this page was.
export function endpoint(listens, hostname) {
  const tcp = listens.find((address) => address.startsWith("tcp://"));
  return tcp?.replace(/^tcp:\/\/(0\.0\.0\.0|\[::\]|\*):/, `tcp://${hostname}:`) ?? listens[0] ?? "";
}

// Whether programs of this machine alone reach those addresses.
export const local = (listens) => listens.length > 0 && listens.every((address) => /^(ipc:|inproc:|tcp:\/\/(127\.|localhost:|\[::1\]:))/.test(address));

function snippets(place, name, model) {
  const listens = store.snapshot?.endpoints?.inference ?? [];
  const texts = calls(name, model, location.origin, endpoint(listens, location.hostname));
  const text = h("pre", { tabindex: 0 }), copy = h("button", { type: "button", id: "copy" }, t("try.copy")), note = h("p", { class: "quiet" });
  const choose = (kind) => {
    text.textContent = texts[kind];
    replace(note, prose([t("try.as_written"), kind !== "curl" && local(listens) ? t("try.local") : ""].join(" ")));
    for (const button of tabs.children) button.setAttribute("aria-pressed", String(button.textContent === kind));
    copy.textContent = t("try.copy");
  };
  const tabs = h("div", { class: "row" }, Object.keys(texts).map((kind) => h("button", { type: "button", onclick: () => choose(kind) }, kind)));
  copy.addEventListener("click", async () => { copy.textContent = t(await copied(text) ? "try.copied" : "try.selected"); });
  replace(place, h("div", { class: "row spread" }, h("h2", {}, t("try.code")), copy), tabs, h("div", { class: "code" }, text), note);
  choose("curl");
}
