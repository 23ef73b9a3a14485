"""The engines, each on its own."""
