"""The room's kinds of work.

Responsibility: say who checks a spec and who does the work. Does not know either.
"""

from __future__ import annotations

from arriero.operations.kinds import WorkKind
from arriero.quantization.evaluate_spec import check_evaluate, resolve_evaluate
from arriero.quantization.quantize_spec import check_quantize, resolve_quantize
from arriero.v1 import quantization_pb2 as pb

_JOB_MODULE = "arriero.quantization.job"

WORK_KINDS = (
    WorkKind(
        name="quantize",
        job_module=_JOB_MODULE,
        spec_type=pb.QuantizeSpec,
        semantics=4,
        resolve=resolve_quantize,
        check=check_quantize,
    ),
    WorkKind(
        name="evaluate",
        job_module=_JOB_MODULE,
        spec_type=pb.EvaluateSpec,
        semantics=3,
        resolve=resolve_evaluate,
        check=check_evaluate,
    ),
)
