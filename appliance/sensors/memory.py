"""/proc/meminfo, as bytes by name. Pure; used by the host's sampler and for GPUs that share the host's memory."""

from __future__ import annotations


def memory_info(text: str) -> dict[str, int]:
    """Bytes by the kernel's names; lines that are not understood are left out."""
    found = {}
    for line in text.splitlines():
        name, _, rest = line.partition(":")
        words = rest.split()
        if words and words[0].isdecimal():
            found[name] = int(words[0]) * (1024 if len(words) > 1 else 1)
    return found
