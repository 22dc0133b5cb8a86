"""The command `tidegate`: options in, lines and exit codes out.

Everything is imported where it is needed: `version` and a usage error must not load gRPC. Nothing
is decided here; errors become one or more plain lines (what, where, why, cure) and an exit code,
never a traceback.
"""

from __future__ import annotations

import errno
import functools
import io
import json
import logging
import os
import shutil
import signal
import sys
import textwrap
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar, cast

import click

from agent.errors import (
    ComposeFileError,
    DiscoveryError,
    RenderError,
    SettingsError,
    StoreUnavailable,
    innermost,
)

if TYPE_CHECKING:
    from agent.config.settings import Settings
    from agent.config.stores import Discovery, Loaded
    from agent.lint import Finding, Report
    from agent.model import Desired, Rejection, Snapshot
    from agent.plan import InstancePlan, Running

OK = 0
NEGATIVE = 1
"""Asked and answered, and the answer is no: a check failed, not routed, not ready."""
USAGE = 2
"""The command line or the settings cannot be used."""
UNREACHABLE = 3
"""Something that had to be asked did not answer."""
INTERRUPTED = 130
"""Ctrl-C, as shells tell it. `run` ends well by it."""

STATUS_TIMEOUT = 10.0
"""Seconds within which the agent answers where nothing else can."""
ASIDE_TIMEOUT = 2.0
"""Seconds that a command which can do without the running agent waits for it."""

STOP_LIMIT = 8.0
"""Seconds for a clean end: less than the ten after which Docker kills."""

log = logging.getLogger("agent")


class _Commands(click.Group):
    """The commands, and what holds for each of them."""

    def invoke(self, ctx: click.Context) -> object:
        """Run the command; Ctrl-C ends it with a code that no answer has."""
        if isinstance(sys.stdout, io.TextIOWrapper):
            # A name that the terminal's encoding lacks is no reason to fail.
            sys.stdout.reconfigure(errors="backslashreplace")
        try:
            return super().invoke(ctx)
        except KeyboardInterrupt:
            click.echo("tidegate: interrupted", err=True)
            sys.exit(INTERRUPTED)
        except OSError as error:
            if error.errno == errno.EPIPE:
                raise  # who reads the answer has enough of it; click knows
            click.echo(f"tidegate: the answer cannot be written: {error}", err=True)
            sys.exit(UNREACHABLE)


@click.group(cls=_Commands, context_settings={"help_option_names": ["-h", "--help"]})
@click.option("-D", "--debug", is_flag=True, help="Log everything.")
@click.option(
    "-v",
    "--version",
    is_flag=True,
    expose_value=False,
    is_eager=True,
    callback=lambda ctx, _, value: _print_version(ctx) if value else None,
    help="Show the version and exit.",
)
@click.pass_context
def main(ctx: click.Context, *, debug: bool) -> None:
    """Zero-reload ingress for Docker Swarm: feeds OpenResty with what runs in the cluster."""
    ctx.obj = debug


def _print_version(ctx: click.Context) -> None:
    from agent.metrics import version

    click.echo(f"tidegate {version()}")
    ctx.exit()


F = TypeVar("F", bound=Callable[..., object])


@dataclass(frozen=True, slots=True)
class _Given:
    """Where the command line says that the settings are."""

    path: str | None
    discovery: Discovery | None


def _config_option(command: F) -> F:
    """Add the options that say where the settings are; they arrive as one, `config`."""

    @functools.wraps(command)
    def gathered(
        *arguments: Any,
        config: str | None,
        discovery: str | None,
        discovery_tls_ca_cert: str,
        discovery_tls_cert: str,
        discovery_tls_key: str,
        **options: Any,
    ) -> object:
        from agent.config.stores import Discovery

        found = (
            Discovery(discovery, discovery_tls_ca_cert, discovery_tls_cert, discovery_tls_key)
            if discovery
            else None
        )
        return command(*arguments, config=_Given(config, found), **options)

    decorated: Any = gathered
    for option in reversed(_CONFIG_OPTIONS):
        decorated = option(decorated)
    return cast("F", decorated)


_CONFIG_OPTIONS = (
    click.option(
        "-c",
        "--config",
        type=click.Path(dir_okay=False),
        help="Settings file (TOML). TIDEGATE_CONFIG or INTERLOCK_CONFIG, if set, hold the text "
        "themselves and win.",
    ),
    click.option(
        "-k",
        "--discovery",
        metavar="URL",
        help="Key-value store with the settings, which beats both: etcd://, consul:// or zk://, "
        "then [USER:PASSWORD@]HOST[:PORT][,HOST[:PORT]...][/KEY]. KEY is interlock/v1/config.",
    ),
    click.option("--discovery-tls-ca-cert", metavar="FILE", default="", help="CA of the store."),
    click.option(
        "--discovery-tls-cert", metavar="FILE", default="", help="Client certificate for it."
    ),
    click.option("--discovery-tls-key", metavar="FILE", default="", help="Key of that."),
)
_json_option = click.option("--json", "as_json", is_flag=True, help="JSON instead of text.")
_url_option = click.option(
    "--url", help="The running agent's HTTP listener; by default where ListenAddr says."
)


@contextmanager
def _told() -> Iterator[None]:
    """Turn our own errors into lines on stderr and an exit code."""
    try:
        yield
    except SettingsError as error:
        for problem in error.problems:
            click.echo(f"tidegate: {problem}", err=True)
        sys.exit(USAGE)
    except (ComposeFileError, RenderError) as error:
        click.echo(f"tidegate: {error}", err=True)
        sys.exit(USAGE)
    except (DiscoveryError, StoreUnavailable) as error:
        click.echo(f"tidegate: {error}", err=True)
        sys.exit(UNREACHABLE)


def _load(config: _Given) -> Loaded:
    """The settings, with a line for each remark, and one if there are none at all."""
    from agent.config import stores

    loaded = stores.load(config.path, discovery=config.discovery)
    for warning in loaded.warnings:
        click.echo(f"tidegate: warning: {warning}", err=True)
    if loaded.where == stores.BUILT_IN:
        click.echo(
            _NO_SETTINGS,
            err=True,
        )
    return loaded


_NO_SETTINGS = (
    "tidegate: no settings given (-c FILE, TIDEGATE_CONFIG, INTERLOCK_CONFIG or -k URL): "
    "the built-in defaults are in force"
)


@main.command()
@_config_option
@click.pass_obj
def run(debug: bool, *, config: _Given) -> None:
    """Run the agent. It follows changes of its settings; SIGTERM ends it cleanly."""
    mask = signal.pthread_sigmask(signal.SIG_BLOCK, ())
    with _told():
        try:
            _run(config, debug=debug)
        except BaseException:
            # Whoever called us, in this process, is not to be left without its signals.
            signal.pthread_sigmask(signal.SIG_SETMASK, mask)
            raise


def _run(config: _Given, *, debug: bool) -> None:
    from agent.config import stores

    choice = stores.choose(config.path, discovery=config.discovery)
    if choice.store.where == stores.BUILT_IN:
        click.echo(_NO_SETTINGS, err=True)

    from agent.runner import Runner

    # Blocked here and thus in every thread, taken out one by one below: no code ever runs in a
    # signal handler, so none can meet a lock that is held.
    signals = {signal.SIGTERM, signal.SIGINT, signal.SIGHUP}
    signal.pthread_sigmask(signal.SIG_BLOCK, signals)
    # A thread that renders must not keep the one that pushes waiting for Python's usual 5 ms.
    sys.setswitchinterval(0.0005)
    _set_up_logging("info", debug=debug)
    for place in choice.passed_over:
        log.warning("settings are read from %s, which beats %s", choice.store.where, place)

    runner = Runner(
        choice,
        path=config.path,
        told=lambda settings: _set_up_logging(settings.log_level, debug=debug),
    )
    runner.start()
    while (caught := signal.sigwait(signals)) == signal.SIGHUP:
        runner.reread()
    log.info("%s: ending", signal.Signals(caught).name)
    began = time.monotonic()
    runner.stop(STOP_LIMIT)
    log.info("ended after %.1f s", time.monotonic() - began)


def _set_up_logging(level: str, *, debug: bool) -> None:
    root = logging.getLogger()
    if not root.handlers:
        handler = logging.StreamHandler(sys.stderr)
        handler.setFormatter(
            logging.Formatter("%(asctime)s.%(msecs)03d %(levelname)-7s %(message)s", "%FT%T")
        )
        root.addHandler(handler)
    root.setLevel(logging.DEBUG if debug else level.upper())
    # A line per request of theirs says nothing that ours do not.
    for noisy in ("urllib3", "docker"):
        logging.getLogger(noisy).setLevel(logging.WARNING)


@main.command()
@_config_option
@_json_option
@_url_option
@click.option(
    "--strict", is_flag=True, help="A key of the settings that is not known is a failure."
)
def check(*, config: _Given, as_json: bool, url: str | None, strict: bool) -> None:
    """Look at settings, engine and OpenResty; say what is wrong and what cures it."""
    with _told():
        from agent import check as checks
        from agent.config import stores

        findings: Iterator[checks.Finding]
        try:
            loaded = stores.load(config.path, discovery=config.discovery)
            running = _running(loaded.settings, url)
            findings = checks.check(
                loaded, strict=strict, refusals=running.refusals, unknown=running.notes
            )
        except StoreUnavailable as error:
            findings = checks.no_store(error)
        colours = {"ok": "green", "warning": "yellow", "failed": "red"}
        failed = False
        found = []
        for finding in findings:
            failed = failed or finding.level is checks.Level.FAILED
            if as_json:
                found.append(
                    {
                        "level": finding.level.value,
                        "subject": finding.subject,
                        "text": finding.text,
                        "cure": finding.cure,
                    }
                )
                continue
            level = finding.level.value
            line = _wrapped(f"{level:<8} {finding.subject}: {finding.text}", indent=9)
            click.echo(click.style(level, fg=colours[level]) + line[len(level) :])
            if finding.cure and finding.level is not checks.Level.OK:
                click.echo(_wrapped(f"         {finding.cure}", indent=9))
        if as_json:
            click.echo(json.dumps({"failed": failed, "findings": found}, indent=1))
        sys.exit(NEGATIVE if failed else OK)


@main.command()
@_config_option
@_json_option
@_url_option
def status(*, config: _Given, as_json: bool, url: str | None) -> None:
    """Ask the running agent how things stand."""
    with _told():
        url = url or _default_url(_settings(config))
        try:
            state = _ask(url, STATUS_TIMEOUT)
            shown = None if as_json else _state_as_text(state)
        except _NoAnswerError as error:
            click.echo(
                f"tidegate: no agent answers at {_state_page(url)}: {error}; "
                "is it running (`tidegate run`), and is --url right?",
                err=True,
            )
            sys.exit(UNREACHABLE)
        if shown is None:
            click.echo(json.dumps(state, indent=1, ensure_ascii=False))
        else:
            click.echo(shown, nl=False)
        sys.exit(OK if state["ready"] else NEGATIVE)


def _wrapped(text: str, *, indent: int) -> str:
    """A line that fits the terminal, by words; whole where it is no terminal that reads it."""
    if not sys.stdout.isatty():
        return text
    return textwrap.fill(
        text,
        shutil.get_terminal_size().columns,
        subsequent_indent=" " * indent,
        break_long_words=False,
        break_on_hyphens=False,
    )


def _settings(config: _Given) -> Settings:
    from agent.config import stores

    return stores.load(config.path, discovery=config.discovery).settings


def _default_url(settings: Settings) -> str:
    from agent.http import parse_listen

    host, port = parse_listen(settings.listen_addr)
    host = "127.0.0.1" if host in ("", "0.0.0.0", "::") else host  # noqa: S104 - compared
    return f"http://[{host}]:{port}" if ":" in host else f"http://{host}:{port}"


class _NoAnswerError(Exception):
    """No agent answers there; the text says why in a few words."""


_NO_AGENT = "what answers is no agent of this version"


def _state_page(url: str) -> str:
    return f"{url.rstrip('/')}/api/state"


def _ask(url: str, timeout: float) -> dict[str, Any]:
    """The state of the running agent. Raises _NoAnswerError."""
    import requests

    try:
        with requests.Session() as session:
            session.trust_env = False
            answer = session.get(_state_page(url), timeout=timeout)
            answer.raise_for_status()
            state = answer.json()
    except requests.Timeout as error:
        raise _NoAnswerError(f"no answer within {timeout:g} s") from error
    except requests.ConnectionError as error:
        raise _NoAnswerError(innermost(error)) from error
    except (requests.exceptions.InvalidSchema, requests.exceptions.MissingSchema) as error:
        raise _NoAnswerError("that is no http:// URL") from error
    except requests.JSONDecodeError as error:
        raise _NoAnswerError(_NO_AGENT) from error
    except (requests.RequestException, ValueError) as error:
        raise _NoAnswerError(str(error)) from error
    if not isinstance(state, dict) or "ready" not in state:
        raise _NoAnswerError(_NO_AGENT)
    return state


def _running(settings: Settings, url: str | None) -> Running:
    """What the running agent knows and no other process can; or that it could not be asked."""
    from agent.plan import Running

    place = url or settings.listen_addr
    try:
        place = url or _default_url(settings)
        return Running.model_validate(_ask(place, ASIDE_TIMEOUT))
    except (_NoAnswerError, SettingsError) as error:
        why = str(error)
    except ValueError:
        why = _NO_AGENT
    return Running(
        unasked=f"the running agent could not be asked at {place}: {why}, so what OpenResty "
        "refused and what lingers is not known"
    )


def _state_as_text(state: dict[str, Any]) -> str:
    """The state for people, as wide as the terminal. Raises _NoAnswerError: it is none."""
    from rich.console import Console

    console = Console(highlight=False)
    if not console.is_terminal:
        console = Console(highlight=False, width=200)  # nobody reads a pipe in 80 columns
    with console.capture() as capture:
        try:
            _show_state(console, state)
        except (LookupError, TypeError, AttributeError) as error:
            raise _NoAnswerError(_NO_AGENT) from error
    return capture.get()


def _show_state(console: Any, state: dict[str, Any]) -> None:
    from rich.padding import Padding
    from rich.text import Text

    ready = "ready" if state["ready"] else "not ready: " + "; ".join(state["reasons"])
    console.print(
        f"tidegate {state['version']}, settings from {state['settings_from']}", markup=False
    )
    console.print(ready, style="green" if state["ready"] else "red", markup=False)
    if state.get("settings_problem"):
        console.print(f"settings: {state['settings_problem']}", style="red", markup=False)
    if state["waiting_for"]:
        console.print("waiting for: " + ", ".join(state["waiting_for"]), markup=False)
    _table(
        console,
        "Sources",
        ("source", "mode", "age", "events", "remark"),
        [
            (
                s["name"],
                s["mode"],
                _seconds(s["age_seconds"]),
                str(s["events"]),
                s["error"] or s["mode_reason"],
            )
            for s in state["sources"]
        ],
    )
    _table(
        console,
        "OpenResty",
        ("instance", "state", "revision", "generation", "address", "error"),
        [
            (i["name"], i["state"], str(i["revision"]), i["generation"][:12], i["url"], i["error"])
            for i in state["instances"]
        ],
    )
    _table(
        console,
        "Upstreams",
        ("upstream", "up", "draining", "peers"),
        [
            (
                u["name"],
                str(sum(p["state"] == "up" for p in u["peers"])),
                str(sum(p["state"] == "draining" for p in u["peers"])),
                _few([f"{p['address']}:{p['port']}" for p in u["peers"]]),
            )
            for u in state["upstreams"]
        ],
    )
    console.print("\nRejections" if state["rejections"] else "\nRejections: none", markup=False)
    for r in state["rejections"]:
        # No table: its columns would be too narrow for sentences.
        console.print(f"{r['subject']}: {r['message']} ({r['reason']})", markup=False)
        console.print(Padding(Text(r["hint"]), (0, 0, 0, 4), expand=False))


def _table(console: Any, title: str, columns: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
    from rich.table import Table
    from rich.text import Text

    if not rows:
        console.print(f"\n{title}: none", markup=False)
        return
    table = Table(title=title, title_justify="left", title_style="bold", box=None, pad_edge=False)
    for column in columns:
        table.add_column(column, overflow="fold")
    for row in rows:
        table.add_row(*(Text(cell) for cell in row))
    console.print()
    console.print(table)


def _seconds(age: float | None) -> str:
    return "never" if age is None else f"{age:.1f} s"


def _few(items: Sequence[str]) -> str:
    return ", ".join(items[:4]) + (f" and {len(items) - 4} more" if len(items) > 4 else "")


@main.command()
@_config_option
@_json_option
@_url_option
def plan(*, config: _Given, as_json: bool, url: str | None) -> None:
    """Show what would be pushed and rendered now, and whether it needs a reload. Only asks."""
    with _told():
        loaded = _load(config)

        from agent.controller import SiteRenderer
        from agent.driver.openresty import connector
        from agent.driver.targets import targets
        from agent.plan import plan as make

        settings = loaded.settings
        snapshot, desired = _compiled(settings)
        proxies = [p for source in snapshot.sources.values() for p in source.proxies]
        running = _running(settings, url)
        rejections = (*desired.rejections, *running.refusals)
        plans = make(
            desired,
            targets(proxies, settings.openresty),
            connect=connector(settings.openresty),
            renderer=SiteRenderer(settings),
            running=running,
        )
        if as_json:
            click.echo(
                json.dumps(
                    {
                        "hosts": [host.name for host in desired.site.hosts],
                        "upstreams": sorted(desired.membership.upstreams),
                        "rejections": [
                            {
                                "subject": r.subject,
                                "reason": r.reason,
                                "message": r.message,
                                "hint": r.hint,
                            }
                            for r in rejections
                        ],
                        "notes": list(running.notes),
                        "instances": [item.as_dict() for item in plans],
                    },
                    indent=1,
                    ensure_ascii=False,
                )
            )
        else:
            _show_plan(desired, rejections, plans)
            _show_notes(running)
        sys.exit(UNREACHABLE if any(item.error for item in plans) else OK)


def _show_notes(running: Running) -> None:
    for note in running.notes:
        click.echo(_wrapped(f"note: {note}", indent=6))


def _show_plan(
    desired: Desired, rejections: Sequence[Rejection], plans: Sequence[InstancePlan]
) -> None:
    click.echo(
        f"{len(desired.site.hosts)} hosts, {len(desired.membership.upstreams)} upstreams, "
        f"{len(rejections)} rejections"
    )
    if not plans:
        click.echo("no OpenResty instance is known: nothing would be pushed")
    for item in plans:
        click.echo(f"\nOpenResty {item.name} at {item.url}")
        if item.error:
            click.echo(_wrapped(f"  cannot be asked: {item.error}", indent=4))
            continue
        for name in item.lingering:
            click.echo(f"  {name} lingers: nobody asks for it, it goes after HostLinger")
        for name in item.quarantined:
            click.echo(f"  {name} is in quarantine: what runs of it, if anything, stays as it is")
        if not item.changes:
            click.echo(
                f"  nothing to do: revision {item.revision}, generation {item.generation[:12]}"
            )
            continue
        if item.upstreams:
            click.echo(f"  membership, over revision {item.revision} (no reload):")
        for change in item.upstreams:
            click.echo(f"    {change.name} {change.change}")
            for line in change.lines:
                click.echo(f"      {line}")
        if item.reload:
            click.echo(
                f"  site: {len(item.files)} files, generation {item.generation[:12] or 'none'} -> "
                f"{item.new_generation[:12]}: a reload is needed"
            )
            for file, what in item.file_changes:
                click.echo(f"    {file} {what}")
        else:
            click.echo("  site: unchanged, no reload")
    for rejection in rejections:
        text = f"rejected: {rejection.subject}: {rejection.message} ({rejection.reason})"
        click.echo("\n" + _wrapped(text, indent=2))
        click.echo(_wrapped(f"  {rejection.hint}", indent=2))


def _compiled(settings: Settings) -> tuple[Snapshot, Desired]:
    """Read every source once and compile. Raises DiscoveryError or SettingsError."""
    from agent.compile import compile_snapshot
    from agent.discovery import build_sources
    from agent.model import Snapshot

    seen = [source.read_once() for source in build_sources(settings)]
    snapshot = Snapshot(sources={item.source: item for item in seen})
    return snapshot, compile_snapshot(snapshot, settings)


@main.command()
@click.argument("name")
@_config_option
@_json_option
@_url_option
def explain(*, name: str, config: _Given, as_json: bool, url: str | None) -> None:
    """Tell each step from label to peer for NAME (a host, service, container or task)."""
    with _told():
        loaded = _load(config)

        from agent.explain import Outcome
        from agent.explain import explain as make

        snapshot, desired = _compiled(loaded.settings)
        running = _running(loaded.settings, url)
        answer = make(snapshot, loaded.settings, desired, name, refusals=running.refusals)
        if as_json:
            told = {**answer.as_dict(), "notes": list(running.notes)}
            click.echo(json.dumps(told, indent=1, ensure_ascii=False))
            sys.exit(OK if answer.routed else NEGATIVE)
        marks = {
            Outcome.OK: ("+", "green"),
            Outcome.FAILED: ("x", "red"),
            Outcome.NOTE: ("-", None),
        }
        for account in answer.accounts:
            verdict = "routed" if account.routed else "not routed"
            if account.refused:
                verdict = "not routed as it asks for: refused by OpenResty"
            click.echo(f"{account.kind} {account.name}: {verdict}")
            for step in account.steps:
                mark, colour = marks[step.outcome]
                line = _wrapped(f"  {mark} {step.text}", indent=4)
                click.echo(f"  {click.style(mark, fg=colour)}{line[3:]}")
                if step.hint:
                    click.echo(_wrapped(f"      {step.hint}", indent=6))
        if not answer.found:
            click.echo(f"nothing is called {answer.query}")
        if answer.suggestions:
            click.echo("did you mean: " + ", ".join(answer.suggestions))
        _show_notes(running)
        sys.exit(OK if answer.routed else NEGATIVE)


@main.command()
@click.argument("files", metavar="FILE...", nargs=-1, required=True)
@_config_option
@_json_option
@click.option(
    "--kind",
    type=click.Choice(["stack", "compose"]),
    help="What the files are for: `docker stack deploy` or `docker compose up`. By default what "
    "is in them tells.",
)
@click.option("--name", default="", help="Name of the stack or project.")
@click.option(
    "--env-file",
    type=click.Path(dir_okay=False),
    help="Variables that the environment does not have; by default .env beside the first FILE.",
)
@click.option(
    "--proxy-network",
    "proxy_networks",
    multiple=True,
    metavar="NETWORK",
    help="A network that OpenResty is on, where it is in none of the files. May be repeated.",
)
@click.option("--strict", is_flag=True, help="A warning is a failure too.")
def lint(
    *,
    files: tuple[str, ...],
    config: _Given,
    as_json: bool,
    kind: str | None,
    name: str,
    env_file: str | None,
    proxy_networks: tuple[str, ...],
    strict: bool,
) -> None:
    """Say what routes the services of compose or stack files would get. Asks nobody.

    Several FILEs are merged as Docker merges them; `-` is the standard input.
    """
    with _told():
        from agent.composefile import Kind
        from agent.lint import Level
        from agent.lint import lint as judge

        settings = _settings(config)
        report = judge(
            [(path, _text_of(path)) for path in files],
            settings,
            environment=os.environ,
            kind=None if kind is None else Kind(kind),
            name=name,
            env_file=_env_file(env_file, files[0]),
            proxy_networks=proxy_networks,
        )
        if as_json:
            click.echo(json.dumps(report.as_dict(), indent=1, ensure_ascii=False))
        else:
            _show_lint(report)
        failed = report.count(Level.REJECTED) or (strict and report.count(Level.WARNING))
        sys.exit(NEGATIVE if failed else OK)


def _text_of(path: str) -> str:
    """The text of a file that the command line names. Raises ComposeFileError."""
    try:
        raw = sys.stdin.buffer.read() if path == "-" else Path(path).read_bytes()
        return raw.decode()
    except OSError as error:
        raise ComposeFileError(f"{path}: {error.strerror}") from error
    except UnicodeDecodeError as error:
        raise ComposeFileError(f"{path}: not UTF-8: {error}") from error


def _env_file(given: str | None, first: str) -> str | None:
    """The text of the file with variables, None where there is none."""
    if given is not None:
        return _text_of(given)
    beside = Path.cwd() if first == "-" else Path(first).parent
    return _text_of(str(beside / ".env")) if (beside / ".env").is_file() else None


def _show_lint(report: Report) -> None:
    from agent.lint import Level

    if report.networks is None:
        where = "OpenResty is in none of the files"
    else:
        where = f"OpenResty is on: {', '.join(report.networks) or 'no network'}"
    click.echo(f"read as {report.kind.value} {report.name} ({report.because}); {where}")
    colours = {"rejected": "red", "warning": "yellow", "note": None}

    def show(finding: Finding) -> None:
        before, level = f"  {finding.place}: ", finding.level.value
        line = _wrapped(f"{before}{level}: {finding.message} ({finding.reason})", indent=4)
        click.echo(line.replace(level, click.style(level, fg=colours[level]), 1))
        click.echo(_wrapped(f"      {finding.hint}", indent=6))

    for finding in report.findings:
        show(finding)
    for verdict in report.verdicts:
        click.echo(f"\n{verdict.key}: {verdict.outcome.value}")
        for line in verdict.routes:
            click.echo(f"  {line}")
        for finding in verdict.findings:
            show(finding)
    routed = sum(bool(verdict.routes) for verdict in report.verdicts)
    click.echo(
        f"\n{len(report.verdicts)} services, {routed} routed: "
        f"{report.count(Level.REJECTED)} rejected, {report.count(Level.WARNING)} warnings"
    )


@main.command()
def spec() -> None:
    """Print a sample of the settings with every key, commented."""
    from agent.config.document import sample

    click.echo(sample(), nl=False)


@main.command()
def version() -> None:
    """Show the version."""
    _print_version(click.get_current_context())


if __name__ == "__main__":
    main(prog_name="tidegate")
