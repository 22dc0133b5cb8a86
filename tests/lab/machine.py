"""The pieces a node is made of: network namespaces, a small "machine" per node, its dockerd.

A node is a process tree in its own network, mount, UTS and pid namespace:

* its network namespace hangs on a bridge that lives in a namespace of its own, with no way out;
* its own ``/run`` and ``/etc/docker`` let dockerd use its default paths (a stack that mounts
  ``/var/run/docker.sock`` or ``/var/run/docker/swarm/control.sock`` finds this node's), keep it
  from a containerd of the host, and can be reached from the host below the node's directory;
* mounts made by dockerd die with the mount namespace, and everything that runs dies with the pid
  namespace: whatever happens, killing one process leaves nothing of a node behind.
"""

from __future__ import annotations

import contextlib
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

from tests.lab import nameserver
from tests.lab.util import MARKER, LabError, environment, init_of, kill_all, marked, run, wait_for

NETNS_DIR = Path("/run/netns")
CGROUP_DIR = Path("/sys/fs/cgroup")

#: All addresses are from the block for benchmarking (RFC 2544): none of them is routed anywhere.
NODE_NETWORK = "198.18.0"
CLIENT_ADDRESS = f"{NODE_NETWORK}.2"
LOCAL_POOL = "198.18.128.0/17"
OVERLAY_POOL = "198.19.0.0/16"

# $1 host name, $2 directory of the node, the rest: what init runs. dockerd in a private /run cannot
# see a containerd of the host's (it would share it otherwise). Where no cgroups are mounted (a bare
# VM) they are mounted here.
_SETUP = r"""
set -e
hostname "$1"
mount --bind "$2/run" /run
mount --bind "$2/etc" /etc/docker
if ! grep -q ' cgroup2\? ' /proc/mounts; then
    mount -t cgroup2 cgroup2 /sys/fs/cgroup
fi
touch /run/machine-ready
shift 2
exec docker-init -- "$@"
"""


def netns(lab: str, part: str) -> str:
    """The name of one of the lab's network namespaces: ``bridge``, ``client``, ``nodeN``."""
    return f"tidegate-{lab}-{part}"


def existing_netns(lab: str) -> list[str]:
    """The network namespaces of this lab that exist, whoever made them and whatever they hold."""
    pattern = re.compile(rf"tidegate-{re.escape(lab)}-(bridge|client|node\d+)")
    try:
        return sorted(entry.name for entry in NETNS_DIR.iterdir() if pattern.fullmatch(entry.name))
    except FileNotFoundError:
        return []


def node_address(number: int) -> str:
    return f"{NODE_NETWORK}.{10 + number}"


def create_network(lab: str, nodes: int) -> None:
    """A bridge in its own namespace, and one namespace each for the client and the nodes.

    Nothing of it is ever in the host's namespace, where a dockerd's FORWARD policy would filter it.
    """
    bridge = netns(lab, "bridge")
    lines = ["link add br0 type bridge forward_delay 0", "link set br0 up", "link set lo up"]
    run("ip", "netns", "add", bridge)
    ends = [("client", CLIENT_ADDRESS)]
    ends += [(f"node{number}", node_address(number)) for number in range(1, nodes + 1)]
    for index, (part, address) in enumerate(ends):
        name = netns(lab, part)
        run("ip", "netns", "add", name)
        lines += [
            f"link add port{index} type veth peer name eth0 netns {name}",
            f"link set port{index} master br0 up",
        ]
        inside = f"link set lo up\naddress add {address}/24 dev eth0\nlink set eth0 up\n"
        # The batch is applied to the end's namespace once the link exists.
        run("ip", "-n", bridge, "-batch", "-", stdin="\n".join(lines) + "\n")
        run("ip", "-n", name, "-batch", "-", stdin=inside)
        lines = []


def delete_network(lab: str) -> None:
    """Kill what still runs in the lab's network namespaces, then delete them."""
    names = existing_netns(lab)

    def inhabitants() -> list[int]:
        return [int(pid) for name in names for pid in _netns_pids(name)]

    kill_all(inhabitants)
    for name in names:
        run("ip", "netns", "delete", name)


def _netns_pids(name: str) -> list[str]:
    # `ip netns add` killed half-way leaves an empty file that is no namespace: nothing runs there.
    with contextlib.suppress(LabError):
        return run("ip", "netns", "pids", name).split()
    return []


def start_machine(root: Path, number: int, network: str) -> int:
    """Start the namespaces of a node; returns the pid of its init."""
    hostname = f"node{number}"
    for directory in ("run", "etc", "data"):
        (root / directory).mkdir(parents=True, exist_ok=True)
    Path("/etc/docker").mkdir(exist_ok=True)
    ready = root / "run" / "machine-ready"
    ready.unlink(missing_ok=True)
    (root / "run" / "docker.pid").unlink(missing_ok=True)
    with (root / "machine.log").open("ab") as log:
        # setsid --fork: it outlives us, and is no child of ours that we would have to wait for.
        # nsenter and not `ip netns exec`: the latter mounts a new /sys and hides the cgroups.
        subprocess.run(
            [
                *("setsid", "--fork", "nsenter", f"--net={NETNS_DIR / network}"),
                *("unshare", "--mount", "--uts", "--pid", "--fork", "--kill-child", "--mount-proc"),
                *("sh", "-c", _SETUP, "machine", hostname, str(root)),
                *(sys.executable, "-S", "-E", nameserver.__file__, node_address(number)),
            ],
            env=environment(**{MARKER: str(root)}),
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=log,
            cwd="/",
            check=True,
        )
    try:
        wait_for(ready.exists, 15, f"{hostname}: namespaces ready")
        init = wait_for(lambda: init_of(root), 5, f"{hostname}: init runs")
    except LabError as error:
        raise LabError(f"{error}\n{tail(root / 'machine.log')}") from error
    assert init
    return init


def start_dockerd(root: Path, init: int, number: int, cgroup: str, *options: str) -> None:
    """Start the node's dockerd, with further options; the caller waits until it answers."""
    (root / "run" / "docker.pid").unlink(missing_ok=True)
    command = [
        "dockerd",
        f"--data-root={root / 'data'}",
        "--host=unix:///var/run/docker.sock",
        # Not systemd's, also where the host runs it: the machine has no bus.
        "--exec-opt=native.cgroupdriver=cgroupfs",
        f"--cgroup-parent={cgroup}",
        f"--bip=198.18.{100 + number}.1/24",
        f"--default-address-pool=base={LOCAL_POOL},size=24",
        f"--dns={node_address(number)}",  # nameserver.py
        "--log-level=info",
        *options,
    ]
    with (root / "dockerd.log").open("ab") as log:
        subprocess.run(
            [
                *("setsid", "--fork", "nsenter", f"--target={init}"),
                *("--mount", "--uts", "--net", "--pid", "--", *command),
            ],
            env=environment(**{MARKER: str(root)}),
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=log,
            cwd="/",
            check=True,
        )


def delete_machine(root: Path, cgroup: str) -> int:
    """Kill a node (or all below a lab's directory) and delete its files; how many were killed."""
    killed = kill_all(lambda: marked(root))
    delete_cgroups(cgroup)
    shutil.rmtree(root, ignore_errors=True)
    if root.exists():  # once more, and this time say what is in the way
        shutil.rmtree(root)
    return killed


def delete_cgroups(cgroup: str) -> None:
    """Remove the (empty) cgroups that dockerd and runc leave behind when they are killed."""
    name = cgroup.strip("/")
    roots = [CGROUP_DIR / name, *CGROUP_DIR.glob(f"*/{name}")]
    for root in roots:
        if not root.is_dir():
            continue

        def removed(root: Path = root) -> bool:
            for directory, _, _ in os.walk(root, topdown=False):
                Path(directory).rmdir()
            return True

        # A killed process leaves its cgroup a moment after it is gone from /proc.
        with contextlib.suppress(LabError):
            wait_for(removed, 3, f"{root} removed")
    parent = name.rpartition("/")[0]
    if parent:
        for directory in [CGROUP_DIR / parent, *CGROUP_DIR.glob(f"*/{parent}")]:
            with contextlib.suppress(OSError):
                directory.rmdir()


def tail(path: Path, lines: int = 15) -> str:
    """The end of a log, for error messages."""
    try:
        return "\n".join(path.read_text(errors="replace").splitlines()[-lines:])
    except OSError as error:
        return f"({error})"
