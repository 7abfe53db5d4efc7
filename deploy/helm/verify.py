"""Every check of the chart; exit 1 when one fails.

python deploy/helm/verify.py              what `make chart` runs
python deploy/helm/verify.py --snapshot   accept the default rendering as it is now
"""

from __future__ import annotations

import copy
import difflib
import json
import re
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from functools import cache
from pathlib import Path
from typing import Any

import generate
import kubernetes_validate
import lookups
import stamps
import yaml
from prometheus_client import CollectorRegistry

from arriero.metrics import EngineLoad, GatewayMetrics, Limits, Metrics, ReplicaMetrics

HERE = Path(__file__).resolve().parent
ROOT = HERE.parents[1]
CHART = HERE / "arriero"
SNAPSHOT = HERE / "snapshot.yaml"
SETS = {"default": None, **{path.stem: path for path in sorted(HERE.glob("values/*.yaml"))}}
# The newest that the chart was written for, and the oldest that it takes.
VERSIONS = ("1.36", "1.30")
# Kinds of operators, which the schemas of Kubernetes do not hold.
FOREIGN = {"Certificate", "PodMonitor", "PrometheusRule", "ServiceMonitor"}
# Metrics of others that alerts use.
FOREIGN_METRICS = {
    "up",
    "kube_cronjob_status_last_successful_time",
    "kube_pod_container_status_restarts_total",
    "kubelet_volume_stats_capacity_bytes",
    "kubelet_volume_stats_used_bytes",
}


class Failed(Exception):
    """A check does not hold; says what was found."""


@cache
def helm() -> str:
    """Path of a helm."""
    command = [sys.executable, str(ROOT / "docker" / "fetch_helm.py")]
    return subprocess.run(command, check=True, capture_output=True, text=True).stdout.strip()


def template(*arguments: str) -> str:
    """What `helm template` renders, in the namespace `models`.

    Raises:
        Failed: it refuses.
    """
    command = [helm(), "template", "arriero", str(CHART), "--namespace", "models", *arguments]
    ended = subprocess.run(command, capture_output=True, text=True)
    if ended.returncode != 0:
        raise Failed(ended.stderr.strip())
    return ended.stdout


@cache
def rendered(name: str) -> str:
    """The rendering of a value set, with everything that the cluster offers."""
    path = SETS[name]
    return template(*(["--values", str(path)] if path else []))


def objects(text: str) -> list[dict[str, Any]]:
    """The objects of a rendering."""
    return [found for found in yaml.safe_load_all(text) if found]


def check_lint() -> None:
    """`helm lint --strict`, with each value set."""
    for path in SETS.values():
        command = [helm(), "lint", "--strict", str(CHART), *(["-f", str(path)] if path else [])]
        ended = subprocess.run(command, capture_output=True, text=True)
        if ended.returncode != 0:
            raise Failed(ended.stdout + ended.stderr)


def check_generated() -> None:
    """Schema and README are what values.yaml makes them."""
    if names := generate.stale():
        raise Failed(f"{', '.join(names)}: run python deploy/helm/generate.py")


def check_kubernetes() -> None:
    """Every object, and every template inside of a ConfigMap, is one that Kubernetes knows."""
    for name in SETS:
        for found in _all_objects(name):
            if found["kind"] in FOREIGN:
                continue
            for version in VERSIONS:
                try:
                    kubernetes_validate.validate(found, version, strict=True)
                except Exception as error:
                    what = f"{found['kind']}/{found['metadata'].get('name', '')}"
                    raise Failed(f"{name}: {what} against {version}: {error}") from error


def _all_objects(name: str) -> Iterator[dict[str, Any]]:
    for found in objects(rendered(name)):
        yield found
        if found["kind"] == "ConfigMap":
            for key in ("job.yaml", "endpoint.yaml"):
                if text := found["data"].get(key):
                    yield _completed(yaml.safe_load(text))


def _completed(found: dict[str, Any]) -> dict[str, Any]:
    """A template with what is filled in at run time."""
    found = copy.deepcopy(found)
    found["metadata"]["name"] = "made"
    if found["kind"] == "Deployment":
        found["spec"]["selector"] = {"matchLabels": found["spec"]["template"]["metadata"]["labels"]}
    return found


def check_restricted() -> None:
    """Every pod passes what the `restricted` Pod Security Standard asks for."""
    for name in SETS:
        for found in _all_objects(name):
            pod = _pod(found)
            if pod is None:
                continue
            what = f"{name}: {found['kind']}/{found['metadata'].get('name')}"
            context = pod["securityContext"]
            volumes = {next(iter(set(v) - {"name"})) for v in pod.get("volumes", [])}
            allowed = {"configMap", "emptyDir", "persistentVolumeClaim", "secret"}
            if not context["runAsNonRoot"] or context["seccompProfile"]["type"] != "RuntimeDefault":
                raise Failed(f"{what}: pod security context {context}")
            if volumes - allowed or any(pod.get(key) for key in ("hostNetwork", "hostPID")):
                raise Failed(f"{what}: volumes {volumes - allowed} or host namespaces")
            for container in [*pod["containers"], *pod.get("initContainers", [])]:
                own = container["securityContext"]
                if own["allowPrivilegeEscalation"] or own["capabilities"]["drop"] != ["ALL"]:
                    raise Failed(f"{what}: container security context {own}")
                if not own["readOnlyRootFilesystem"]:
                    raise Failed(f"{what}: the root filesystem can be written")
                mounts = {mount["name"] for mount in container.get("volumeMounts", [])}
                if missing := mounts - {volume["name"] for volume in pod.get("volumes", [])}:
                    raise Failed(f"{what}: mounts without a volume: {missing}")


def _pod(found: dict[str, Any]) -> dict[str, Any] | None:
    spec: dict[str, Any] = found.get("spec", {})
    if found["kind"] == "Pod":
        return spec
    if found["kind"] == "CronJob":
        spec = spec["jobTemplate"]["spec"]
    if found["kind"] in ("Deployment", "Job", "CronJob"):
        pod: dict[str, Any] = spec["template"]["spec"]
        return pod
    return None


def check_names() -> None:
    """Selectors, accounts, claims, ConfigMaps and ports that are named are there."""
    for name in SETS:
        found = objects(rendered(name))
        there = {(o["kind"], o["metadata"]["name"]) for o in found}
        pods = [(o, _pod(o)) for o in _all_objects(name)]
        labels = [
            o["spec"]["template"]["metadata"]["labels"]
            for o, p in pods
            if p and "template" in o["spec"]
        ]
        for item, pod in pods:
            if pod is None:
                continue
            if ("ServiceAccount", pod["serviceAccountName"]) not in there:
                raise Failed(f"{name}: no ServiceAccount {pod['serviceAccountName']}")
            for volume in pod.get("volumes", []):
                if (
                    "configMap" in volume
                    and ("ConfigMap", volume["configMap"]["name"]) not in there
                ):
                    raise Failed(f"{name}: no ConfigMap {volume['configMap']['name']}")
            grace = pod.get("terminationGracePeriodSeconds", 30)
            environment = {
                e["name"]: e.get("value") for c in pod["containers"] for e in c.get("env", [])
            }
            if grace <= float(environment.get("ARRIERO_DRAIN_SECONDS") or 0):
                raise Failed(f"{name}: {item['metadata']} is killed while it drains")
        for item in found:
            if item["kind"] == "Service":
                selector = item["spec"]["selector"].items()
                matching = [o for o in labels if selector <= o.items()]
                if len(matching) != 1:
                    raise Failed(
                        f"{name}: Service {item['metadata']['name']} selects "
                        f"{len(matching)} kinds of pods, expected one"
                    )


def check_contract() -> None:
    """The code takes the templates, and Kubernetes what the code makes of them."""
    for name in SETS:
        maps = [o for o in objects(rendered(name)) if o["kind"] == "ConfigMap"]
        for found in maps:
            with tempfile.TemporaryDirectory() as directory:
                for key, text in found["data"].items():
                    Path(directory, key).write_text(text, encoding="utf-8")
                for made in stamps.stamped(Path(directory)):
                    made.setdefault("metadata", {}).setdefault("namespace", "models")
                    if made["apiVersion"].startswith("keda"):
                        continue
                    try:
                        kubernetes_validate.validate(made, VERSIONS[0], strict=True)
                    except Exception as error:
                        what = f"{name}: {found['metadata']['name']}, {made['kind']}"
                        raise Failed(f"{what}: {error}") from error


def check_snapshot() -> None:
    """The default rendering is the one that was last looked at."""
    now, then = _of_any_helm(rendered("default")), SNAPSHOT.read_text(encoding="utf-8")
    if now != then:
        lines = difflib.unified_diff(
            then.splitlines(), now.splitlines(), "then", "now", lineterm="", n=1
        )
        text = "\n".join(list(lines)[:60])
        raise Failed(f"{text}\nas meant? python deploy/helm/verify.py --snapshot")


def _of_any_helm(text: str) -> str:
    """Without what Helm 3 and 4 make differently."""
    text = text.replace("before-hook-creation,hook-succeeded", "before-hook-creation")
    return "".join(f"{line}\n" for line in text.splitlines() if line.strip())


def check_used() -> None:
    """Every value changes something that is rendered."""
    leaves = list(generate.read(CHART / "values.yaml").leaves())
    with ThreadPoolExecutor(4) as pool:
        unused = [
            leaf for leaf, used in zip(leaves, pool.map(_used, leaves), strict=True) if not used
        ]
    if unused:
        raise Failed("no template uses " + ", ".join(".".join(leaf.path) for leaf in unused))


# Values that show only where others are so.
_TOGETHER = {
    "store.s3": "gpu",
    "database.postgresql": "gpu",
    "endpoints.modelVolumeMargin": "gpu",
    "endpoints.fetchResources": "gpu",
    "endpoints.autoscaling.prometheusAddress": "gpu",
    "networkPolicy.internet": "default",
    "endpoints.runtimeClassName": "gpu",
    "nameOverride": "default",
    "fullnameOverride": "default",
    "tests": "default",
}
# Values that only a cluster, or a refusal, shows.
_ELSEWHERE = {"checkExisting", "store.claim.singleNode"}


def _used(leaf: generate.Value) -> bool:
    path = ".".join(leaf.path)
    if path in _ELSEWHERE:
        return path.rpartition(".")[2] in (CHART / "templates" / "checks.yaml").read_text()
    base = next(
        (b for p, b in _TOGETHER.items() if path == p or path.startswith(p + ".")), "everything"
    )
    values = yaml.safe_load(SETS[base].read_text()) if SETS[base] else {}
    there: Any = values
    for key in leaf.path[:-1]:
        there = there.setdefault(key, {}) if isinstance(there, dict) else {}
    there[leaf.path[-1]] = _other(leaf, there.get(leaf.path[-1], leaf.default))
    with tempfile.NamedTemporaryFile("w", suffix=".yaml") as file:
        json.dump(values, file)
        file.flush()
        try:
            return template("--values", file.name, "--skip-schema-validation") != rendered(base)
        except Failed:
            return True  # refused: looked at


def _other(leaf: generate.Value, now: Any) -> Any:
    """Another value of the same shape."""
    if isinstance(now, bool):
        return not now
    if isinstance(now, int):
        return now + 7
    if isinstance(now, str):
        choices = [choice for choice in leaf.hint.get("enum", []) if choice != now]
        if choices:
            return choices[-1]
        return (
            "7Gi"
            if leaf.path[-1].lower().endswith(("size", "margin"))
            else f"{now}7"
            if now
            else "s3://other7"
        )
    if isinstance(now, list):
        named = leaf.path[-1] in (
            "imagePullSecrets",
            "allowedPaths",
            "allowedHosts",
            "dnsNames",
            "cidrs",
        )
        number = leaf.path[-1] == "ports"
        return [*now, 7 if number else "other7" if named else {"name": "other7"}]
    if leaf.path[-1].lower().endswith("resources"):
        return {"limits": {"memory": "7Gi"}}
    if leaf.path[-1] == "profiles":
        return {**now, "other": {"queue": "q7"}}
    return {**now, "other7": "7"}


def check_alerts() -> None:
    """Expressions parse, and each alert has a section in the runbook."""
    runbook = (ROOT / "docs" / "runbook.md").read_text(encoding="utf-8")
    rules = _rules()
    for rule in rules:
        if f"## {rule['alert']}\n" not in runbook:
            raise Failed(f"docs/runbook.md has no section {rule['alert']}")
    if promtool := shutil.which("promtool"):
        with tempfile.NamedTemporaryFile("w", suffix=".yaml") as file:
            yaml.safe_dump({"groups": [{"name": "all", "rules": rules}]}, file)
            file.flush()
            ended = subprocess.run(
                [promtool, "check", "rules", file.name], capture_output=True, text=True
            )
            if ended.returncode != 0:
                raise Failed(ended.stdout + ended.stderr)


def _rules() -> list[dict[str, Any]]:
    text = template("-f", str(SETS["everything"]), "--set", "backup.enabled=true")
    (found,) = (o for o in objects(text) if o["kind"] == "PrometheusRule")
    rules: list[dict[str, Any]] = found["spec"]["groups"][0]["rules"]
    asked = yaml.safe_load((CHART / "files" / "alerts.yaml").read_text())
    if len(rules) != len(asked):
        raise Failed(f"{len(asked)} alerts are written, {len(rules)} rendered")
    return rules


def check_metrics() -> None:
    """Every metric of an alert or a dashboard is one that Arriero exports."""
    known = exported() | FOREIGN_METRICS
    for where, expression in expressions():
        if not _balanced(expression):
            raise Failed(f"{where}: brackets do not match: {expression}")
        plain = re.sub(
            r"\{[^}]*\}|\"[^\"]*\"|\b(by|on|without|ignoring)\s*\([^)]*\)", " ", expression
        )
        names = set(re.findall(r"\b[a-z][a-z0-9]*_[a-z0-9_]+\b|\bup\b", plain))
        functions = {"avg_over_time", "histogram_quantile", "label_values"}
        for name in names - functions:
            base = re.sub(r"_(bucket|count|sum)$", "", name)
            if name not in known and base not in known:
                raise Failed(f"{where}: nobody exports {name}")


def expressions() -> Iterator[tuple[str, str]]:
    """Of all alerts and dashboards: where, and the expression."""
    for rule in _rules():
        yield rule["alert"], rule["expr"]
    for path in sorted((CHART / "files" / "dashboards").glob("*.json")):
        board = json.loads(path.read_text(encoding="utf-8"))
        for panel in board["panels"]:
            for target in panel.get("targets", []):
                yield f"{path.name}: {panel['title']}", target["expr"]
        for variable in board["templating"]["list"]:
            if variable["type"] == "query":
                yield (
                    f"{path.name}: ${variable['name']}",
                    variable["definition"].partition(",")[0] + ")",
                )


def exported() -> set[str]:
    """Names of all series that orchestrator, gateway and replicas show."""
    pages = [CollectorRegistry() for _ in range(3)]
    Metrics(pages[0], gpus=list, limits=lambda: Limits(1, 1.0))
    GatewayMetrics(pages[1])
    ReplicaMetrics(pages[2], "model", EngineLoad)
    families = [family for page in pages for family in page.collect()]
    return {f"{f.name}_total" if f.type == "counter" else f.name for f in families}


def _balanced(text: str) -> bool:
    return all(text.count(a) == text.count(b) for a, b in ("()", "{}", "[]"))


def check_refusals() -> None:
    """Wrong values are refused in words that say what to do."""
    command = [helm(), "version", "--template", "{{.Version}}"]
    # Its words for what the schema says are others.
    old = subprocess.run(command, capture_output=True, text=True).stdout.startswith("v3.")
    for arguments, said in REFUSED:
        try:
            template(*(word for item in arguments for word in ("--set", item)))
        except Failed as error:
            by_schema = "specifications of the schema" in str(error) and old
            if said not in str(error) and not by_schema:
                raise Failed(f"{arguments}: said {error}, expected {said!r}") from None
        else:
            raise Failed(f"{arguments}: accepted")
    if wrong := list(lookups.wrong(helm(), CHART)):
        raise Failed("\n".join(wrong))
    try:
        template("--kube-version", "1.28.0")
    except Failed as error:
        if "requires kubeVersion" not in str(error):
            raise
    else:
        raise Failed("Kubernetes 1.28 is accepted")


REFUSED: list[tuple[list[str], str]] = [
    (["store.kind=nfs"], "must be one of 'claim', 's3'"),
    (["trainin.jobs=true"], "additional properties 'trainin' not allowed"),
    (["gateway.replicas=two"], "got string, want integer"),
    (["gateway.replicas=0"], "minimum"),
    (["store.claim.size=10GB"], "does not match pattern"),
    (["training.profiles.big.gpu=1"], "additional properties 'gpu' not allowed"),
    (["store.claim.accessMode=ReadWriteOnce"], "store.claim.singleNode=true"),
    (["store.kind=s3"], "store.s3.url is not set"),
    (["database.kind=postgresql"], "kubectl create secret generic"),
    (["tls.enabled=true"], "neither tls.existingSecret"),
    (["tls.clientCertificates=true"], "needs tls.enabled"),
    (["endpoints.autoscaling.mode=keda"], "prometheusAddress is not set"),
    (["endpoints.autoscaling.max=0"], "minimum"),
    (
        ["backup.enabled=true", "store.kind=s3", "store.s3.url=s3://models"],
        "needs backup.existingClaim",
    ),
]
CHECKS: list[Callable[[], None]] = [
    check_lint,
    check_generated,
    check_kubernetes,
    check_restricted,
    check_names,
    check_refusals,
    check_alerts,
    check_metrics,
    check_contract,
    check_snapshot,
    check_used,
]


def main() -> int:
    """Run them all, and say which do not hold."""
    if sys.argv[1:] == ["--snapshot"]:
        SNAPSHOT.write_text(_of_any_helm(rendered("default")), encoding="utf-8")
        return 0
    failed = 0
    for check in CHECKS:
        name = check.__name__.removeprefix("check_")
        try:
            check()
        except Failed as error:
            failed += 1
            print(f"chart, {name}: {(check.__doc__ or '').strip()} No:\n{error}\n")
    if not failed:
        print(f"Chart: {len(CHECKS)} checks hold for {len(SETS)} sets of values.")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
