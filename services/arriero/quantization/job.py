"""What runs in the room's job processes: `quantize` and `evaluate`.

Responsibility: hand the process its handlers. Does not know what they do.
"""

from __future__ import annotations

from arriero.operations.job import main
from arriero.quantization.evaluate import run_evaluate
from arriero.quantization.quantize import run_quantize

if __name__ == "__main__":
    main({"quantize": run_quantize, "evaluate": run_evaluate})
