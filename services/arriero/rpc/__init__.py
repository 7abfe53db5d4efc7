"""gRPC as every Arriero service and client speaks it.

Responsibility: servers, channels, errors on the wire, logs, and ties between
processes. Does not know any service's work, and no store.

    Server                    a service's server: health, reflection, auth, drain
    connect, connect_sync     channels with retries, deadlines and credentials
    to_status, from_status,
    from_rpc_error,
    translated                errors on the wire and back (`rpc.status`)
    caller, bearer_token      who calls (`rpc.auth`)
    logs, parent, trace       JSON logs; life tied to a supervisor; trace ids
"""

import os

# gRPC's core writes lines of its own to stderr, which are no JSON, and reads this
# once, when it is imported.
os.environ.setdefault("GRPC_VERBOSITY", "ERROR")

from arriero.rpc import logs, parent, trace
from arriero.rpc.auth import bearer_token, caller
from arriero.rpc.channel import connect, connect_sync
from arriero.rpc.server import MAX_MESSAGE_BYTES, Server
from arriero.rpc.status import from_rpc_error, from_status, to_status, translated

__all__ = [
    "MAX_MESSAGE_BYTES",
    "Server",
    "bearer_token",
    "caller",
    "connect",
    "connect_sync",
    "from_rpc_error",
    "from_status",
    "logs",
    "parent",
    "to_status",
    "trace",
    "translated",
]
