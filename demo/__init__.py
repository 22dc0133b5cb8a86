"""The pair on loopback, under load, without Docker: what `make demo` runs."""
