"""The appliance as a service of a real systemd, which is PID 1 of namespaces of its own."""
