"""One module for each scene: what is done to the proxies, what is looked at, how it is told."""
