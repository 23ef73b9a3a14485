"""AIP1 over ZeroMQ."""
