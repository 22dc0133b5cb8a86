"""Sources of workloads. Nothing below here knows nginx."""

from __future__ import annotations

from agent.discovery.base import NullObserver, Observer, Source, SourceStatus
from agent.discovery.factory import AutoSource, build_sources

__all__ = ["AutoSource", "NullObserver", "Observer", "Source", "SourceStatus", "build_sources"]
