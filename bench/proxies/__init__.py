"""The proxies that are measured, each run at its best and behind the same few calls."""
