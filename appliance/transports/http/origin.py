"""Which web pages may change something here: those that this machine itself serves.

A browser on the plant network can be made to send requests by any page it shows. It always names the page in `Origin`; programs
send none. Comparing Origin with Host is not enough: a page may have its own name resolve to our address (DNS rebinding), and then
both agree, so the name must be one that nobody else can own.
"""

from __future__ import annotations

import ipaddress
import os
import re
from collections.abc import Mapping

from appliance.core.errors import ApplianceError, ErrorCode

_ORIGIN = re.compile(r"https?://([^/?#@]+)")
_HOST = re.compile(r"(\[[0-9a-fA-F:.]+\]|[A-Za-z0-9._-]+)(?::[0-9]{1,5})?")


def check_origin(headers: Mapping[str, str]) -> None:
    """PERMISSION_DENIED if a web page of another site sent this."""
    origin = headers.get("Origin")
    if origin is None:
        return
    match = _ORIGIN.fullmatch(origin)
    if match is None or match[1].lower() != headers.get("Host", "").lower() or not _ours(match[1]):
        raise ApplianceError(
            ErrorCode.PERMISSION_DENIED,
            "a web page of another origin may not change anything here; use the command line",
        )


def _ours(authority: str) -> bool:
    """Whether a host is an address, localhost, or this machine's own name."""
    match = _HOST.fullmatch(authority)
    if match is None:
        return False
    host = match[1].lower().strip("[]")
    try:
        ipaddress.ip_address(host)
    except ValueError:
        name = os.uname().nodename.lower()
        return host in ("localhost", name, f"{name}.local")
    return True
