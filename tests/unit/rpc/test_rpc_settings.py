"""Environment in, frozen settings out; wrong values are named."""

from pathlib import Path

import pytest

from arriero import settings
from arriero.errors import FailedPrecondition, InvalidArgument, NotFound
from arriero.settings import (
    ClientSettings,
    ServerSettings,
    SourceSettings,
    StoreSettings,
    secret,
)


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


def test_a_secret_is_named_and_its_value_comes_from_the_environment():
    env = {"ARRIERO_SECRET_MY_HUB": "value\n"}
    assert secret("my-hub", field="token_secret", env=env) == "value"
    with pytest.raises(FailedPrecondition, match="ARRIERO_SECRET_OTHER set"):
        secret("other", field="token_secret", env=env)


@pytest.mark.parametrize("token", ["hf_abcdefghij", "sk-abcdef", "a" * 41, "two words", ""])
def test_a_token_in_place_of_a_name_is_refused_and_not_repeated(token):
    with pytest.raises(InvalidArgument, match="is not the name of a secret") as caught:
        secret(token, field="token_secret", env={})
    assert not token or token not in caught.value.message


@pytest.mark.parametrize(
    "url",
    [
        "http://169.254.169.254/latest",
        "http://[fe80::1]:80/",
        "http://[::ffff:169.254.0.1]/",
    ],
)
def test_link_local_addresses_are_never_called(url):
    with pytest.raises(InvalidArgument, match="link-local"):
        SourceSettings().check_url(url, field="endpoint")


def test_a_link_local_address_behind_another_spelling_is_found_when_it_is_looked_up():
    sources = SourceSettings()
    decimal = "http://2852039166/v1"  # 169.254.169.254
    assert sources.check_url(decimal, field="endpoint") == decimal
    with pytest.raises(InvalidArgument, match="link-local"):
        sources.check_url(decimal, field="endpoint", resolve=True)


def test_only_allowed_hosts_are_called_where_there_is_a_list():
    sources = SourceSettings.from_env({"ARRIERO_ALLOWED_HOSTS": "localhost, *.example.org"})
    assert sources.check_url("https://a.example.org/v1", field="endpoint")
    assert sources.check_url("http://LOCALHOST:80/v1", field="endpoint")
    with pytest.raises(InvalidArgument, match="add it to ARRIERO_ALLOWED_HOSTS"):
        sources.check_url("https://example.com/v1", field="endpoint")


@pytest.mark.parametrize("url", ["localhost:80", "ftp://a/b", "http:///v1", "http://a:b/v1", ""])
def test_what_is_no_url_is_refused(url):
    with pytest.raises(InvalidArgument, match="is not a URL"):
        SourceSettings().check_url(url, field="endpoint")


def test_credentials_in_a_url_are_refused_and_not_repeated():
    with pytest.raises(InvalidArgument, match="name a secret instead") as caught:
        SourceSettings().check_url("https://me:hunter2@example.org/v1", field="endpoint")
    assert "hunter2" not in caught.value.message
