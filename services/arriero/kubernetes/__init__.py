"""The Kubernetes API, as far as Arriero needs it.

Responsibility: read and change objects of one namespace, follow them while they
change, and say what is wrong with a pod. Does not know jobs, endpoints or why
anything is wanted.

    Api, Resource     objects as dicts, errors as `ArrieroError`
    Informer          objects by name, kept as the cluster has them
    pods              what a pod's status says
    names             names and label values that the API takes
"""

from arriero.kubernetes.api import Api, Resource
from arriero.kubernetes.informer import Informer

__all__ = ["Api", "Informer", "Resource"]
