"""What a person at a terminal is told when the appliance is up: where it listens, what it serves, what to try next."""

from __future__ import annotations

from collections.abc import Sequence


def render(addresses: Sequence[str], entries: Sequence[tuple[str, str, str]]) -> str:
    """The greeting. `entries` are name, version and state of each model."""
    url = next((address for address in addresses if address.startswith("http")), None)
    lines = ["", "  The appliance serves.", ""]
    lines += [f"    listens  {address}" for address in addresses]
    lines += [f"    model    {name} {version}  {state}" for name, version, state in entries]
    ready = [name for name, _, state in entries if state == "READY"]
    lines += ["", "  Try, in another terminal:", ""]
    if url is not None:
        lines.append(f"    curl {url}/v2/health/ready")
    if "digits" in ready:
        lines.append("    .venv/bin/appliance infer digits models/digits/samples/3.png")
    lines += ["    .venv/bin/appliance status", "", "  Ctrl-C drains and stops.", ""]
    return "\n".join(lines)
