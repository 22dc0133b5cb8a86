"""Configuration: the schema of `config.toml` and where its text comes from."""
