"""Small files that the checkers must pass or must complain about, line by line; nothing here is imported."""
