"""The operating system around us."""
