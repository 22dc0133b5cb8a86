"""Where the configuration comes from: the environment beats the file, as Interlock had it."""

from __future__ import annotations

from pathlib import Path

import pytest

from agent.config.settings import Settings
from agent.config.stores import BUILT_IN, load
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
    with pytest.raises(SettingsError, match="environment variable INTERLOCK_CONFIG: ListenAddr"):
        load(None, {"INTERLOCK_CONFIG": "ListenAddr = 5"})


def test_unknown_keys_are_warnings(file):
    Path(file).write_text("Listenaddr = ':1'\nFrobnicate = 1\n")
    (warning,) = load(file, {}).warnings
    assert "Frobnicate" in warning
