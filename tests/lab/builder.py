"""The lab's images: base images bootstrapped from Debian, and builds on top of them.

The nodes have no route out, so whatever needs a package registry is built by a dockerd in the
host's network namespace, which lives only as long as the build, and is copied to the nodes.
"""

from __future__ import annotations

import ast
import contextlib
import hashlib
import json
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

from tests.lab import machine
from tests.lab.util import (
    MARKER,
    PATH,
    LabError,
    Progress,
    environment,
    host_pid,
    init_of,
    kill_all,
    locked,
    marked,
    missing_prerequisites,
    run,
    wait_for,
)

SUITE = "bookworm"
NGINX_BASE = "tidegate-test/nginx-base"
PYTHON_BASE = "tidegate-test/python-base"
APP = "tidegate-test/app"

_FILES = Path(__file__).parent / "images"
_PROXY_VARIABLES = ("http_proxy", "https_proxy", "no_proxy", "all_proxy", "ftp_proxy")
_CA_VARIABLES = ("PIP_CERT", "REQUESTS_CA_BUNDLE", "SSL_CERT_FILE", "CURL_CA_BUNDLE")
_CA_DEFAULT = Path("/etc/ssl/certs/ca-certificates.crt")
_CA_IN_IMAGE = "/etc/ssl/tidegate-lab-ca.crt"
# What of the host's pip configuration means the same inside a container.
_PIP_PLAIN = ("proxy", "timeout", "default-timeout", "retries", "trusted-host")
_PIP_URLS = ("index-url", "extra-index-url", "find-links")


@dataclass(frozen=True, slots=True)
class _Base:
    """A base image: its name, its root file system's, and what ``docker import`` adds to it."""

    tag: str
    rootfs: str
    changes: tuple[str, ...]


_COMMON = ("ENV PATH=/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin", "CMD bash")
_BASES = (
    _Base(NGINX_BASE, "nginx-base", _COMMON),
    _Base(PYTHON_BASE, "python-base", (*_COMMON, "ENV LANG=C.UTF-8")),
)


def docker_command() -> str:
    """Debian's client where there is one: it is what a fresh machine has, and fits its dockerd."""
    debian = Path("/usr/bin/docker")
    found = str(debian) if debian.exists() else shutil.which("docker", path=PATH)
    if found is None:
        raise LabError("no docker command: apt-get install docker.io")
    return found


def docker_cli(
    socket: Path,
    *args: str | Path,
    timeout: float = 120,
    stdin: str | None = None,
    check: bool = True,
) -> str:
    """Run the docker client against a socket, free of the caller's contexts and settings."""
    env = environment(
        DOCKER_HOST=f"unix://{socket}",
        DOCKER_CONFIG="/nonexistent",
        # docker.io of Debian 12 has no buildx; the legacy builder is in all versions.
        DOCKER_BUILDKIT="0",
    )
    return run(docker_command(), *args, timeout=timeout, stdin=stdin, env=env, check=check)


def runtime_root() -> Path:
    """Where the lab keeps what runs; short, since paths of unix sockets end at 107 characters."""
    return Path(os.environ.get("TIDEGATE_LAB_ROOT", "/var/tmp/tidegate-lab"))


def cache_root() -> Path:
    """Where images are kept between labs."""
    explicit = os.environ.get("TIDEGATE_LAB_CACHE")
    if explicit:
        return Path(explicit)
    return Path(os.environ.get("XDG_CACHE_HOME") or "/var/cache") / "tidegate-lab"


def _digest(*parts: bytes) -> str:
    return hashlib.sha256(b"\0".join(parts)).hexdigest()[:16]


# --- the host's way to the registries ---------------------------------------------------------


def ca_bundle() -> Path | None:
    """The CA bundle that the host's own tools trust: a proxy's certificate may be in it."""
    for variable in _CA_VARIABLES:
        value = os.environ.get(variable)
        if value and Path(value).is_file():
            return Path(value)
    return _CA_DEFAULT if _CA_DEFAULT.is_file() else None


def pip_configuration() -> str:
    """The host's pip configuration, reduced to what holds in a container, as a pip.conf.

    Read through pip itself, so that files and ``PIP_*`` variables count as they do for the user.
    Local paths mean nothing in a container and are left out; the bundle goes along as a file.
    """
    text = ""
    with contextlib.suppress(LabError):
        text = run(sys.executable, "-m", "pip", "config", "list", env=dict(os.environ), timeout=60)
    kept: dict[str, str] = {}
    for line in text.splitlines():
        key, equals, quoted = line.partition("=")
        section, _, name = key.rpartition(".")
        # The environment is listed first but wins over the files; other sections are commands'.
        if not equals or section not in ("global", "install", ":env:"):
            continue
        if name in kept and section != ":env:" and f":env:.{name}" in text:
            continue
        try:
            value = str(ast.literal_eval(quoted))
        except (SyntaxError, ValueError):
            continue
        if name in _PIP_PLAIN:
            kept[name] = value
        elif name in _PIP_URLS:
            urls = [url for url in value.split() if url.startswith(("http://", "https://"))]
            if urls:
                kept[name] = " ".join(urls)
    kept["disable-pip-version-check"] = "1"
    if ca_bundle() is not None:
        kept["cert"] = _CA_IN_IMAGE
    lines = [f"{name} = {' '.join(kept[name].split())}" for name in sorted(kept)]
    return "\n".join(["[global]", *lines, ""])


def _proxy_args() -> dict[str, str]:
    """Proxy settings as build arguments; Docker knows these without an ARG in the Dockerfile."""
    return {
        name: value
        for variable in _PROXY_VARIABLES
        for name in (variable, variable.upper())
        if (value := os.environ.get(name))
    }


# --- the builder ------------------------------------------------------------------------------

# $1: its directory, the rest: dockerd's arguments. As on the nodes, a private /run: nothing is left
# in the host's, and no containerd found there. A resolv.conf that lies in /run is carried over.
_BUILDER = r"""
set -e
resolv=$(readlink -m /etc/resolv.conf)
case $resolv in
    /run/*) mkdir -p "$1${resolv%/*}"; cp "$resolv" "$1$resolv" || true ;;
esac
mount --bind "$1/run" /run
mount --bind "$1/etc" /etc/docker
shift
exec docker-init -- dockerd "$@"
"""


class Builder:
    """A dockerd in the host's network namespace, for as long as a build takes.

    It must not touch the host's network: no bridge, no packet filter rules, no forwarding.
    It dies with this process (also by kill -9), and its layers stay cached.
    """

    def __init__(self, cache: Path, progress: Progress) -> None:
        self._root = runtime_root() / "_builder"
        self._data = cache / "builder"
        self._progress = progress
        self._stack = contextlib.ExitStack()
        self.socket = self._root / "run/docker.sock"

    def __enter__(self) -> Builder:
        with contextlib.ExitStack() as stack:
            # Also two caches must not use the one directory at the same time.
            stack.enter_context(locked(runtime_root() / "_builder.lock", self._progress))
            stack.callback(machine.delete_machine, self._root, "/tidegate-lab/_builder")
            machine.delete_machine(self._root, "/tidegate-lab/_builder")
            self._start(stack)
            self._stack = stack.pop_all()
        return self

    def __exit__(self, *unused: object) -> None:
        self._stack.close()

    def _start(self, stack: contextlib.ExitStack) -> None:
        for directory in ("run", "etc"):
            (self._root / directory).mkdir(parents=True)
        self._data.mkdir(parents=True, exist_ok=True)
        Path("/etc/docker").mkdir(exist_ok=True)
        log = stack.enter_context((self._root / "dockerd.log").open("wb"))
        process = subprocess.Popen(
            [
                *("setpriv", "--pdeathsig", "KILL"),
                *("unshare", "--mount", "--pid", "--fork", "--kill-child", "--mount-proc"),
                *("sh", "-c", _BUILDER, "builder", str(self._root)),
                *("--host=unix:///var/run/docker.sock", f"--data-root={self._data}"),
                "--exec-opt=native.cgroupdriver=cgroupfs",
                "--cgroup-parent=/tidegate-lab/_builder",
                *("--bridge=none", "--iptables=false", "--ip-forward=false", "--ip-masq=false"),
            ],
            env=environment(**{MARKER: str(self._root)}),
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=log,
            cwd="/",
            start_new_session=True,
        )
        stack.callback(self._stop, process)

        def answers() -> bool:
            if process.poll() is not None:
                return True
            return bool(self.docker("version", "--format", "{{.Server.Version}}", timeout=5))

        wait_for(answers, 30, "the builder's dockerd answers")
        if process.poll() is not None:
            raise LabError(f"the builder ended\n{machine.tail(self._root / 'dockerd.log')}")

    def _stop(self, process: subprocess.Popen[bytes]) -> None:
        # dockerd gets the time to write its state; the wrappers end when it has ended.
        with contextlib.suppress(LabError, OSError, ValueError, subprocess.TimeoutExpired):
            inner = int((self._root / "run/docker.pid").read_text())
            init = init_of(self._root)
            if init and (pid := host_pid(init, inner)):
                os.kill(pid, 15)
                process.wait(15)
        kill_all(lambda: marked(self._root))
        process.wait(5)

    def docker(self, *args: str | Path, timeout: float = 900, check: bool = True) -> str:
        return docker_cli(self.socket, *args, timeout=timeout, check=check)

    def image_id(self, tag: str) -> str:
        """The image's id, or an empty string."""
        return self.docker("image", "inspect", "--format", "{{.Id}}", tag, check=False).strip()

    def label(self, tag: str, name: str) -> str:
        form = f'{{{{index .Config.Labels "{name}"}}}}'
        return self.docker("image", "inspect", "--format", form, tag, check=False).strip()

    def build(
        self,
        dockerfile: Path,
        tag: str,
        context: Path,
        build_args: Mapping[str, str],
        labels: Mapping[str, str] | None = None,
    ) -> str:
        """``docker build``; returns the image's id."""
        words = ["build", "--network=host", "--force-rm", f"--file={dockerfile}", f"--tag={tag}"]
        for name, value in {**_proxy_args(), **build_args}.items():
            words.append(f"--build-arg={name}={value}")
        for name, value in (labels or {}).items():
            words.append(f"--label={name}={value}")
        self.docker(*words, context, timeout=1800)
        # What lost its name to this build; layers that a named image stands on stay.
        self.docker("image", "prune", "--force")
        return self.image_id(tag)


# --- images -----------------------------------------------------------------------------------


class Images:
    """The cache of root file systems and image archives, and how they are made."""

    def __init__(self, progress: Progress | None = None, cache: Path | None = None) -> None:
        self._cache = cache or cache_root()
        self._progress = progress or Progress(show=False)
        script = _FILES / "rootfs.sh"
        self._rootfs_key = _digest(script.read_bytes(), SUITE.encode())
        self._rootfs = self._cache / f"rootfs-{SUITE}-{self._rootfs_key}"
        app = [(_FILES / name).read_bytes() for name in ("app.py", "Dockerfile.app")]
        self._app = self._cache / f"app-{_digest(self._rootfs_key.encode(), *app)}.tar"

    @property
    def bootstrapped(self) -> bool:
        """Whether the base images' root file systems are in the cache."""
        return all((self._rootfs / f"{base.rootfs}.tar").exists() for base in _BASES)

    def ensure(self, *, rebuild: bool = False) -> Path:
        """Make what is missing; returns the archive of the test backend's image."""
        with locked(self._cache / "lock", self._progress):
            if rebuild:
                shutil.rmtree(self._rootfs, ignore_errors=True)
                self._app.unlink(missing_ok=True)
            if not self.bootstrapped:
                self._bootstrap()
            if not self._app.exists():
                with self._builder() as builder:
                    builder.build(_FILES / "Dockerfile.app", APP, _FILES, {})
                    self._save(builder, APP, self._app)
                for old in self._cache.glob("app-*.tar"):
                    if old != self._app:
                        old.unlink()
                self._progress(f"{APP} built")
        return self._app

    @contextlib.contextmanager
    def build(
        self, dockerfile: Path, tag: str, context: Path, build_args: Mapping[str, str]
    ) -> Iterator[tuple[str, Path]]:
        """Build an image; yields its id and an archive of it, which is deleted afterwards."""
        self.ensure()
        with tempfile.TemporaryDirectory(dir=self._cache, prefix="build-") as directory:
            archive = Path(directory) / "image.tar"
            with self._builder() as builder:
                image = builder.build(dockerfile, tag, context, build_args)
                self._progress(f"{tag} built")
                self._save(builder, tag, archive)
            yield image, archive

    @contextlib.contextmanager
    def export(self, tag: str) -> Iterator[Path]:
        """An archive of an image that the builder has, for example a base image."""
        self.ensure()
        with tempfile.TemporaryDirectory(dir=self._cache, prefix="build-") as directory:
            archive = Path(directory) / "image.tar"
            with self._builder() as builder:
                self._save(builder, tag, archive)
            yield archive

    @staticmethod
    def _save(builder: Builder, tag: str, archive: Path) -> None:
        part = archive.with_suffix(".part")
        builder.docker("save", "--output", part, tag)
        part.rename(archive)

    @contextlib.contextmanager
    def _builder(self) -> Iterator[Builder]:
        with Builder(self._cache, self._progress) as builder:
            self._import_bases(builder)
            yield builder

    def _import_bases(self, builder: Builder) -> None:
        """Give the builder the base images, with the host's trust and pip settings on top.

        On top, and not in the project's Dockerfiles: those know nothing of the machine they are
        built on. The archives stay free of it, so they can be carried elsewhere.
        """
        bundle = ca_bundle()
        files = {"pip.conf": pip_configuration().encode()}
        recipe = ["COPY pip.conf /etc/pip.conf"]
        if bundle is not None:
            files["ca.crt"] = bundle.read_bytes()
            recipe += [f"COPY ca.crt {_CA_IN_IMAGE}", f"COPY ca.crt {_CA_DEFAULT}"]
        key = _digest(self._rootfs_key.encode(), *files.values(), json.dumps(recipe).encode())
        for base in _BASES:
            if builder.label(base.tag, "tidegate.lab.key") == key:
                continue
            plain = f"{base.tag}:plain"
            if builder.label(plain, "tidegate.lab.rootfs") != self._rootfs_key:
                changes = [*base.changes, f"LABEL tidegate.lab.rootfs={self._rootfs_key}"]
                options = [f"--change={change}" for change in changes]
                archive = self._rootfs / f"{base.rootfs}.tar"
                builder.docker("import", *options, archive, plain)
            with tempfile.TemporaryDirectory(prefix="tidegate-lab-") as directory:
                context = Path(directory)
                for name, content in files.items():
                    (context / name).write_bytes(content)
                dockerfile = context / "Dockerfile"
                dockerfile.write_text("\n".join([f"FROM {plain}", *recipe, ""]))
                builder.build(dockerfile, base.tag, context, {}, {"tidegate.lab.key": key})
            self._progress(f"{base.tag} imported")

    def _bootstrap(self) -> None:
        """Run debootstrap, in a mount namespace of its own and in memory where there is enough."""
        missing = missing_prerequisites()
        if missing:
            raise LabError("; ".join(missing))
        self._progress(f"bootstrapping Debian {SUITE} for the base images (about a minute, once)")
        work = runtime_root() / "_bootstrap"
        machine.delete_machine(work, "/tidegate-lab/_bootstrap")
        (work / "tree").mkdir(parents=True)
        # Next to where it goes to, so that one rename makes it valid.
        out = self._cache / "rootfs.part"
        shutil.rmtree(out, ignore_errors=True)
        out.mkdir(parents=True)
        mirror = os.environ.get("TIDEGATE_DEBIAN_MIRROR", "http://deb.debian.org/debian")
        security = os.environ.get(
            "TIDEGATE_DEBIAN_SECURITY_MIRROR", "http://deb.debian.org/debian-security"
        )
        in_memory = 'mount -t tmpfs -o size=3g tmpfs "$2";' if _available_memory() > 5e9 else ""
        proxies = {name: value for name, value in _proxy_args().items() if name.islower()}
        try:
            log = run(
                *("setpriv", "--pdeathsig", "KILL"),
                *("unshare", "--mount", "--pid", "--fork", "--kill-child", "--mount-proc"),
                *("sh", "-c", f'set -e; {in_memory} exec "$@"', "rootfs"),
                *(_FILES / "rootfs.sh", work / "tree", out, SUITE, mirror, security),
                timeout=1200,
                env=environment(**proxies, **{MARKER: str(work)}),
            )
            for old in self._cache.glob(f"rootfs-{SUITE}-*"):
                shutil.rmtree(old)
            out.rename(self._rootfs)
        finally:
            machine.delete_machine(work, "/tidegate-lab/_bootstrap")
        for line in log.splitlines():
            if line.startswith("rootfs: "):
                self._progress(line.removeprefix("rootfs: "))


def _available_memory() -> float:
    for line in Path("/proc/meminfo").read_text().splitlines():
        if line.startswith("MemAvailable:"):
            return float(line.split()[1]) * 1024
    return 0
