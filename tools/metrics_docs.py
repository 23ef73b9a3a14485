"""Write the table of all metrics into docs/monitoring.md, from the families that the code declares."""

from __future__ import annotations

from pathlib import Path

from appliance.observability.metrics import FAMILIES

PAGE = Path(__file__).parents[1] / "docs" / "monitoring.md"
BEGIN = "<!-- metrics: made by tools/metrics_docs.py -->\n"
END = "<!-- end of metrics -->\n"


def table() -> str:
    """Name, type, labels and meaning of every metric, as Markdown."""
    rows = ["| name | type | labels | meaning |", "|---|---|---|---|"]
    for family in FAMILIES:
        labels = ", ".join(f"`{name}`" for name in family.labels)
        rows.append(f"| `{family.name}` | {family.kind} | {labels} | {family.help} |")
    return "\n".join(rows) + "\n"


def page(text: str) -> str:
    """The page with the table as it must be. ValueError if the marks between which it stands are gone."""
    before, begin, rest = text.partition(BEGIN)
    _, end, after = rest.partition(END)
    if not (begin and end):
        raise ValueError(f"{PAGE.name} has lost its marks {BEGIN.strip()!r} and {END.strip()!r}")
    return before + BEGIN + table() + END + after


if __name__ == "__main__":
    PAGE.write_text(page(PAGE.read_text()))
