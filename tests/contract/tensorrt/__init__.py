"""The TensorRT API that the code relies on, held against the real bindings of several releases, without a GPU."""
