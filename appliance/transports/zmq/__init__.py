"""AIP1 over ZeroMQ."""

from appliance.transports.zmq.transport import ZmqTransport

__all__ = ["ZmqTransport"]
