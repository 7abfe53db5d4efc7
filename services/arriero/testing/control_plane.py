"""A Kubernetes control plane of a test's own: etcd and Kubernetes' own programs.

Responsibility: start, kill and restart `etcd`, `kube-apiserver`,
`kube-controller-manager` and `kube-scheduler` on loopback, with TLS and RBAC; ask
the API as an administrator. There is no kubelet: `node` stands in for one. Does
not know what is kept in it.
"""

from __future__ import annotations

import json
import os
import re
import secrets
import shutil
import ssl
import subprocess
import time
from pathlib import Path
from types import TracebackType
from typing import Any

import urllib3
import yaml

from arriero.rpc.ports import free_port

__all__ = ["MISSING", "VARIABLE", "ApiFailure", "ControlPlane", "binaries"]

Object = dict[str, Any]

VARIABLE = "ARRIERO_KUBE_BIN"
PROGRAMS = ("etcd", "kube-apiserver", "kube-controller-manager", "kube-scheduler")
MISSING = f"set {VARIABLE} to a directory with {', '.join(PROGRAMS)}"
_SECONDS = 90.0


def binaries() -> Path | None:
    """The directory that the environment names; None where it names none.

    Raises:
        FileNotFoundError: a program is missing there.
    """
    named = os.environ.get(VARIABLE)
    if not named:
        return None
    for program in PROGRAMS:
        if not (Path(named) / program).is_file():
            raise FileNotFoundError(f"{VARIABLE}={named} has no {program}")
    return Path(named)


class ApiFailure(Exception):
    """What the API server answered instead: its `Status`, and the HTTP code."""

    def __init__(self, code: int, status: Object) -> None:
        super().__init__(f"{code}: {status.get('message')}")
        self.code, self.status = code, status


class ControlPlane:
    """A running control plane; a context manager.

    Args:
        programs: the directory of its programs.
        root: for its data, certificates and logs.

    Attributes:
        url: of the API server; the same after a restart.
        version: of it: (major, minor).
        ca: the file with the certificate authority of everything here.
    """

    def __init__(self, programs: Path, root: Path) -> None:
        self._bin, self._root = programs, root
        root.mkdir(parents=True, exist_ok=True)
        self._token = secrets.token_hex(16)
        self._processes: dict[str, subprocess.Popen[bytes]] = {}
        self._port, self._etcd, self._peer = free_port(), free_port(), free_port()
        self._controllers, self._scheduler = free_port(), free_port()
        self.url = f"https://127.0.0.1:{self._port}"
        self.version = (0, 0)
        self.ca = root / "ca.crt"
        self._certify()
        context = ssl.create_default_context(cafile=str(self.ca))
        self._http = urllib3.PoolManager(ssl_context=context, maxsize=8)

    def __enter__(self) -> ControlPlane:
        try:
            self._start_etcd()
            self.start()
            config = self.kubeconfig(self._root / "admin.yaml")
            self._start_controllers(config)
        except BaseException:
            self._end()
            raise
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._end()

    # The API, as an administrator

    def ask(self, method: str, path: str, body: Object | None = None, *, token: str = "") -> Object:
        """One request; bodies of PATCH are merge patches.

        Raises:
            ApiFailure: the answer is none of 2xx.
        """
        return dict(json.loads(self._answer(method, path, body, token)))

    def _answer(self, method: str, path: str, body: Object | None = None, token: str = "") -> bytes:
        kind = "application/merge-patch+json" if method == "PATCH" else "application/json"
        response = self._http.request(
            method,
            self.url + path,
            body=None if body is None else json.dumps(body),
            headers={"Authorization": f"Bearer {token or self._token}", "Content-Type": kind},
            timeout=20,
            retries=False,
        )
        if response.status >= 300:
            try:
                status = json.loads(response.data)
            except ValueError:
                status = {"message": response.data.decode(errors="replace")}
            raise ApiFailure(response.status, status)
        return bytes(response.data)

    def kubeconfig(self, path: Path, *, namespace: str = "default", token: str = "") -> Path:
        """Write what `KUBECONFIG` is to name: an administrator's, or a token's."""
        body = {
            "apiVersion": "v1",
            "kind": "Config",
            "current-context": "own",
            "clusters": [
                {
                    "name": "own",
                    "cluster": {"server": self.url, "certificate-authority": str(self.ca)},
                }
            ],
            "users": [{"name": "own", "user": {"token": token or self._token}}],
            "contexts": [
                {
                    "name": "own",
                    "context": {"cluster": "own", "user": "own", "namespace": namespace},
                }
            ],
        }
        path.write_text(yaml.safe_dump(body))
        return path

    def token(self, namespace: str, account: str) -> str:
        """A token of a ServiceAccount, as the kubelet gets them for pods."""
        path = f"/api/v1/namespaces/{namespace}/serviceaccounts/{account}/token"
        asked = {"apiVersion": "authentication.k8s.io/v1", "kind": "TokenRequest", "spec": {}}
        return str(self.ask("POST", path, asked)["status"]["token"])

    def certificate(
        self, name: str, subject: str, names: str = "IP:127.0.0.1"
    ) -> tuple[Path, Path]:
        """A certificate of this cluster's authority and its key; made once per name."""
        made, key = self._root / f"{name}.crt", self._root / f"{name}.key"
        if not made.exists():
            request, extra = self._root / f"{name}.csr", self._root / f"{name}.ext"
            extra.write_text(f"subjectAltName={names}\n")
            self._openssl(
                "req",
                "-new",
                "-newkey",
                "rsa:2048",
                "-nodes",
                "-subj",
                subject,
                "-keyout",
                str(key),
                "-out",
                str(request),
            )
            self._openssl(
                "x509",
                "-req",
                "-in",
                str(request),
                "-CA",
                str(self.ca),
                "-CAkey",
                str(self._root / "ca.key"),
                "-CAcreateserial",
                "-days",
                "2",
                "-extfile",
                str(extra),
                "-out",
                str(made),
            )
        return made, key

    # Faults

    def start(self) -> None:
        """Start the API server, and wait until it is ready."""
        made, key = self.certificate("apiserver", "/CN=kube-apiserver", _SERVER_NAMES)
        admins = self._root / "tokens.csv"
        admins.write_text(f"{self._token},admin,admin,system:masters\n")
        account = str(self._root / "accounts.key")
        self._run(
            "kube-apiserver",
            f"--etcd-servers=http://127.0.0.1:{self._etcd}",
            "--bind-address=127.0.0.1",
            "--advertise-address=127.0.0.1",
            "--endpoint-reconciler-type=none",
            f"--secure-port={self._port}",
            f"--cert-dir={self._root}",
            f"--tls-cert-file={made}",
            f"--tls-private-key-file={key}",
            f"--client-ca-file={self.ca}",
            f"--token-auth-file={admins}",
            "--authorization-mode=RBAC",
            "--service-account-issuer=https://kubernetes.default.svc",
            f"--service-account-signing-key-file={account}",
            f"--service-account-key-file={account}",
            "--service-cluster-ip-range=10.0.0.0/16",
            "--kubelet-preferred-address-types=InternalIP",
            "--etcd-compaction-interval=0",
        )
        self._until_ready("kube-apiserver")
        found = re.match(r"v(\d+)\.(\d+)", self.ask("GET", "/version")["gitVersion"])
        assert found is not None
        self.version = (int(found[1]), int(found[2]))

    def check(self) -> None:
        """See that all programs run.

        Raises:
            RuntimeError: one ended by itself; with the end of its log.
        """
        for program, process in self._processes.items():
            if process.poll() is not None:
                raise RuntimeError(
                    f"{program} ended with {process.returncode}; {self._log(program)}"
                )

    def kill(self) -> None:
        """SIGKILL to the API server."""
        process = self._processes.pop("kube-apiserver")
        process.kill()
        process.wait()

    def compact(self) -> None:
        """Forget every version but the newest, as etcd does every five minutes."""
        store = urllib3.PoolManager()
        base = f"http://127.0.0.1:{self._etcd}/v3/kv"
        body = json.dumps({"key": "AA==", "limit": "1"})
        found = json.loads(store.request("POST", f"{base}/range", body=body).data)
        asked = json.dumps({"revision": found["header"]["revision"], "physical": True})
        answer = store.request("POST", f"{base}/compaction", body=asked)
        assert answer.status == 200, answer.data

    # Pieces

    def _certify(self) -> None:
        if shutil.which("openssl") is None:
            raise FileNotFoundError("a control plane needs the openssl command")
        self._openssl(
            "req",
            "-x509",
            "-newkey",
            "rsa:2048",
            "-nodes",
            "-days",
            "2",
            "-subj",
            "/CN=arriero-test",
            "-keyout",
            str(self._root / "ca.key"),
            "-out",
            str(self.ca),
        )
        self._openssl("genrsa", "-out", str(self._root / "accounts.key"), "2048")

    def _start_etcd(self) -> None:
        url, peer = f"http://127.0.0.1:{self._etcd}", f"http://127.0.0.1:{self._peer}"
        self._run(
            *("etcd", "--name=own", f"--data-dir={self._root / 'etcd'}"),
            *(f"--listen-client-urls={url}", f"--advertise-client-urls={url}"),
            *(f"--listen-peer-urls={peer}", f"--initial-advertise-peer-urls={peer}"),
            f"--initial-cluster=own={peer}",
        )

    def _start_controllers(self, config: Path) -> None:
        # Old ones listen without TLS, too, on ports that may be another control plane's.
        closed = ("--port=0",) if self.version < (1, 23) else ()
        self._run(
            *("kube-controller-manager", f"--kubeconfig={config}", "--leader-elect=false"),
            *("--bind-address=127.0.0.1", f"--secure-port={self._controllers}"),
            *(f"--cert-dir={self._root / 'controllers'}", "--use-service-account-credentials"),
            f"--service-account-private-key-file={self._root / 'accounts.key'}",
            f"--root-ca-file={self.ca}",
            *("--kube-api-qps=200", "--kube-api-burst=400", *closed),
        )
        self._run(
            *("kube-scheduler", f"--kubeconfig={config}", "--leader-elect=false"),
            *("--bind-address=127.0.0.1", f"--secure-port={self._scheduler}"),
            *(f"--cert-dir={self._root / 'scheduler'}", *closed),
        )

    def _run(self, program: str, *flags: str) -> None:
        with (self._root / f"{program}.log").open("ab") as log:
            self._processes[program] = subprocess.Popen(
                [str(self._bin / program), *flags],
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
            )

    def _until_ready(self, program: str) -> None:
        deadline = time.monotonic() + _SECONDS
        while True:
            try:
                self._answer("GET", "/readyz")
                return
            except (ApiFailure, urllib3.exceptions.HTTPError) as error:
                said = str(error)
            self.check()
            if time.monotonic() > deadline:
                raise RuntimeError(f"{program} is not ready: {said}; {self._log(program)}")
            time.sleep(0.2)

    def _log(self, program: str) -> str:
        return "its log ends with\n" + (self._root / f"{program}.log").read_text()[-2000:]

    def _end(self) -> None:
        for process in reversed(list(self._processes.values())):
            process.terminate()
            try:
                process.wait(10)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()
        self._http.clear()

    def _openssl(self, *arguments: str) -> None:
        subprocess.run(["openssl", *arguments], check=True, capture_output=True)


_SERVER_NAMES = "IP:127.0.0.1,IP:10.0.0.1,DNS:localhost,DNS:kubernetes.default.svc"
