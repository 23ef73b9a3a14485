"""The faces: HTTP and ZeroMQ."""
