"""`python -m arriero.merging`: the merging service.

Responsibility: wiring. Does not know anything else.
"""

from arriero.merging.service import KINDS, register
from arriero.operations import serve

if __name__ == "__main__":
    serve(service="merging", kinds=KINDS, register=register)
