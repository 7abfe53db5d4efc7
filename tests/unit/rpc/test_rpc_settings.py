"""Environment in, frozen settings out; wrong values are named."""

from pathlib import Path

import pytest

from arriero import settings
from arriero.errors import InvalidArgument, NotFound
from arriero.settings import ClientSettings, ServerSettings, SourceSettings, StoreSettings


def test_an_empty_environment_gives_loopback_without_credentials():
    read = ServerSettings.from_env({})
    assert read == ServerSettings()
    assert read.listen == "127.0.0.1:0"
    assert not read.watch_parent


def test_server_settings_come_from_the_environment(tmp_path):
    read = ServerSettings.from_env(
        {
            "ARRIERO_LISTEN": "0.0.0.0:7000",
            "ARRIERO_SERVER_INSECURE": "yes",
            "ARRIERO_DRAIN_SECONDS": "2.5",
            "ARRIERO_PARENT_PID": "12",
            "ARRIERO_SERVER_TOKEN_FILE": str(tmp_path / "tokens"),
            "ARRIERO_ADDRESS_FILE": str(tmp_path / "address"),
        }
    )
    assert read.listen == "0.0.0.0:7000"
    assert read.insecure
    assert read.drain_seconds == 2.5
    assert read.watch_parent
    assert read.token_file == tmp_path / "tokens"
    assert read.address_file == tmp_path / "address"


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("ARRIERO_SERVER_INSECURE", "perhaps"),
        ("ARRIERO_DRAIN_SECONDS", "-1"),
        ("ARRIERO_DRAIN_SECONDS", "nan"),
        ("ARRIERO_DRAIN_SECONDS", "soon"),
    ],
)
def test_a_wrong_value_names_its_variable(name, value):
    with pytest.raises(InvalidArgument, match=name):
        ServerSettings.from_env({name: value})


def test_the_client_token_is_the_first_word_of_its_file_and_is_not_shown(tmp_path):
    file = tmp_path / "token"
    file.write_text("# who may call\n\ns3cret-token ana\n")
    read = ClientSettings.from_env({"ARRIERO_TOKEN_FILE": str(file)})
    assert read.token == "s3cret-token"
    assert "s3cret" not in repr(read)
    file.write_text("\n")
    with pytest.raises(InvalidArgument, match="holds no token"):
        ClientSettings.from_env({"ARRIERO_TOKEN_FILE": str(file)})


def test_home_and_store_follow_arriero_home(tmp_path):
    env = {"ARRIERO_HOME": str(tmp_path)}
    assert settings.home(env) == tmp_path
    assert StoreSettings.from_env(env).url == (tmp_path / "store").as_uri()
    assert StoreSettings.from_env({"ARRIERO_STORE": "file:///x"}).url == "file:///x"


def test_sources_outside_of_the_allowed_paths_are_refused(tmp_path):
    allowed, other = tmp_path / "data", tmp_path / "other"
    for directory in (allowed, other):
        directory.mkdir()
        (directory / "rows.json").write_text("[]")
    (allowed / "link.json").symlink_to(other / "rows.json")
    sources = SourceSettings.from_env({"ARRIERO_ALLOWED_PATHS": str(allowed)})

    assert sources.check(str(allowed / "rows.json"), field="sources[0]") == allowed / "rows.json"
    for wrong in (
        str(other / "rows.json"),
        str(allowed / "link.json"),
        f"{allowed}/../other/rows.json",
        "rows.json",
        f"{allowed}/a\0b",
    ):
        with pytest.raises(InvalidArgument) as caught:
            sources.check(wrong, field="sources[0]")
        assert caught.value.violations[0].field == "sources[0]"
    with pytest.raises(NotFound, match=r"sources\[0\]"):
        sources.check(str(allowed / "none.json"), field="sources[0]")
    with pytest.raises(InvalidArgument):
        SourceSettings().check(str(Path("/")), field="source")
