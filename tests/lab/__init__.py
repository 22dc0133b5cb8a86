"""The lab: a real Docker Swarm of several nodes on one machine, without a way out of it.

``python -m tests.lab up`` makes it, ``python -m tests.lab down`` takes it away; tests take it from
the ``lab`` fixture, everything else from :class:`Lab`.
"""

from tests.lab.builder import Images
from tests.lab.lab import Lab, Node
from tests.lab.util import LabError, missing_prerequisites, wait_for

__all__ = ["Images", "Lab", "LabError", "Node", "missing_prerequisites", "wait_for"]
