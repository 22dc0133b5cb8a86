"""Where the configuration comes from: store over environment over file, as Interlock had it."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from agent.config.kv import parse
from agent.config.settings import Settings
from agent.config.stores import BUILT_IN, Discovery, choose, load
from agent.errors import SettingsError


@pytest.fixture
def file(tmp_path: Path) -> str:
    path = tmp_path / "config.toml"
    path.write_text('ListenAddr = ":1"\n')
    return str(path)


def test_the_file_is_read(file):
    loaded = load(file, {})
    assert (loaded.settings.listen_addr, loaded.where) == (":1", file)


@pytest.mark.parametrize("variable", ["INTERLOCK_CONFIG", "TIDEGATE_CONFIG"])
def test_the_environment_beats_the_file(file, variable):
    loaded = load(file, {variable: 'ListenAddr = ":2"'})
    assert loaded.settings.listen_addr == ":2"
    assert variable in loaded.where


def test_the_file_is_not_even_opened_then():
    assert load("/no/such/file", {"INTERLOCK_CONFIG": 'ListenAddr = ":2"'})


def test_our_own_variable_beats_interlocks():
    env = {"INTERLOCK_CONFIG": 'ListenAddr = ":2"', "TIDEGATE_CONFIG": 'ListenAddr = ":3"'}
    assert load(None, env).settings.listen_addr == ":3"


@pytest.mark.parametrize("empty", ["", "  \n"])
def test_an_empty_variable_counts_as_none(file, empty):
    assert load(file, {"INTERLOCK_CONFIG": empty}).settings.listen_addr == ":1"


def test_nothing_given_is_the_built_in_defaults():
    loaded = load(None, {})
    assert (loaded.settings, loaded.where) == (Settings(), BUILT_IN)


def test_a_missing_file_is_named(tmp_path):
    with pytest.raises(SettingsError, match=r"none\.toml: cannot be read: No such file"):
        load(str(tmp_path / "none.toml"), {})


def test_a_directory_is_no_file(tmp_path):
    with pytest.raises(SettingsError, match="cannot be read"):
        load(str(tmp_path), {})


def test_a_file_that_is_no_text_is_named(tmp_path):
    path = tmp_path / "config.toml"
    path.write_bytes(b"\xff\xfe")
    with pytest.raises(SettingsError, match="not UTF-8"):
        load(str(path), {})


def test_what_is_wrong_is_told_with_where_it_stood():
    with pytest.raises(
        SettingsError, match="environment variable INTERLOCK_CONFIG: line 1: ListenAddr"
    ):
        load(None, {"INTERLOCK_CONFIG": "ListenAddr = 5"})


def test_unknown_keys_are_warnings(file):
    Path(file).write_text("Listenaddr = ':1'\nFrobnicate = 1\n")
    (warning,) = load(file, {}).warnings
    assert "Frobnicate" in str(warning)


def test_a_store_beats_the_environment_and_that_the_file_and_it_is_told(file):
    env = {"INTERLOCK_CONFIG": 'ListenAddr = ":2"'}
    choice = choose(file, env, Discovery("etcd://h"))
    assert choice.store.where == "etcd://h:2379/interlock/v1/config"
    assert choice.passed_over == ("environment variable INTERLOCK_CONFIG", file)
    assert load(file, env).passed_over == (file,)
    assert load(file, {}).passed_over == ()


def test_an_empty_file_is_the_defaults_and_a_remark(file):
    Path(file).write_text("\n")
    loaded = load(file, {})
    assert loaded.settings == Settings()
    assert "missing or empty" in str(loaded.warnings[0])


@pytest.mark.parametrize(
    ("url", "where", "user"),
    [
        ("etcd://h", "etcd://h:2379/interlock/v1/config", ""),
        ("consul://h:1/a/b", "consul://h:1/a/b", ""),
        ("zk://a:1,b,c:3/x", "zk://a:1,b:2181,c:3/x", ""),
        ("ETCD://[::1]:2379", "etcd://[::1]:2379/interlock/v1/config", ""),
        ("etcd://root:p%40ss@h/", "etcd://h:2379/interlock/v1/config", "root"),
    ],
)
def test_the_url_of_a_store(url, where, user):
    address = parse(Discovery(url))
    assert (address.where, address.user) == (where, user)
    assert "p@ss" not in address.where
    assert address.password == ("p@ss" if user else "")


@pytest.mark.parametrize(
    "url", ["h:2379", "redis://h", "etcd://", "etcd://h:x", "etcd://h:99999", "etcd://a:b@"]
)
def test_a_url_of_another_form_is_refused_with_the_form(url):
    with pytest.raises(SettingsError, match=r"--discovery.*HOST") as caught:
        parse(Discovery(url))
    assert "a:b" not in str(caught.value)


def test_tls_files_have_to_be_there_and_come_in_pairs(tmp_path):
    with pytest.raises(SettingsError, match=r"--discovery-tls-ca-cert: .*cannot be read"):
        parse(Discovery("etcd://h", ca=str(tmp_path / "none.pem")))
    with pytest.raises(SettingsError, match=r"one without the other"):
        parse(Discovery("etcd://h", cert="x.pem"))


def test_zookeepers_library_says_nothing_by_itself():
    """Commands other than run set up no logging, and Python then prints every warning."""
    code = "import agent.config.zookeeper, logging; logging.getLogger('kazoo.client').error('x')"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, timeout=60, check=True)
    assert done.stderr == b""
