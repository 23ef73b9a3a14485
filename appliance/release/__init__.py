"""Releases that come without a network: signed bundles, what they may contain, and how one is installed and taken back."""
