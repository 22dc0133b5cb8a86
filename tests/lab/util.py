"""What the rest of the lab stands on: running commands, waiting, locking, finding processes."""

from __future__ import annotations

import contextlib
import fcntl
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import TypeVar

T = TypeVar("T")

#: Environment variable that every process of the lab carries: its value, a directory below the
#: lab's own, says whose it is. A pid file goes stale when its number is used again; this cannot.
MARKER = "TIDEGATE_LAB_NODE"

#: Debian keeps the daemons in sbin, which a user's PATH often lacks.
PATH = "/usr/local/sbin:/usr/sbin:/sbin:/usr/local/bin:/usr/bin:/bin"

#: command → the Debian package that has it
_COMMANDS = {
    "dockerd": "docker.io",
    "docker": "docker.io",
    "docker-init": "docker.io",
    "ip": "iproute2",
    "iptables": "iptables",
    "nsenter": "util-linux",
    "unshare": "util-linux",
    "setpriv": "util-linux",
    "setsid": "util-linux",
}


class LabError(RuntimeError):
    """The lab, or a command run for it, failed; the message says what and why."""


def missing_prerequisites(*, bootstrap: bool = True) -> list[str]:
    """What this machine lacks, as sentences; empty when the lab can run here.

    ``bootstrap=False`` leaves out what is needed only while the base images are not cached yet.
    """
    missing = []
    if sys.platform != "linux":
        return ["the lab needs Linux"]
    if os.geteuid() != 0:
        missing.append("the lab needs root")
    commands = _COMMANDS | ({"debootstrap": "debootstrap"} if bootstrap else {})
    packages = sorted({p for c, p in commands.items() if shutil.which(c, path=PATH) is None})
    if packages:
        missing.append(f"missing packages: apt-get install {' '.join(packages)}")
    return missing


def environment(**extra: str) -> dict[str, str]:
    """A small environment: nothing of the caller's Docker or proxy settings gets in."""
    return {"PATH": PATH, "HOME": "/root", "LC_ALL": "C.UTF-8", **extra}


def run(
    *command: str | Path,
    timeout: float = 120,
    stdin: str | None = None,
    env: Mapping[str, str] | None = None,
    check: bool = True,
) -> str:
    """Run a command and return what it wrote to stdout; a failure carries what it said."""
    words = [str(word) for word in command]
    try:
        done = subprocess.run(
            words,
            input=stdin,
            stdin=subprocess.DEVNULL if stdin is None else None,
            capture_output=True,
            text=True,
            errors="replace",
            timeout=timeout,
            env=dict(env) if env is not None else environment(),
            cwd="/",
            check=False,
        )
    except subprocess.TimeoutExpired as error:
        raise LabError(f"no end after {timeout:g} s: {' '.join(words)}") from error
    except OSError as error:
        raise LabError(f"cannot run {words[0]}: {error}") from error
    if check and done.returncode != 0:
        said = (done.stderr.strip() or done.stdout.strip())[-4000:]
        raise LabError(f"exit {done.returncode}: {' '.join(words)}\n{said}")
    return done.stdout


def wait_for(
    predicate: Callable[[], T],
    timeout: float,
    what: str,
    *,
    interval: float = 0.05,
) -> T:
    """Poll until ``predicate`` returns something true, and return that.

    A predicate that raises counts as not yet true; its last exception is in the error.
    """
    deadline = time.monotonic() + timeout
    last: Exception | None = None
    while True:
        try:
            result = predicate()
            last = None
            if result:
                return result
        except Exception as error:  # noqa: BLE001  (whatever it is, it is told at the end)
            last = error
        if time.monotonic() >= deadline:
            why = f" (last: {type(last).__name__}: {last})" if last else ""
            raise LabError(f"not within {timeout:g} s: {what}{why}") from last
        time.sleep(interval)


class Progress:
    """Says what is being done and when; silent unless asked for."""

    def __init__(self, *, show: bool) -> None:
        self._show = show
        self._begin = time.monotonic()

    def __call__(self, message: str) -> None:
        if self._show:
            seconds = time.monotonic() - self._begin
            print(f"[{seconds:6.1f} s] {message}", file=sys.stderr, flush=True)


@contextlib.contextmanager
def locked(path: Path, progress: Progress | None = None) -> Iterator[None]:
    """Hold an exclusive lock; the kernel lets go of it when the holder dies, however it dies."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("a") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            if progress:
                progress(f"another process holds {path}, waiting for it")
            fcntl.flock(file, fcntl.LOCK_EX)
        yield


# --- processes -------------------------------------------------------------------------------


def _pids() -> Iterator[int]:
    for entry in os.scandir("/proc"):
        if entry.name.isdigit():
            yield int(entry.name)


def marker_of(pid: int) -> str | None:
    """The lab's marker in a process's environment; None for a stranger, and for a zombie."""
    try:
        variables = Path(f"/proc/{pid}/environ").read_bytes().split(b"\0")
    except OSError:
        return None
    prefix = f"{MARKER}=".encode()
    for variable in variables:
        if variable.startswith(prefix):
            return os.fsdecode(variable[len(prefix) :])
    return None


def marked(root: Path) -> list[int]:
    """The processes that the lab started for ``root`` or for anything below it."""
    own = str(root)
    found = []
    for pid in _pids():
        marker = marker_of(pid)
        if marker is not None and (marker == own or marker.startswith(own + "/")):
            found.append(pid)
    return found


def status(pid: int, field: str) -> list[str]:
    """The words of one field of ``/proc/PID/status``; none when the process is gone."""
    try:
        for line in Path(f"/proc/{pid}/status").read_text().splitlines():
            name, _, value = line.partition(":")
            if name == field:
                return value.split()
    except OSError:
        pass
    return []


def alive(pid: int) -> bool:
    """Whether the process runs; a zombie does not."""
    return status(pid, "State")[:1] not in ([], ["Z"], ["X"])


def init_of(root: Path) -> int | None:
    """The host's pid of the process that is PID 1 of the machine at ``root``."""
    depth = len(status(os.getpid(), "NSpid")) + 1
    for pid in marked(root):
        numbers = status(pid, "NSpid")
        if len(numbers) == depth and numbers[-1] == "1":
            return pid
    return None


def host_pid(init: int, inner: int) -> int | None:
    """The host's number of the process that is ``inner`` in the pid namespace of ``init``."""
    try:
        namespace = os.readlink(f"/proc/{init}/ns/pid")
    except OSError:
        return None
    for pid in _pids():
        if status(pid, "NSpid")[-1:] == [str(inner)]:
            with contextlib.suppress(OSError):
                if os.readlink(f"/proc/{pid}/ns/pid") == namespace:
                    return pid
    return None


def descendants(pid: int) -> list[int]:
    """The process and all below it. All of a node is below its init, orphans included."""
    children: dict[int, list[int]] = {}
    for other in _pids():
        if parent := status(other, "PPid"):
            children.setdefault(int(parent[0]), []).append(other)
    found, todo = [], [pid]
    while todo:
        current = todo.pop()
        found.append(current)
        todo += children.get(current, [])
    return found


def _lineage() -> set[int]:
    """This process and its ancestors: `down` run from inside the lab must not shoot itself."""
    pids = {os.getpid()}
    pid = os.getppid()
    while pid > 1 and pid not in pids:
        pids.add(pid)
        parent = status(pid, "PPid")
        pid = int(parent[0]) if parent else 0
    return pids


def kill_all(find: Callable[[], Iterable[int]], timeout: float = 20) -> int:
    """SIGKILL what ``find`` returns until it returns nothing; how many were killed."""
    spared = _lineage()
    killed: set[int] = set()

    def gone() -> bool:
        left = [pid for pid in find() if pid not in spared and alive(pid)]
        for pid in left:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
            killed.add(pid)
        return not left

    wait_for(gone, timeout, "all processes of the lab ended", interval=0.02)
    return len(killed)
