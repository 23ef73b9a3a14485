// The frame: navigation, language, theme, the link's state, and one view at a time by the part of the address after #.

import { h, replace } from "./dom.js";
import { verdict } from "./health.js";
import { connect, store, subscribe } from "./store.js";
import { choose, LANGUAGES, preferred, t } from "./text.js";

const VIEWS = ["overview", "history", "models", "events", "try", "energy"];
const view = { name: null, end: null };

function theme(wanted) {
  const dark = wanted ? wanted === "dark" : matchMedia("(prefers-color-scheme: dark)").matches;
  document.documentElement.dataset.theme = dark ? "dark" : "light";
  document.dispatchEvent(new Event("theme"));
}

function frame() {
  const language = document.getElementById("language");
  replace(language, Object.entries(LANGUAGES).map(([key, name]) => h("option", { value: key, selected: key === document.documentElement.lang }, name)));
  language.setAttribute("aria-label", t("language"));
  const button = document.getElementById("theme");
  button.textContent = document.documentElement.dataset.theme === "dark" ? "☀" : "☾";
  button.title = t("theme");
  button.setAttribute("aria-label", t("theme"));
  document.querySelector(".skip").textContent = t("skip");
  navigation();
  link();
}

function navigation() {
  const current = route().name;
  replace(document.getElementById("nav"), VIEWS.map((name) =>
    h("a", { href: `#${name}`, "aria-current": name === current ? "page" : null }, t(`nav.${name}`))));
}

// How it is, before the view's name: seen from another tab, too.
const SIGNS = { good: "", notice: "● ", bad: "⚠ ", off: "✕ " };

function title() {
  const sign = store.snapshot ? SIGNS[verdict(store.snapshot, store.connected).severity] : "";
  const wanted = `${sign}${t(`nav.${route().name}`)} · appliance`;
  if (document.title !== wanted) document.title = wanted;
}

function link() {
  const place = document.getElementById("link");
  place.classList.toggle("bad", !store.connected && store.snapshot !== null);
  place.textContent = store.connected ? `${t("link.live")} · ${store.snapshot.status.version}` : store.snapshot ? t("link.lost") : t("link.connecting");
}

function route() {
  const [name, ...rest] = location.hash.slice(1).split("/").map(decodeURIComponent);
  return { name: VIEWS.includes(name) ? name : "overview", rest };
}

async function show() {
  const { name, rest } = route();
  view.end?.();
  view.end = null;
  view.name = name;
  navigation();
  title();
  const main = document.getElementById("main");
  const { render } = await import(`./views/${name}.js`);
  if (view.name !== name) return;
  replace(main);
  view.end = render(main, rest);
}

async function start() {
  theme(localStorage.getItem("theme"));
  await choose(preferred());
  frame();
  document.getElementById("language").addEventListener("change", async (event) => {
    localStorage.setItem("language", event.target.value);
    await choose(event.target.value);
    frame();
    show();
  });
  document.getElementById("theme").addEventListener("click", () => {
    const next = document.documentElement.dataset.theme === "dark" ? "light" : "dark";
    localStorage.setItem("theme", next);
    theme(next);
    frame();
  });
  addEventListener("hashchange", show);
  subscribe((what) => { if (what === "link") link(); if (what !== "event") title(); });
  connect();
  show();
}

start();
