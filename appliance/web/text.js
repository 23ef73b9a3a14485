// What the page says, in the reader's language. The words lie in text/*.json; code only names them.

export const LANGUAGES = { en: "English", zh: "中文" };
let words = {}, fallback = {}, language = "en";

export async function choose(wanted) {
  language = wanted in LANGUAGES ? wanted : "en";
  const get = async (name) => (await fetch(`/page/text/${name}.json`)).json();
  fallback = await get("en");
  words = language === "en" ? fallback : await get(language);
  document.documentElement.lang = language;
}

export function preferred() {
  const kept = localStorage.getItem("language");
  if (kept) return kept;
  return (navigator.languages ?? []).map((tag) => tag.slice(0, 2)).find((tag) => tag in LANGUAGES) ?? "en";
}

// The text of that name with {places} filled in; plural forms as name.one and name.other by the count {n}.
export function t(name, values = {}) {
  const form = "n" in values ? `${name}.${new Intl.PluralRules(language).select(values.n)}` : name;
  const template = words[form] ?? words[`${name}.other`] ?? words[name] ?? fallback[form] ?? fallback[`${name}.other`] ?? fallback[name] ?? name;
  return template.replace(/\{(\w+)\}/g, (whole, key) => (key in values ? format(values[key]) : whole));
}

export function has(name) { return name in words || name in fallback; }

function format(value) { return typeof value === "number" ? number(value) : String(value); }

export function number(value, digits) {
  if (value === null || value === undefined || Number.isNaN(value)) return "–";
  const size = Math.abs(value);
  const places = digits ?? (size >= 100 || Number.isInteger(value) ? 0 : size >= 10 ? 1 : 2);
  return value.toLocaleString(language, { maximumFractionDigits: places, minimumFractionDigits: digits ?? 0 });
}

export function bytes(value) {
  if (typeof value !== "number") return "–";
  for (const [unit, size] of [["TB", 1e12], ["GB", 1e9], ["MB", 1e6], ["kB", 1e3]]) if (Math.abs(value) >= size) return `${number(value / size)} ${unit}`;
  return `${number(value)} B`;
}

export function milliseconds(us) { return us ? `${number(us / 1000)} ms` : "–"; }

export function clock(when) {
  const moment = new Date(when);
  const today = moment.toDateString() === new Date().toDateString();
  return moment.toLocaleString(language, today ? { timeStyle: "medium" } : { dateStyle: "short", timeStyle: "medium" });
}

export function duration(seconds) {
  for (const [unit, size] of [["day", 86400], ["hour", 3600], ["minute", 60]])
    if (seconds >= size) return new Intl.NumberFormat(language, { style: "unit", unit, maximumFractionDigits: 1 }).format(seconds / size);
  return new Intl.NumberFormat(language, { style: "unit", unit: "second", maximumFractionDigits: 0 }).format(seconds);
}
