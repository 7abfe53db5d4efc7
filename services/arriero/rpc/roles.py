"""What a role may do: viewer, runner, deployer, admin, each all that those before it may.

Responsibility: the role that each RPC needs. Does not know who has which
(`auth`), nor what the RPCs do beyond their protos.

    viewer     reads, and asks models that are served
    runner     starts, cancels and retries work; pushes and tags artifacts
    deployer   changes endpoints, also by a `deploy` stage; waives gates
    admin      collects garbage, and whatever else there is
"""

from __future__ import annotations

from enum import IntEnum

from arriero.errors import InvalidArgument, PermissionDenied
from arriero.rpc import methods

__all__ = ["Role", "check", "needed", "parse"]


class Role(IntEnum):
    """A higher one may what a lower one may."""

    VIEWER = 1
    RUNNER = 2
    DEPLOYER = 3
    ADMIN = 4

    @property
    def word(self) -> str:
        """As token files and messages have it."""
        return self.name.lower()


# Of methods that change something, by service; by method where it differs.
_SERVICES = {
    "arriero.v1.RunService": Role.RUNNER,
    "arriero.v1.ArtifactService": Role.RUNNER,
    "arriero.v1.EndpointService": Role.DEPLOYER,
    "arriero.v1.DatasetService": Role.RUNNER,
    "arriero.v1.TrainingService": Role.RUNNER,
    "arriero.v1.MergingService": Role.RUNNER,
    "arriero.v1.QuantizationService": Role.RUNNER,
    "arriero.v1.JobService": Role.RUNNER,
    "arriero.v1.InferenceService": Role.DEPLOYER,
    "google.longrunning.Operations": Role.RUNNER,
    # Reflection reads, whatever its proto says of itself.
    "grpc.reflection.v1alpha.ServerReflection": Role.VIEWER,
    "grpc.reflection.v1.ServerReflection": Role.VIEWER,
}
_METHODS = {
    "/arriero.v1.ArtifactService/CollectGarbage": Role.ADMIN,
    "/google.longrunning.Operations/DeleteOperation": Role.ADMIN,
    "/arriero.v1.InferenceService/Generate": Role.VIEWER,
    "/arriero.v1.InferenceService/Chat": Role.VIEWER,
}


def parse(word: str) -> Role:
    """The role of a name.

    Raises:
        InvalidArgument: there is none.
    """
    try:
        return Role[word.upper()]
    except KeyError:
        names = ", ".join(role.word for role in Role)
        raise InvalidArgument.field("role", f"{word!r} is not one of {names}") from None


def needed(method: str) -> Role:
    """The least role that may call a method (`/package.Service/Method`)."""
    if method in _METHODS:
        return _METHODS[method]
    if methods.read_only(method):
        return Role.VIEWER
    return _SERVICES.get(method.split("/")[1], Role.ADMIN)


def check(role: Role, least: Role, subject: str, what: str) -> None:
    """Let a caller pass, or not.

    Raises:
        PermissionDenied: the role is too low; both are named.
    """
    if role < least:
        raise PermissionDenied(
            f"{what} needs the role {least.word}, {subject} is a {role.word}; ask an "
            "administrator for a token of that role",
            reason="ROLE_TOO_LOW",
            metadata={"role": role.word, "needed": least.word},
        )
