"""The pure core: values in, actions out."""
