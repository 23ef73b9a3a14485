"""The Python client: numpy in, numpy out."""
