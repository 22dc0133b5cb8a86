"""The command line: exit codes and messages that say what, where, why and the cure."""

from __future__ import annotations

import contextlib
import json
import os
import pty
import re
import signal
import socket
import subprocess
import sys
from pathlib import Path

import pytest
from click.testing import CliRunner, Result

from agent import __version__
from agent.cli import INTERRUPTED, NEGATIVE, OK, UNREACHABLE, USAGE, main
from agent.config.settings import load
from agent.http import Listener, as_json

STATIC = """\
[[service]]
name = "web"
[service.labels]
"interlock.hostname" = "web"
"interlock.domain" = "test"
[[service.peer]]
address = "192.0.2.1"
port = 80
"""


@pytest.fixture(autouse=True)
def no_settings_in_the_environment(monkeypatch):
    for name in ("INTERLOCK_CONFIG", "TIDEGATE_CONFIG", "DOCKER_HOST"):
        monkeypatch.delenv(name, raising=False)


@pytest.fixture
def config(tmp_path: Path) -> Path:
    (tmp_path / "services.toml").write_text(STATIC)
    path = tmp_path / "config.toml"
    path.write_text(f'Sources = ["static"]\nStaticFile = "{tmp_path}/services.toml"\n')
    return path


def tidegate(*arguments: object) -> Result:
    result = CliRunner().invoke(main, [str(item) for item in arguments], prog_name="tidegate")
    assert result.exception is None or isinstance(result.exception, SystemExit), result.exception
    return result


@pytest.mark.parametrize("arguments", [["version"], ["--version"], ["-v"]])
def test_the_version_in_each_way_that_interlock_had(arguments):
    result = tidegate(*arguments)
    assert (result.exit_code, result.stdout) == (OK, f"tidegate {__version__}\n")


@pytest.mark.parametrize("flag", ["-h", "--help"])
def test_help_lists_every_command(flag):
    result = tidegate(flag)
    assert result.exit_code == OK
    for command in ("run", "check", "status", "plan", "explain", "spec", "version"):
        assert f"\n  {command}" in result.stdout


@pytest.mark.parametrize("arguments", [["fly"], ["run", "--wings"], ["explain"]])
def test_a_usage_error_is_exit_code_2(arguments):
    assert tidegate(*arguments).exit_code == USAGE


@pytest.mark.parametrize("command", [["run"], ["check"], ["status"], ["plan"], ["explain", "x"]])
def test_settings_that_cannot_be_used_are_told_line_by_line_with_exit_code_2(command, tmp_path):
    path = tmp_path / "config.toml"
    path.write_text("ListenAddr = 5\nPollInterval = 'soon'\n")
    result = tidegate(*command, "-c", path)
    assert result.exit_code == USAGE
    first, second = result.stderr.strip().splitlines()
    assert first.startswith(f"tidegate: {path}: line 1: ListenAddr: got 5")
    assert second.startswith(f"tidegate: {path}: line 2: PollInterval: got 'soon'")


def test_a_missing_settings_file_is_named(tmp_path):
    result = tidegate("run", "-c", tmp_path / "none.toml")
    assert result.exit_code == USAGE
    assert "none.toml: cannot be read: No such file" in result.stderr


def test_without_settings_the_defaults_are_in_force_and_that_is_said():
    result = tidegate("plan")
    assert "the built-in defaults are in force" in result.stderr


def test_the_environment_beats_the_option(monkeypatch, tmp_path):
    monkeypatch.setenv("INTERLOCK_CONFIG", "ListenAddr = 5")
    result = tidegate("run", "-c", tmp_path / "none.toml")
    assert "environment variable INTERLOCK_CONFIG: line 1: ListenAddr" in result.stderr


def test_run_on_a_port_that_is_taken_says_so(config):
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        config.write_text(config.read_text() + f'ListenAddr = "127.0.0.1:{port}"\n')
        done = subprocess.run(
            [sys.executable, "-m", "agent.cli", "run", "-c", str(config)],
            capture_output=True,
            text=True,
            timeout=60,
            cwd=Path(__file__).resolve().parents[2],
        )
    assert done.returncode == USAGE
    assert "cannot be listened on" in done.stderr
    assert "Traceback" not in done.stderr


# check


def test_check_of_a_good_setup_is_exit_code_0(config):
    result = tidegate("check", "-c", config)
    assert result.exit_code == OK, result.stdout
    assert f"ok       settings: read from {config}" in result.stdout
    assert "ok       source static: 1 workloads" in result.stdout
    assert "warning  OpenResty: no instance is known" in result.stdout


def test_check_tells_an_unknown_key_and_strict_fails_on_it(config):
    config.write_text("Frobnicate = 1\n" + config.read_text())
    lax, strict = tidegate("check", "-c", config), tidegate("check", "-c", config, "--strict")
    assert "warning  settings" in lax.stdout
    assert "Frobnicate" in lax.stdout
    assert lax.exit_code == OK
    assert "failed   settings" in strict.stdout
    assert strict.exit_code == NEGATIVE


def test_check_finds_each_fault_and_gives_its_cure(config, free_port, tmp_path):
    port = free_port()
    config.write_text(
        config.read_text()
        + f"""
        [OpenResty]
        TokenFile = "{tmp_path}/no-token"
        URLs = ["http://127.0.0.1:{port}"]
        """
    )
    (tmp_path / "services.toml").write_text("[[service]]\nname = 5\n[nonsense]\n")
    result = tidegate("check", "-c", config, "--json")
    assert result.exit_code == NEGATIVE
    findings = json.loads(result.stdout)["findings"]
    failed = {item["subject"]: item for item in findings if item["level"] == "failed"}
    assert set(failed) == {
        "token",
        "source static",
        f"OpenResty http://127.0.0.1:{port}",
    }
    assert "no-token cannot be read" in failed["token"]["text"]
    assert all(item["cure"] for item in failed.values())


def test_settings_that_could_not_be_listened_by_are_refused_with_their_line(config):
    config.write_text(f'ListenAddr = "nonsense"\n{config.read_text()}')
    result = tidegate("check", "-c", config)
    assert result.exit_code == USAGE
    assert "line 1: ListenAddr: got 'nonsense', expected something like" in result.stderr


def test_check_says_that_there_is_no_engine_and_how_to_do_without(tmp_path):
    path = tmp_path / "config.toml"
    path.write_text(f'DockerURL = "unix://{tmp_path}/docker.sock"\n')
    result = tidegate("check", "-c", path)
    assert result.exit_code == NEGATIVE
    assert "failed   engine" in result.stdout
    assert 'Sources = ["static"]' in result.stdout


def test_check_tells_what_is_rejected_as_a_warning(config, tmp_path):
    (tmp_path / "services.toml").write_text(STATIC.replace('"test"', '"a b"'))
    result = tidegate("check", "-c", config)
    assert result.exit_code == OK
    assert "(invalid_host)" in result.stdout


def test_check_tells_a_template_that_cannot_be_used(config, tmp_path):
    (tmp_path / "default.conf.j2").write_text("{% nonsense %}")
    config.write_text(
        config.read_text() + f'[[Extensions]]\nName = "nginx"\nTemplatePath = "{tmp_path}"\n'
    )
    result = tidegate("check", "-c", config)
    assert result.exit_code == NEGATIVE
    assert "failed   templates" in result.stdout


def test_check_tells_a_directory_of_templates_that_is_not_there(config, tmp_path):
    config.write_text(config.read_text() + f'[[Extensions]]\nTemplatePath = "{tmp_path}/none"\n')
    result = tidegate("check", "-c", config)
    assert result.exit_code == NEGATIVE
    assert f"failed   templates: TemplatePath {tmp_path}/none is no directory" in result.stdout


@pytest.mark.parametrize(
    ("content", "what"), [(b"", "is empty"), (b"a\nb", "is no token"), (b"\xfc", "is no token")]
)
def test_check_tells_a_token_that_cannot_be_one(config, tmp_path, content, what):
    (tmp_path / "token").write_bytes(content)
    config.write_text(config.read_text() + f'[OpenResty]\nTokenFile = "{tmp_path}/token"\n')
    result = tidegate("check", "-c", config)
    assert result.exit_code == NEGATIVE
    assert f"failed   token: OpenResty.TokenFile {tmp_path}/token {what}" in result.stdout


def test_check_says_which_of_several_settings_counts(config, monkeypatch):
    monkeypatch.setenv("INTERLOCK_CONFIG", config.read_text())
    result = tidegate("check", "-c", config)
    assert "ok       settings: read from environment variable INTERLOCK_CONFIG" in result.stdout
    assert f"warning  settings: environment variable INTERLOCK_CONFIG beats {config}" in (
        result.stdout
    )


def test_check_names_a_key_that_is_not_used_and_strict_does_not_fail_on_it(config):
    config.write_text(config.read_text() + "[[Extensions]]\nName = 'nginx'\nRLimitNoFile = 5\n")
    result = tidegate("check", "-c", config, "--strict")
    assert "Extensions[0].RLimitNoFile is not used" in result.stdout
    assert result.exit_code == OK


def test_check_of_a_store_that_is_away_is_a_failure(config, free_port):
    result = tidegate("check", "-c", config, "-k", f"etcd://127.0.0.1:{free_port()}")
    assert result.exit_code == NEGATIVE
    assert "failed   settings: etcd at 127.0.0.1" in result.stdout


@pytest.mark.parametrize("command", [["plan"], ["explain", "x"], ["status"]])
def test_a_store_that_is_away_is_exit_code_3(command, free_port):
    result = tidegate(*command, "-k", f"consul://127.0.0.1:{free_port()}")
    assert result.exit_code == UNREACHABLE
    assert "cannot be reached" in result.stderr


def test_a_url_of_a_store_that_cannot_be_used_is_exit_code_2():
    result = tidegate("run", "-k", "redis://h")
    assert result.exit_code == USAGE
    assert "etcd://, consul:// or zk://" in result.stderr


def test_spec_prints_what_run_takes():
    result = tidegate("spec")
    assert result.exit_code == OK
    assert load(result.stdout, where="spec")[1] == ()


# status


STATE = {
    "version": "0.1.0",
    "settings_from": "config.toml",
    "ready": True,
    "reasons": [],
    "waiting_for": [],
    "sources": [
        {"name": "swarm", "mode": "watch", "age_seconds": 0.4, "events": 7, "error": "",
         "mode_reason": ""}
    ],
    "upstreams": [
        {"name": "web.test/", "peers": [{"address": "10.0.0.1", "port": 80, "state": "up"}]}
    ],
    "rejections": [
        {"subject": "service [bad]", "reason": "no_port", "message": "no port", "hint": "name it"}
    ],
    "instances": [
        {"name": "nginx.1", "state": "in_sync", "revision": 7, "generation": "ab" * 32,
         "url": "http://10.0.0.9:8081", "error": ""}
    ],
}  # fmt: skip


@pytest.fixture
def agent():
    state = dict(STATE)
    listener = Listener("127.0.0.1:0", {"/api/state": lambda: as_json(state)})
    listener.start()
    yield f"http://127.0.0.1:{listener.port}", state
    listener.stop()


def test_status_shows_sources_instances_upstreams_and_rejections(agent):
    url, _ = agent
    result = tidegate("status", "--url", url)
    assert result.exit_code == OK, result.output
    for text in ("watch", "nginx.1", "in_sync", "web.test/", "10.0.0.1:80", "service [bad]"):
        assert text in result.stdout


def test_status_as_json_is_what_the_agent_says(agent):
    url, state = agent
    assert json.loads(tidegate("status", "--url", url, "--json").stdout) == state


def test_status_of_an_agent_that_is_not_ready_is_exit_code_1_with_the_reasons(agent):
    url, state = agent
    state.update(ready=False, reasons=["source swarm has not published yet"])
    result = tidegate("status", "--url", url)
    assert result.exit_code == NEGATIVE
    assert "source swarm has not published yet" in result.stdout


def test_status_asks_where_the_settings_say(agent, tmp_path):
    url, _ = agent
    path = tmp_path / "config.toml"
    path.write_text(f'ListenAddr = ":{url.rpartition(":")[2]}"\n')
    assert tidegate("status", "-c", path).exit_code == OK


def test_status_without_an_agent_is_exit_code_3(free_port):
    url = f"http://127.0.0.1:{free_port()}"
    result = tidegate("status", "--url", url)
    assert result.exit_code == UNREACHABLE
    assert f"no agent answers at {url}/api/state: Connection refused" in result.stderr


@pytest.mark.parametrize(
    "answer",
    [
        {},
        [],
        7,
        {"ready": True},
        {**STATE, "sources": [1]},
        {**STATE, "ready": False, "reasons": 5},
    ],
)
@pytest.mark.parametrize("form", [[], ["--json"]])
def test_status_of_something_that_is_no_agent_is_exit_code_3(answer, form):
    listener = Listener("127.0.0.1:0", {"/api/state": lambda: as_json(answer)})
    listener.start()
    try:
        result = tidegate("status", "--url", f"http://127.0.0.1:{listener.port}", *form)
    finally:
        listener.stop()
    if form and isinstance(answer, dict) and "ready" in answer:
        assert json.loads(result.stdout) == answer  # as it is
        return
    assert (result.exit_code, result.stdout) == (UNREACHABLE, "")
    assert "what answers is no agent of this version" in result.stderr


@pytest.mark.parametrize("url", ["nowhere", "http://[::1", "ftp://x", "http://a..b"])
def test_status_at_what_is_no_url_says_so(url):
    result = tidegate("status", "--url", url)
    assert result.exit_code == UNREACHABLE
    assert f"no agent answers at {url}" in result.stderr
    assert len(result.stderr.splitlines()) <= 2  # the other one: no settings were given


# what holds for all


def test_an_answer_that_cannot_be_written_is_told(config):
    with Path("/dev/full").open("w") as full:
        done = subprocess.run(
            [sys.executable, "-m", "agent.cli", "check", "-c", str(config)],
            stdout=full,
            stderr=subprocess.PIPE,
            text=True,
            timeout=60,
            cwd=Path(__file__).resolve().parents[2],
        )
    assert done.returncode == UNREACHABLE
    assert done.stderr.startswith("tidegate: the answer cannot be written: ")
    assert "Traceback" not in done.stderr


def test_on_a_terminal_lines_are_broken_at_words(config, tmp_path):
    labels = (
        '"interlock.ssl" = "true"\n"interlock.port" = "' + "no port " * 20 + '"\n[[service.peer]]'
    )
    (tmp_path / "services.toml").write_text(STATIC.replace("[[service.peer]]", labels))
    for command in (["check"], ["plan"], ["explain", "web"]):
        ours, theirs = pty.openpty()
        process = subprocess.Popen(
            [sys.executable, "-m", "agent.cli", *command, "-c", str(config)],
            stdout=theirs,
            env={**os.environ, "COLUMNS": "60"},
            cwd=Path(__file__).resolve().parents[2],
        )
        os.close(theirs)
        with os.fdopen(ours, "rb") as terminal, contextlib.suppress(OSError):  # its end
            text = b""
            while chunk := terminal.read1(65536):
                text += chunk
        process.wait(60)
        lines = re.sub(r"\x1b\[[0-9;]*m", "", text.decode()).splitlines()
        assert any("no port" in line for line in lines)
        assert [line for line in lines if len(line) > 60 and " " in line.strip()] == []


# plan and explain


@pytest.mark.parametrize("name", ["сайт".encode(), b"caf\xe9"], ids=["foreign", "no_text"])
def test_a_name_that_the_terminal_cannot_show_is_told_all_the_same(config, name):
    done = subprocess.run(
        [sys.executable, "-X", "utf8", "-m", "agent.cli", "explain", name, "-c", str(config)],
        capture_output=True,
        timeout=60,
        env={**os.environ, "PYTHONIOENCODING": "latin-1"},
        cwd=Path(__file__).resolve().parents[2],
    )
    assert (done.returncode, b"Traceback" in done.stderr) == (NEGATIVE, False)
    assert b"nothing is called " in done.stdout


def test_ctrl_c_is_exit_code_130_and_one_line(config, tmp_path):
    with socket.create_server(("127.0.0.1", 0)) as silent:
        url = f"http://127.0.0.1:{silent.getsockname()[1]}"
        asking = subprocess.Popen(
            [sys.executable, "-m", "agent.cli", "status", "-c", str(config), "--url", url],
            stderr=subprocess.PIPE,
            text=True,
            cwd=Path(__file__).resolve().parents[2],
        )
        silent.settimeout(60)
        connection, _ = silent.accept()  # now it waits for the answer
        with connection:
            asking.send_signal(signal.SIGINT)
            _, said = asking.communicate(timeout=60)
    assert (asking.returncode, said) == (INTERRUPTED, "tidegate: interrupted\n")


def test_plan_without_an_instance_says_that_nothing_would_be_pushed(config):
    result = tidegate("plan", "-c", config)
    assert result.exit_code == OK
    assert "1 hosts, 1 upstreams, 0 rejections" in result.stdout
    assert "nothing would be pushed" in result.stdout


def test_plan_as_json_names_what_would_be_served(config):
    found = json.loads(tidegate("plan", "-c", config, "--json").stdout)
    assert found["hosts"] == ["web.test"]
    assert found["upstreams"] == ["web.test/"]


def test_plan_with_an_instance_that_is_away_is_exit_code_3(config, free_port):
    port = free_port()
    config.write_text(config.read_text() + f'[OpenResty]\nURLs = ["http://127.0.0.1:{port}"]\n')
    result = tidegate("plan", "-c", config)
    assert result.exit_code == UNREACHABLE
    assert "cannot be asked" in result.stdout


@pytest.mark.parametrize("command", [["plan"], ["explain", "web"]])
def test_a_source_that_is_away_is_exit_code_3(command, tmp_path):
    path = tmp_path / "config.toml"
    path.write_text(f'DockerURL = "unix://{tmp_path}/docker.sock"\n')
    result = tidegate(*command, "-c", path)
    assert result.exit_code == UNREACHABLE
    assert result.stderr.startswith("tidegate: ")
    assert "docker.sock" in result.stderr


def test_explain_tells_the_steps_of_what_is_routed(config):
    result = tidegate("explain", "web.test", "-c", config)
    assert result.exit_code == OK
    assert "web.test: routed" in result.stdout


def test_explain_tells_of_a_static_service_in_whole_sentences(config, tmp_path):
    (tmp_path / "services.toml").write_text(
        STATIC.replace('"interlock.domain" = "test"', '"interlock.tcp_port" = "5432"').replace(
            '"interlock.hostname" = "web"\n', ""
        )
    )
    lines = tidegate("explain", "web", "-c", config).stdout.splitlines()
    assert "  + Its labels ask for TCP port 5432." in lines
    reached = "  + Its instances are reached over the addresses that the static file gives"
    assert any(line.startswith(reached) for line in lines)
    assert "  + web 192.0.2.1:80 is up at 192.0.2.1:80." in lines


def test_explain_of_what_is_not_routed_is_exit_code_1_with_the_reason(config, tmp_path):
    (tmp_path / "services.toml").write_text(STATIC.replace('"test"', '"a b"'))
    result = tidegate("explain", "web", "-c", config)
    assert result.exit_code == NEGATIVE
    assert "not routed" in result.stdout


def test_explain_of_nothing_suggests_what_was_meant(config):
    result = tidegate("explain", "wep.test", "-c", config)
    assert result.exit_code == NEGATIVE
    assert "nothing is called wep.test" in result.stdout
    assert "did you mean" in result.stdout


def test_explain_as_json_can_be_parsed(config):
    found = json.loads(tidegate("explain", "web.test", "-c", config, "--json").stdout)
    assert found["routed"] is True


QUARANTINED = {
    "subject": "host web.test",
    "reason": "host_quarantined",
    "message": "nginx of nginx.1 refused its configuration: cannot load web.pem",
    "hint": "Its last accepted configuration serves on, if it had one.",
    "source": "",
}


def test_explain_of_a_host_in_quarantine_is_exit_code_1_with_the_message_of_nginx(config, agent):
    url, state = agent
    state["rejections"] = [QUARANTINED]
    result = tidegate("explain", "web.test", "-c", config, "--url", url)
    assert result.exit_code == NEGATIVE
    assert "web.test: not routed as it asks for: refused by OpenResty" in result.stdout
    assert "cannot load web.pem" in result.stdout
    assert "serves on, if it had one" in result.stdout
    assert "note:" not in result.stdout


def test_check_and_plan_tell_what_is_in_quarantine(config, agent):
    url, state = agent
    state["rejections"] = [QUARANTINED, *STATE["rejections"]]
    checked = tidegate("check", "-c", config, "--url", url)
    assert checked.exit_code == OK
    assert "warning  host web.test: nginx of nginx.1 refused" in checked.stdout
    planned = tidegate("plan", "-c", config, "--url", url)
    assert planned.exit_code == OK
    assert "1 rejections" in planned.stdout
    assert "rejected: host web.test: nginx of nginx.1 refused" in planned.stdout
    found = json.loads(tidegate("plan", "-c", config, "--url", url, "--json").stdout)
    assert [item["subject"] for item in found["rejections"]] == ["host web.test"]
    assert found["notes"] == []


@pytest.mark.parametrize("command", [["plan"], ["explain", "web.test"], ["check"]])
def test_an_agent_that_cannot_be_asked_is_told_and_they_go_on(config, free_port, command):
    url = f"http://127.0.0.1:{free_port()}"
    result = tidegate(*command, "-c", config, "--url", url)
    assert result.exit_code == OK
    note = f"the running agent could not be asked at {url}: Connection refused, so what OpenResty"
    assert result.stdout.count(note) == 1


def test_they_ask_where_the_settings_say(config, agent):
    url, state = agent
    state["rejections"] = [QUARANTINED]
    address = url.removeprefix("http://")
    config.write_text(f'ListenAddr = "{address}"\n' + config.read_text())
    assert tidegate("explain", "web.test", "-c", config).exit_code == NEGATIVE


def test_something_else_that_answers_is_not_taken_for_the_agent(config, agent):
    url, state = agent
    state["rejections"] = "none of your business"
    found = json.loads(tidegate("explain", "web.test", "-c", config, "--url", url, "--json").stdout)
    assert found["routed"] is True
    assert "what answers is no agent" in found["notes"][0]


def test_an_agent_that_stands_by_does_not_know_what_was_refused(config, agent):
    url, state = agent
    state["instances"] = [{"id": "x", "name": "nginx.1", "state": "standby"}]
    result = tidegate("plan", "-c", config, "--url", url)
    assert "note: the agent that was asked stands by for OpenResty nginx.1" in result.stdout


def test_the_light_commands_do_not_load_the_heavy_libraries():
    code = (
        "import sys\nfrom agent.cli import main\n"
        "try:\n    main(['version'])\nexcept SystemExit:\n    pass\n"
        "heavy = {'grpc', 'docker', 'rich', 'jinja2'} & set(sys.modules)\n"
        "assert not heavy, heavy"
    )
    subprocess.run(
        [sys.executable, "-c", code], check=True, cwd=Path(__file__).resolve().parents[2]
    )
