"""`python -m arriero.training`: the training service.

Responsibility: wiring. Does not know anything else.
"""

from arriero.operations import serve
from arriero.training.service import KINDS, register

if __name__ == "__main__":
    serve(service="training", kinds=KINDS, register=register)
