"""SwarmKit's Watch messages, generated from `watch.proto`; regenerate, never edit."""
