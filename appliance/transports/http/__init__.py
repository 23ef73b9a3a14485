"""Open Inference Protocol v2 over HTTP."""

from appliance.transports.http.transport import HttpTransport

__all__ = ["HttpTransport"]
