"""Model versions from the folder on disk to READY and back."""
