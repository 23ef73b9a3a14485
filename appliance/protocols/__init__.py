"""Pure codecs between bytes and core values."""
