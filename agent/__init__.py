"""Tidegate's agent: watches a cluster and keeps OpenResty instances in step with it."""

from __future__ import annotations

__version__ = "0.1.0"
