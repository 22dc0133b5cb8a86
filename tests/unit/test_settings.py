"""The schema of config.toml: Interlock's keys as they are, and mistakes told by name."""

from __future__ import annotations

import pytest

from agent.config.settings import Extension, OpenResty, Settings, load
from agent.errors import SettingsError


def settings(text: str) -> Settings:
    return load(text, where="config.toml")[0]


def problem(text: str) -> str:
    with pytest.raises(SettingsError) as caught:
        load(text, where="config.toml")
    return str(caught.value)


def test_an_interlock_file_is_read_as_it_is():
    read, warnings = load(
        """
        ListenAddr = ":8080"
        DockerURL = "unix:///var/run/docker.sock"
        TLSCACert = "/certs/ca.pem"
        EnableMetrics = true
        PollInterval = "2s"

        [[Extensions]]
        Name = "nginx"
        Port = 8000
        SSLPort = 8443
        SSLCertPath = "/etc/ssl"
        ProxyReadTimeout = 60
        BackendOverrideAddress = "172.17.0.1"
        """,
        where="config.toml",
    )
    assert warnings == ()
    assert read.docker_url == "unix:///var/run/docker.sock"
    assert read.tls_ca_cert == "/certs/ca.pem"
    assert read.poll_interval == 2
    assert read.extension.port == 8000
    assert read.extension.ssl_port == 8443
    assert read.extension.ssl_cert_path == "/etc/ssl"
    assert read.extension.proxy_read_timeout == 60
    assert read.extension.backend_override_address == "172.17.0.1"


def test_an_empty_file_is_all_defaults():
    assert settings("") == Settings()
    assert settings("").extension == Extension()
    assert settings("").openresty == OpenResty()


@pytest.mark.parametrize("key", ["listenaddr", "LISTENADDR", "ListenAddr"])
def test_keys_match_in_any_case(key):
    assert settings(f'{key} = ":9"').listen_addr == ":9"


def test_keys_of_tables_match_in_any_case():
    read = settings('[openresty]\nurls = ["http://x"]\ntokenfile = "/t"\n[[extensions]]\nport = 1')
    assert read.openresty.urls == ("http://x",)
    assert read.openresty.token_file == "/t"
    assert read.extension.port == 1


@pytest.mark.parametrize(
    ("text", "seconds"),
    [('"500ms"', 0.5), ('"1m30s"', 90), ('"1h"', 3600), ("2", 2), ("0.25", 0.25), ('""', 0)],
)
def test_durations_are_read_as_go_did(text, seconds):
    assert settings(f"PollInterval = {text}").poll_interval == seconds


@pytest.mark.parametrize("text", ['"soon"', '"5"', '"5 parsecs"', "true", '"-1s"', "-1"])
def test_a_duration_that_is_none_is_refused_by_name(text):
    found = problem(f"PollInterval = {text}")
    assert "PollInterval" in found


def test_a_key_that_is_not_known_is_a_warning_with_the_one_that_was_meant():
    _, (warning,) = load("PolInterval = '1s'", where="config.toml")
    assert warning == "config.toml: unknown key PolInterval is ignored; did you mean PollInterval?"


def test_a_key_of_a_table_that_is_not_known_is_a_warning_with_its_path():
    _, warnings = load("[[Extensions]]\nPrt = 1\n[OpenResty]\nUrl = 'x'", where="c")
    assert "Extensions[0].Prt" in warnings[0]
    assert "OpenResty.Url" in warnings[1]


def test_a_wrong_type_is_refused_with_path_and_value():
    found = problem('[[Extensions]]\nPort = "80"')
    assert "config.toml: Extensions[0].Port" in found
    assert "'80'" in found


def test_every_mistake_is_told_at_once():
    with pytest.raises(SettingsError) as caught:
        load("ListenAddr = 5\nPollInterval = 'x'\nLogLevel = 'loud'", where="c")
    assert len(caught.value.problems) == 3


def test_a_file_that_is_no_toml_says_where_it_broke():
    assert "line 2" in problem("ListenAddr = ':1'\nPort = = 5")


def test_settings_that_are_equal_compare_equal_so_that_a_reread_can_be_skipped():
    assert settings('ListenAddr = ":1"') == settings("listenaddr = ':1' # same")
