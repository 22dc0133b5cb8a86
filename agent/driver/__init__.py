"""The way to OpenResty. Nothing below here knows Docker."""
