"""What the box measures of itself."""
