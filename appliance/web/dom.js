// Elements, made safely: text is always text, never markup. Who builds a view uses `h`; nothing here knows the appliance.

export function h(tag, attributes = {}, ...children) {
  const element = document.createElement(tag);
  fill(element, attributes, children);
  return element;
}

export function s(tag, attributes = {}, ...children) {
  const element = document.createElementNS("http://www.w3.org/2000/svg", tag);
  fill(element, attributes, children);
  return element;
}

function fill(element, attributes, children) {
  for (const [name, value] of Object.entries(attributes)) {
    if (value === undefined || value === null || value === false) continue;
    if (name.startsWith("on")) element.addEventListener(name.slice(2), value);
    else if (name === "value" && "value" in element) element.value = value;
    else element.setAttribute(name, value === true ? "" : value);
  }
  element.append(...children.flat(Infinity).filter((child) => child !== null && child !== undefined && child !== false));
}

export function replace(parent, ...children) {
  parent.replaceChildren(...children.flat(Infinity).filter(Boolean));
}

// A sentence with `commands` in it.
export function prose(text) { return text.split("`").map((part, index) => (index % 2 ? h("code", {}, part) : part)); }

// A name of many words in one, breakable before its capitals: CPU|ExecutionProvider.
export function breakable(text) { return text.split(/(?<=[a-z0-9]|[A-Z]{2})(?=[A-Z][a-z])/).flatMap((part, index) => (index ? [h("wbr"), part] : [part])); }

// A table: columns are {title, text: left-aligned?}, rows are arrays of cells (text or elements), or {cells, onclick, key, note}.
// A note is a sentence about its row, below it and as wide as the table.
export function table(columns, rows, empty) {
  if (!rows.length) return h("p", { class: "empty" }, empty);
  const head = h("tr", {}, columns.map((column) => h("th", { class: column.text ? "text" : null, scope: "col" }, column.title)));
  const body = rows.map((row) => {
    const cells = row.cells ?? row;
    const line = h("tr", { class: [row.onclick && "open", row.note && "noted"].filter(Boolean).join(" ") || null, tabindex: row.onclick ? 0 : null, onclick: row.onclick, "data-key": row.key },
      cells.map((cell, index) => h("td", { class: columns[index].text ? "text" : null }, cell ?? "–")));
    if (row.onclick) line.addEventListener("keydown", (event) => { if (event.key === "Enter") row.onclick(event); });
    return row.note ? [line, h("tr", { class: row.onclick ? "note open" : "note", onclick: row.onclick }, h("td", { class: "text", colspan: columns.length }, row.note))] : line;
  });
  return h("div", { class: "wide" }, h("table", {}, h("thead", {}, head), h("tbody", {}, body)));
}

// A line of recent values, scaled to its own range; gaps where there was nothing.
export function spark(values) {
  const known = values.filter((value) => typeof value === "number");
  if (known.length < 2) return s("svg", { class: "spark", viewBox: "0 0 100 30" });
  const low = Math.min(...known), span = Math.max(...known) - low || 1;
  let path = "", pen = "M";
  values.forEach((value, index) => {
    if (typeof value !== "number") { pen = "M"; return; }
    path += `${pen}${((index / (values.length - 1)) * 100).toFixed(2)},${(28 - ((value - low) / span) * 26).toFixed(2)}`;
    pen = "L";
  });
  return s("svg", { class: "spark", viewBox: "0 0 100 30", preserveAspectRatio: "none", "aria-hidden": "true" }, s("path", { d: path }));
}

export function columns(entries) {
  const most = Math.max(1, ...entries.map(([, count]) => count));
  const width = 100 / Math.max(1, entries.length);
  return s("svg", { class: "columns", viewBox: "0 0 400 120", role: "img" }, entries.map(([label, count], index) => [
    s("rect", { x: index * width * 4 + 3, y: 96 - (count / most) * 84, width: Math.max(2, width * 4 - 6), height: (count / most) * 84, rx: 2 },
      s("title", {}, `${label}: ${count}`)),
    s("text", { x: (index + 0.5) * width * 4, y: 112, "text-anchor": "middle" }, label),
  ]));
}

export function meter(first, second) {
  const whole = first + second || 1;
  return s("svg", { class: "meter", viewBox: "0 0 100 12", preserveAspectRatio: "none", "aria-hidden": "true" },
    s("rect", { class: "first", x: 0, y: 0, width: (first / whole) * 100, height: 12 }),
    s("rect", { class: "second", x: (first / whole) * 100, y: 0, width: (second / whole) * 100, height: 12 }));
}
