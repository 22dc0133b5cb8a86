"""A policy as JSON and back: on the wire, and in what the agent tells of itself.

Only what differs from the defaults is written, which are the same on both sides, so that a policy
nobody touched stays as short as it reads. This module must not know what a policy does.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from functools import lru_cache

from pydantic import TypeAdapter

from agent.model import Policy

_ADAPTER = TypeAdapter(Policy)


@lru_cache(maxsize=1024)
def to_json(policy: Policy) -> Mapping[str, object]:
    """The algorithm, and what else differs from the defaults. Shared: do not change it."""
    rest: dict[str, object] = _ADAPTER.dump_python(policy, mode="json", exclude_defaults=True)
    return {"algorithm": policy.algorithm.value} | rest


def from_json(value: Mapping[str, object]) -> Policy:
    """The policy of such a value; raises ValueError where it is none."""
    return _parsed(json.dumps(value))


@lru_cache(maxsize=1024)
def _parsed(text: str) -> Policy:
    return _ADAPTER.validate_json(text)
