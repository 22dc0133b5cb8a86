"""``python -m tests.lab``: make, inspect, use and remove the lab from a shell."""

from __future__ import annotations

import argparse
import json
import os
import shlex
import sys
from collections.abc import Sequence
from pathlib import Path

from tests.lab.builder import NGINX_BASE, PYTHON_BASE, docker_command
from tests.lab.lab import DEFAULT_NAME, Lab
from tests.lab.util import LabError, Progress


def main(arguments: Sequence[str] | None = None) -> int:
    options = _parser().parse_args(arguments)
    try:
        return int(options.run(options))
    except LabError as error:
        print(f"lab: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("lab: interrupted; the next `up` or `down` cleans up", file=sys.stderr)
        return 130


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m tests.lab", description=__doc__)
    parser.add_argument(
        "--name",
        default=os.environ.get("TIDEGATE_LAB", DEFAULT_NAME),
        help="several labs can run side by side (default: %(default)s, or $TIDEGATE_LAB)",
    )
    commands = parser.add_subparsers(required=True, metavar="COMMAND")

    up = commands.add_parser("up", help="make the lab, or find the running one healthy")
    up.add_argument("--nodes", type=int, default=2, help="how many (default: %(default)s)")
    up.add_argument("--managers", type=int, default=1, help="how many of them are managers")
    up.add_argument("--fresh", action="store_true", help="make it anew even if one runs")
    up.add_argument("--rebuild-images", action="store_true", help="bootstrap Debian again")
    up.set_defaults(run=_up)

    down = commands.add_parser("down", help="remove the lab, and what crashed runs left of it")
    down.set_defaults(run=_down)

    status = commands.add_parser("status", help="nodes, sockets, Swarm state")
    status.add_argument("--json", action="store_true")
    status.set_defaults(run=_status)

    env = commands.add_parser("env", help='for a shell: eval "$(python -m tests.lab env)"')
    env.set_defaults(run=_env)

    build = commands.add_parser("build", help="build an image and load it on the nodes")
    build.add_argument("-f", "--file", required=True, help="Dockerfile, relative to the context")
    build.add_argument("-t", "--tag", required=True)
    build.add_argument(
        "--build-arg",
        action="append",
        default=[],
        metavar="NAME=VALUE",
        help=f"for example BASE={NGINX_BASE} or BASE={PYTHON_BASE}",
    )
    build.add_argument("context", nargs="?", default=".")
    build.set_defaults(run=_build)

    execute = commands.add_parser("exec", help="run a command as the client, or on a node")
    execute.add_argument("where", help="client, or a node's name")
    execute.add_argument("command", nargs=argparse.REMAINDER)
    execute.set_defaults(run=_exec)
    return parser


def _up(options: argparse.Namespace) -> int:
    lab = Lab.up(
        options.name,
        nodes=options.nodes,
        managers=options.managers,
        fresh=options.fresh,
        rebuild_images=options.rebuild_images,
        progress=Progress(show=True),
    )
    _print(lab)
    return 0


def _down(options: argparse.Namespace) -> int:
    Lab.down(options.name, progress=Progress(show=True))
    return 0


def _status(options: argparse.Namespace) -> int:
    lab = Lab.attach(options.name)
    trouble = lab.trouble()
    if options.json:
        print(json.dumps(_describe(lab) | {"trouble": trouble}, indent=2))
    else:
        _print(lab)
        print(f"state   {trouble or 'healthy'}")
    return 1 if trouble else 0


def _describe(lab: Lab) -> dict[str, object]:
    try:
        states = lab.node_states(timeout=5)
    except LabError:
        states = {}
    return {
        "name": lab.name,
        "client": {"netns": lab.client_netns, "address": lab.client_address},
        "nodes": [
            {
                "name": node.name,
                "role": "manager" if node in lab.managers else "worker",
                "swarm": states.get(node.name, "unknown"),
                "address": node.address,
                "netns": node.netns,
                "pid": node.pid,
                "dockerd_pid": lab.dockerd_pid(node),
                "socket": str(node.socket),
                "control_socket": str(node.control_socket) if node in lab.managers else None,
                "log": str(node.root / "dockerd.log"),
            }
            for node in lab.nodes
        ],
    }


def _print(lab: Lab) -> None:
    described = _describe(lab)
    print(f"lab     {lab.name}")
    print(f"client  {lab.client_address}  nsenter --net=/run/netns/{lab.client_netns}")
    nodes = described["nodes"]
    assert isinstance(nodes, list)
    for node in nodes:
        print(f"{node['name']:7} {node['address']}  {node['role']}, {node['swarm']}")
        print(f"        docker   {node['socket']}")
        if node["control_socket"]:
            print(f"        control  {node['control_socket']}")
        print(f"        dockerd  pid {node['dockerd_pid']}, netns {node['netns']}")
        print(f"        shell    nsenter --all --target {node['pid']}")
        print(f"        log      {node['log']}")


def _env(options: argparse.Namespace) -> int:
    lab = Lab.attach(options.name)
    values = {
        "TIDEGATE_LAB": lab.name,
        "DOCKER_HOST": f"unix://{lab.manager.socket}",
        "DOCKER_BUILDKIT": "0",
        "TIDEGATE_LAB_DOCKER": docker_command(),
        "TIDEGATE_LAB_CONTROL_SOCKET": str(lab.manager.control_socket),
        "TIDEGATE_LAB_CLIENT": f"nsenter --net=/run/netns/{lab.client_netns}",
    }
    for node in lab.nodes:
        label = node.name.upper()
        values[f"TIDEGATE_LAB_{label}"] = node.address
        values[f"TIDEGATE_LAB_{label}_SOCKET"] = f"unix://{node.socket}"
    for name, value in values.items():
        print(f"export {name}={shlex.quote(value)}")
    return 0


def _build(options: argparse.Namespace) -> int:
    arguments = {}
    for pair in options.build_arg:
        name, equals, value = pair.partition("=")
        if not equals:
            raise LabError(f"--build-arg wants NAME=VALUE, not {pair!r}")
        arguments[name] = value
    lab = Lab.attach(options.name)
    lab.show_progress()
    print(lab.build_image(options.file, options.tag, arguments, Path(options.context)))
    return 0


def _exec(options: argparse.Namespace) -> int:
    lab = Lab.attach(options.name)
    command = options.command[1:] if options.command[:1] == ["--"] else options.command
    if not command:
        raise LabError("exec: which command?")
    if options.where == "client":
        words = lab.client_command(*command)
    else:
        node = lab.node(options.where)
        words = [lab.node_command(node)[0], "--all", f"--target={node.pid}", *command]
    os.execvp(words[0], words)


if __name__ == "__main__":
    sys.exit(main())
