"""Results: the same work asked twice is done once.

Responsibility: `results/<service>/<key>.json`, from the key of some work to the
artifacts that it made. Does not know how a key is computed.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace

from arriero.errors import DataLoss, NotFound
from arriero.gates import GateResult
from arriero.store.artifacts import Artifacts
from arriero.store.files import now, parse_json, safe_name, to_json
from arriero.store.manifest import FORMAT, check_digest, gates_from_json, gates_to_json
from arriero.store.objects import Objects
from arriero.store.waivers import Waiver, applied

log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Result:
    """What some work made: digests by output name, in order; gates; time (RFC 3339)."""

    outputs: Mapping[str, str]
    gates: tuple[GateResult, ...] = field(default=())
    time: str = ""


class Results:
    """The results of one store."""

    def __init__(self, objects: Objects, artifacts: Artifacts) -> None:
        self._objects = objects
        self._artifacts = artifacts

    def put(
        self, service: str, key: str, outputs: Mapping[str, str], gates: Sequence[GateResult]
    ) -> None:
        """Record what the work with this key made; replaces.

        Raises:
            InvalidArgument: a key or digests that are none.
        """
        for digest in outputs.values():
            check_digest(digest, field="outputs")
        record = {
            "format": FORMAT,
            "outputs": [[name, digest] for name, digest in outputs.items()],
            "gates": gates_to_json(gates),
            "time": now(),
        }
        self._objects.write(_key(service, key), to_json(record))

    def get(self, service: str, key: str) -> Result | None:
        """What the work with this key made, if all of it is there and not quarantined.

        A hit makes its artifacts young again for gc. Gates that were waived since
        are WAIVED.
        """
        place = _key(service, key)
        try:
            what = f"the result {self._objects.shown(place)}"
            value = parse_json(self._objects.read(place), FORMAT, what)
            result = Result(
                dict(value["outputs"]),
                gates_from_json(value["gates"]),
                value["time"],
            )
            waivers: list[Waiver] = []
            for digest in result.outputs.values():
                self._artifacts.touch(digest)
                artifact = self._artifacts.get(digest)
                if artifact.quarantined:
                    return None
                waivers += artifact.waivers
        except (FileNotFoundError, NotFound):
            return None
        except (DataLoss, KeyError, TypeError, ValueError) as error:
            # Nothing is lost but time: the work is done again and the record replaced.
            log.warning("result %s of %s is not usable: %s", key, service, error)
            return None
        return replace(result, gates=applied(result.gates, waivers))


def _key(service: str, key: str) -> str:
    return f"results/{safe_name(service, field='service')}/{safe_name(key, field='key')}.json"
