"""What is wrong with a bundle or with installing it, in words for the person who carries the stick."""

from __future__ import annotations


class BundleError(Exception):
    """A bundle that is refused, or an installation that did not work: what happened, and what to do."""

    def __init__(self, message: str, hint: str = "") -> None:
        super().__init__(message)
        self.message = message
        self.hint = hint
