"""What a process is told from outside: environment to frozen dataclasses, once.

Responsibility: names, defaults and checks of the settings that several services or
clients share; what one room alone asks for is in its `__main__` or its own settings.
Does not know what the settings are used for.
"""

from __future__ import annotations

import ipaddress
import os
import re
import socket
from collections.abc import Mapping
from dataclasses import dataclass, field
from fnmatch import fnmatch
from pathlib import Path
from urllib.parse import SplitResult, urlsplit

from arriero.errors import FailedPrecondition, InvalidArgument, NotFound, Unavailable

__all__ = [
    "ClientSettings",
    "ClusterSettings",
    "S3Settings",
    "ServerSettings",
    "SourceSettings",
    "StoreSettings",
    "check_secret_name",
    "home",
    "secret",
]

Environment = Mapping[str, str]


def home(env: Environment | None = None) -> Path:
    """Where local state lives: `ARRIERO_HOME`, else `~/.arriero`."""
    text = (os.environ if env is None else env).get("ARRIERO_HOME", "")
    return Path(text).expanduser().absolute() if text else Path.home() / ".arriero"


# Names are words; tokens are long, or begin as the hub, clouds and forges begin theirs.
_SECRET_NAME = re.compile(r"(?!hf_|sk-|ghp_|AKIA)[A-Za-z][A-Za-z0-9_-]{0,39}")


def secret(name: str, *, field: str, env: Environment | None = None) -> str:
    """The secret that a spec names: the value of `ARRIERO_SECRET_<NAME>`.

    Raises:
        InvalidArgument: this is no name; perhaps a token itself, which specs never hold.
        FailedPrecondition: the environment has no such secret.
    """
    check_secret_name(name, field=field)
    variable = f"ARRIERO_SECRET_{name.upper().replace('-', '_')}"
    value = (os.environ if env is None else env).get(variable, "").strip()
    if not value:
        raise FailedPrecondition(
            f"{field}: there is no secret {name!r}; start the services with {variable} set",
            reason="NO_SECRET",
            metadata={"field": field},
        )
    return value


def check_secret_name(name: str, *, field: str) -> None:
    """Refuse what is not the name of a secret, without repeating it.

    Raises:
        InvalidArgument: it is none.
    """
    if not _SECRET_NAME.fullmatch(name):
        raise InvalidArgument.field(
            field,
            "is not the name of a secret; expected at most 40 letters, digits, '_' and '-' such as "
            "'hub', whose value the services find in ARRIERO_SECRET_HUB (never a token itself)",
        )


@dataclass(frozen=True, slots=True)
class ServerSettings:
    """How a gRPC server listens, and whom it lets in.

    Read from `ARRIERO_LISTEN`, `ARRIERO_HEALTH_LISTEN`, `ARRIERO_SERVER_TLS_CERT`,
    `ARRIERO_SERVER_TLS_KEY`, `ARRIERO_SERVER_TLS_CLIENT_CA`,
    `ARRIERO_SERVER_TOKEN_FILE`, `ARRIERO_SERVER_INSECURE`, `ARRIERO_DRAIN_SECONDS`,
    `ARRIERO_PARENT_PID` and `ARRIERO_ADDRESS_FILE`. What a server asks of its
    callers has `SERVER` in its name, since most services are clients as well.
    """

    listen: str = "127.0.0.1:0"
    """`host:port`, or `unix:/path`; port 0 takes a free one."""
    health_listen: str | None = None
    """`host:port` of a second port that serves health alone, in plain text."""
    tls_cert: Path | None = None
    """PEM file with the server's certificate chain."""
    tls_key: Path | None = None
    """PEM file with its key."""
    tls_client_ca: Path | None = None
    """PEM file of the CA that callers' certificates must come from (mTLS)."""
    token_file: Path | None = None
    """File of accepted bearer tokens, a line each: `token subject [role]`."""
    insecure: bool = False
    """Allow plain text beyond loopback."""
    drain_seconds: float = 20.0
    """How long running calls may take after SIGTERM."""
    watch_parent: bool = False
    """Drain and exit when the supervising parent (`ARRIERO_PARENT_PID`) is gone."""
    address_file: Path | None = None
    """File that gets the bound address once the server serves."""

    @classmethod
    def from_env(cls, env: Environment | None = None) -> ServerSettings:
        """Read the settings.

        Raises:
            InvalidArgument: a variable does not hold what it should.
        """
        read = _Reader(os.environ if env is None else env)
        return cls(
            listen=read.text("ARRIERO_LISTEN") or "127.0.0.1:0",
            health_listen=read.text("ARRIERO_HEALTH_LISTEN"),
            tls_cert=read.path("ARRIERO_SERVER_TLS_CERT"),
            tls_key=read.path("ARRIERO_SERVER_TLS_KEY"),
            tls_client_ca=read.path("ARRIERO_SERVER_TLS_CLIENT_CA"),
            token_file=read.path("ARRIERO_SERVER_TOKEN_FILE"),
            insecure=read.boolean("ARRIERO_SERVER_INSECURE", False),
            drain_seconds=read.seconds("ARRIERO_DRAIN_SECONDS", 20.0),
            watch_parent=read.text("ARRIERO_PARENT_PID") is not None,
            address_file=read.path("ARRIERO_ADDRESS_FILE"),
        )


@dataclass(frozen=True, slots=True)
class ClientSettings:
    """How a caller proves who it is, and whom it believes.

    Read from `ARRIERO_TOKEN`, `ARRIERO_TOKEN_FILE`, `ARRIERO_TLS_CA`,
    `ARRIERO_TLS_CERT`, `ARRIERO_TLS_KEY`, `ARRIERO_TLS_SERVER_NAME`,
    `ARRIERO_INSECURE` and `ARRIERO_TIMEOUT`.
    """

    token: str | None = field(default=None, repr=False)
    """Bearer token; from `token_file` when only that is given."""
    tls_ca: Path | None = None
    """PEM file of the CA that the server's certificate must come from; TLS is on when set."""
    tls_cert: Path | None = None
    """PEM file with the caller's own certificate (mTLS)."""
    tls_key: Path | None = None
    """PEM file with its key."""
    tls_server_name: str | None = None
    """Name expected in the server's certificate, where it is not the address's host."""
    insecure: bool = False
    """Allow sending the token in plain text beyond loopback."""
    timeout_seconds: float = 30.0
    """Deadline of unary calls that are given none."""

    @classmethod
    def from_env(cls, env: Environment | None = None) -> ClientSettings:
        """Read the settings, and the token file when one is named.

        The token is the first word of the file that is not in a comment, so that a
        server's token file serves as it is.

        Raises:
            InvalidArgument: a variable does not hold what it should, or the
                token file cannot be read or holds no token.
        """
        read = _Reader(os.environ if env is None else env)
        token, token_file = read.text("ARRIERO_TOKEN"), read.path("ARRIERO_TOKEN_FILE")
        if token is None and token_file is not None:
            token = _first_word(token_file)
        return cls(
            token=token,
            tls_ca=read.path("ARRIERO_TLS_CA"),
            tls_cert=read.path("ARRIERO_TLS_CERT"),
            tls_key=read.path("ARRIERO_TLS_KEY"),
            tls_server_name=read.text("ARRIERO_TLS_SERVER_NAME"),
            insecure=read.boolean("ARRIERO_INSECURE", False),
            timeout_seconds=read.seconds("ARRIERO_TIMEOUT", 30.0),
        )


@dataclass(frozen=True, slots=True)
class StoreSettings:
    """Where the model store is. Read from `ARRIERO_STORE`."""

    url: str
    """`file:///absolute/path`, a path, or `s3://bucket/prefix`; default `$ARRIERO_HOME/store`."""

    @classmethod
    def from_env(cls, env: Environment | None = None) -> StoreSettings:
        """Read the settings."""
        text = (os.environ if env is None else env).get("ARRIERO_STORE", "")
        return cls(url=text or (home(env) / "store").as_uri())


@dataclass(frozen=True, slots=True)
class S3Settings:
    """How a store in S3 is reached, and what this machine keeps of it.

    Read from `ARRIERO_STORE_ENDPOINT_URL` (else `AWS_ENDPOINT_URL_S3`,
    `AWS_ENDPOINT_URL`), `ARRIERO_STORE_CACHE` and `ARRIERO_STORE_CACHE_BYTES`.
    Credentials and region are the AWS SDK's own business: its environment
    variables, files and roles.
    """

    endpoint_url: str | None = None
    """`http://host:port` of a server that speaks S3; None for Amazon's."""
    cache: Path = Path("cache")
    """Directory of fetched artifacts and of what jobs write; default `$ARRIERO_HOME/cache`."""
    cache_bytes: int | None = None
    """Bytes of fetched artifacts that are kept; the longest unused go first. None: no limit."""

    @classmethod
    def from_env(cls, env: Environment | None = None) -> S3Settings:
        """Read the settings.

        Raises:
            InvalidArgument: a variable does not hold what it should.
        """
        env = os.environ if env is None else env
        read = _Reader(env)
        names = ("ARRIERO_STORE_ENDPOINT_URL", "AWS_ENDPOINT_URL_S3", "AWS_ENDPOINT_URL")
        name = next((name for name in names if read.text(name)), "")
        endpoint = read.text(name)
        if endpoint is not None:
            _split_url(endpoint, name)
        size = read.text("ARRIERO_STORE_CACHE_BYTES")
        if size is not None and not size.isdecimal():
            raise InvalidArgument.field(
                "ARRIERO_STORE_CACHE_BYTES", f"{size!r}: expected a count of bytes"
            )
        return cls(
            endpoint_url=endpoint,
            cache=read.path("ARRIERO_STORE_CACHE") or home(env) / "cache",
            cache_bytes=None if size is None else int(size),
        )


@dataclass(frozen=True, slots=True)
class SourceSettings:
    """What a service may read for its callers.

    Read from `ARRIERO_ALLOWED_PATHS` and `ARRIERO_ALLOWED_HOSTS`.
    """

    allowed_paths: tuple[Path, ...] = ()
    """Directories (or files), separated by `:`; nothing is readable when empty."""
    allowed_hosts: tuple[str, ...] = ()
    """Hosts that may be called, separated by `,`, such as `*.example.org`; all when empty."""

    @classmethod
    def from_env(cls, env: Environment | None = None) -> SourceSettings:
        """Read the settings.

        Raises:
            InvalidArgument: a path is not absolute.
        """
        env = os.environ if env is None else env
        text = env.get("ARRIERO_ALLOWED_PATHS", "")
        paths = tuple(Path(part) for part in text.split(os.pathsep) if part)
        for path in paths:
            if not path.is_absolute():
                raise InvalidArgument.field(
                    "ARRIERO_ALLOWED_PATHS", f"{str(path)!r} is not an absolute path"
                )
        hosts = env.get("ARRIERO_ALLOWED_HOSTS", "").lower().split(",")
        return cls(paths, tuple(host.strip() for host in hosts if host.strip()))

    def check_url(self, text: str, *, field: str, resolve: bool = False) -> str:
        """The URL that a caller asks for, if its host may be called.

        Link-local addresses are never called: clouds hand out credentials there.

        Args:
            text: `http://` or `https://`.
            field: what errors name.
            resolve: look the name up too, and refuse it for any address behind it.

        Raises:
            InvalidArgument: no such URL, credentials in it, or a host that is not allowed.
            Unavailable: the name cannot be looked up now.
        """
        url = _split_url(text, field)
        host = (url.hostname or "").lower().rstrip(".")
        if self.allowed_hosts and not any(fnmatch(host, item) for item in self.allowed_hosts):
            raise InvalidArgument.field(
                field,
                f"{host!r} is not one of the hosts that this service may call "
                f"({', '.join(self.allowed_hosts)}); add it to ARRIERO_ALLOWED_HOSTS",
            )
        found = [host]
        if resolve:
            try:
                found += [str(item[4][0]) for item in socket.getaddrinfo(host, url.port or 443)]
            except OSError as error:
                raise Unavailable(f"{field}: {host!r} cannot be looked up: {error}") from error
        for address in found:
            if _is_link_local(address):
                raise InvalidArgument.field(
                    field, f"{host!r} is link-local ({address}), which no service calls"
                )
        return text

    def check(self, text: str, *, field: str) -> Path:
        """The path that a caller asks for, links resolved, if it may be read.

        Raises:
            InvalidArgument: not absolute, climbs with `..`, or (also through a
                link) outside of the allowed paths.
            NotFound: nothing is there.
        """
        path = Path(text)
        if "\0" in text or not path.is_absolute():
            raise InvalidArgument.field(field, f"{text!r} is not an absolute path")
        if ".." in path.parts:
            raise InvalidArgument.field(field, f"{text!r} climbs with '..'; write the path out")
        try:
            real = path.resolve(strict=False)
        except (OSError, RuntimeError) as error:  # RuntimeError: a loop of links
            raise InvalidArgument.field(field, f"{text!r} cannot be resolved: {error}") from error
        if not any(real.is_relative_to(allowed.resolve()) for allowed in self.allowed_paths):
            allowed = ", ".join(str(p) for p in self.allowed_paths) or "none"
            raise InvalidArgument.field(
                field,
                f"{text!r} is outside of the paths that this service may read ({allowed}); "
                "move the data there or add to ARRIERO_ALLOWED_PATHS",
            )
        if not real.exists():
            raise NotFound(f"{text!r} does not exist").at(field)
        return real


def _split_url(text: str, field: str) -> SplitResult:
    try:
        url = urlsplit(text)
        valid = url.scheme in ("http", "https") and bool(url.hostname) and url.port != 0
    except ValueError:
        valid = False
    if not valid or any(character.isspace() for character in text):
        raise InvalidArgument.field(field, f"{text!r} is not a URL; expected http://host:port/path")
    if url.username is not None or url.password is not None:
        raise InvalidArgument.field(field, "holds credentials; name a secret instead")
    return url


def _is_link_local(text: str) -> bool:
    try:
        address = ipaddress.ip_address(text.partition("%")[0])
    except ValueError:
        return False
    if isinstance(address, ipaddress.IPv6Address) and address.ipv4_mapped is not None:
        address = address.ipv4_mapped
    return address.is_link_local


@dataclass(frozen=True, slots=True)
class ClusterSettings:
    """Where a service is in its cluster, and what it makes there is made of.

    Read from `ARRIERO_NAMESPACE`, `ARRIERO_RELEASE`, `ARRIERO_IMAGE`,
    `ARRIERO_OWNER`, `ARRIERO_ADVERTISE` and the directory's own variable.
    """

    directory: Path
    """Holds the administrator's templates."""
    namespace: str = "default"
    """Where everything is made."""
    release: str = "arriero"
    """Name of the release, a part of every name."""
    image: str = ""
    """Image of the service itself, for templates that name none."""
    owner: str = ""
    """ConfigMap that takes along, when it goes, whatever was made."""
    advertise: str = ""
    """`host:port`, or a host, where jobs find the service."""

    @classmethod
    def from_env(cls, variable: str, env: Environment | None = None) -> ClusterSettings:
        """Read the settings; `variable` names the directory.

        Raises:
            InvalidArgument: the directory's variable is not set.
        """
        read = _Reader(os.environ if env is None else env)
        directory = read.path(variable)
        if directory is None:
            raise InvalidArgument.field(
                variable, "is not set; expected the directory of the cluster's templates"
            )
        return cls(
            directory=directory,
            namespace=read.text("ARRIERO_NAMESPACE") or "default",
            release=read.text("ARRIERO_RELEASE") or "arriero",
            image=read.text("ARRIERO_IMAGE") or "",
            owner=read.text("ARRIERO_OWNER") or "",
            advertise=read.text("ARRIERO_ADVERTISE") or "",
        )


class _Reader:
    """Reads typed values; an empty variable counts as unset."""

    def __init__(self, env: Environment) -> None:
        self._env = env

    def text(self, name: str) -> str | None:
        return self._env.get(name) or None

    def path(self, name: str) -> Path | None:
        text = self.text(name)
        return Path(text).expanduser().absolute() if text else None

    def boolean(self, name: str, default: bool) -> bool:
        text = self.text(name)
        if text is None:
            return default
        known = {"1": True, "true": True, "yes": True, "0": False, "false": False, "no": False}
        if text.lower() not in known:
            raise InvalidArgument.field(name, f"{text!r} is not one of {', '.join(known)}")
        return known[text.lower()]

    def seconds(self, name: str, default: float) -> float:
        text = self.text(name)
        if text is None:
            return default
        try:
            value = float(text)
        except ValueError:
            value = -1.0
        if not 0 <= value < float("inf"):
            raise InvalidArgument.field(name, f"{text!r} is not a number of seconds from 0 up")
        return value


def _first_word(path: Path) -> str:
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise InvalidArgument.field("ARRIERO_TOKEN_FILE", f"cannot be read: {error}") from error
    words = [word for line in lines if not line.lstrip().startswith("#") for word in line.split()]
    if not words:
        raise InvalidArgument.field("ARRIERO_TOKEN_FILE", f"{path} holds no token")
    return words[0]
