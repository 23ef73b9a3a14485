// Charts over time by plotly, which is loaded when the first one is wanted. Colours come from the style sheet, so both themes fit.

import { t } from "./text.js";

let loading = null;

export function plotly() {
  loading ??= new Promise((resolve, reject) => {
    const script = document.createElement("script");
    script.src = "/page/plotly.js";
    script.onload = () => resolve(globalThis.Plotly);
    script.onerror = () => { loading = null; reject(new Error(t("history.no_library"))); };
    document.head.append(script);
  });
  return loading;
}

export function colour(name) { return getComputedStyle(document.documentElement).getPropertyValue(`--${name}`).trim(); }

export const SERIES = ["#2f6fb7", "#c8741a", "#3d9a5f", "#9a4fb0", "#b8405e", "#4a9bb5", "#8a7a2e", "#6b7280"];

export function layout(extra) {
  const text = colour("text"), line = colour("line");
  return {
    paper_bgcolor: "rgba(0,0,0,0)", plot_bgcolor: "rgba(0,0,0,0)", font: { color: text, family: "system-ui, sans-serif", size: 12 },
    margin: { l: 56, r: 16, t: 8, b: 32 }, hovermode: "x unified", hoverlabel: { bgcolor: colour("panel"), bordercolor: line, font: { color: text } },
    legend: { orientation: "h", y: -0.08, font: { size: 11 } }, dragmode: "zoom", ...extra,
  };
}

export function axis(extra) { return { gridcolor: colour("line"), zerolinecolor: colour("line"), linecolor: colour("line"), automargin: true, ...extra }; }

// no tool bar: one of its buttons would send the chart to the library's makers
export const CONFIG = { displayModeBar: false, displaylogo: false, responsive: true, doubleClick: "autosize", plotlyServerURL: "" };
