"""Worker processes: the front's side that starts, feeds and watches them, and the child's side."""
