"""Several processes that train one model together.

Responsibility: who of them does what, sums over all of them, and the error when one
is lost. Does not know models, rows or jobs; alone, everything here does nothing.
"""

from __future__ import annotations

import contextlib
import math
import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from arriero.errors import FailedPrecondition, Unavailable

if TYPE_CHECKING:
    import torch

__all__ = ["ALONE", "RANK_LOST", "Ranks"]

RANK_LOST = "RANK_LOST"
# Values of gradients that travel together.
_BUCKET = 1 << 24


class Ranks:
    """The processes of a training, as one of them sees it.

    Every rank calls the methods in the same order. Small things travel over gloo,
    gradients of a GPU over NCCL.

    Attributes:
        rank: from 0; rank 0 alone writes files and the outcome.
        world: how many there are.
        local: rank on this machine, of `local_world`.
    """

    def __init__(self, rank: int = 0, world: int = 1, local: int = 0, local_world: int = 1) -> None:
        self.rank, self.world = rank, world
        self.local, self.local_world = local, local_world

    @classmethod
    def join(cls, environment: Mapping[str, str] | None = None) -> Ranks:
        """Meet the others, where torchrun started this process; alone elsewhere.

        Raises:
            Unavailable: they did not come.
            FailedPrecondition: more processes than GPUs.
        """
        env = os.environ if environment is None else environment
        if "RANK" not in env or int(env.get("WORLD_SIZE", "1")) == 1:
            return cls()
        import torch
        import torch.distributed

        ranks = cls(
            int(env["RANK"]),
            int(env["WORLD_SIZE"]),
            int(env.get("LOCAL_RANK", "0")),
            int(env.get("LOCAL_WORLD_SIZE", "1")),
        )
        gpus = torch.cuda.is_available()
        if gpus and ranks.local_world > torch.cuda.device_count():
            raise FailedPrecondition(
                f"{ranks.local_world} processes on this machine, and torch sees "
                f"{torch.cuda.device_count()} GPUs: each process needs one of its own; leave "
                "nproc_per_node out for as many as there are"
            )
        if gpus:
            torch.cuda.set_device(ranks.local)
        with _others():
            torch.distributed.init_process_group("cpu:gloo,cuda:nccl" if gpus else "gloo")
        return ranks

    @property
    def first(self) -> bool:
        """Whether this is the one that writes."""
        return self.rank == 0

    def share(self, rows: npt.NDArray[np.int64]) -> npt.NDArray[np.int64]:
        """This rank's part of a batch; rows that come longest first are dealt evenly."""
        return rows[self.rank :: self.world]

    def parts(self, rows: int, size: int) -> int:
        """Micro batches of at most `size` rows that the rank with most rows has."""
        return math.ceil(math.ceil(rows / self.world) / size)

    def any(self, flag: bool) -> bool:
        """Whether it is so on any rank."""
        return self.total([float(flag)])[0] > 0 if self.world > 1 else flag

    def total(self, values: Sequence[float]) -> list[float]:
        """Sums over the ranks."""
        if self.world == 1:
            return list(values)
        import torch

        summed = torch.tensor(values, dtype=torch.float64)
        with _others():
            torch.distributed.all_reduce(summed)
        found: list[float] = summed.tolist()
        return found

    def least(self, value: int) -> int:
        """The smallest over the ranks."""
        if self.world == 1:
            return value
        import torch

        lowest = torch.tensor([value])
        with _others():
            torch.distributed.all_reduce(lowest, torch.distributed.ReduceOp.MIN)
        return int(lowest[0])

    def told(self, value: Any) -> Any:
        """What rank 0 has; plain Python values."""
        if self.world == 1:
            return value
        import torch

        box = [value]
        with _others():
            torch.distributed.broadcast_object_list(box, device=torch.device("cpu"))
        return box[0]

    def add_gradients(self, weights: Iterable[torch.Tensor]) -> None:
        """Sum the gradients over the ranks, once a step; a missing one counts as zero."""
        if self.world == 1:
            return
        import torch

        bucket: list[torch.Tensor] = []
        size = 0
        for weight in weights:
            if weight.grad is None:
                weight.grad = torch.zeros_like(weight)
            bucket.append(weight.grad)
            size += weight.numel()
            if size >= _BUCKET:
                _add(bucket)
                bucket, size = [], 0
        if bucket:
            _add(bucket)

    def shard(self, module: Any, layers: Iterable[Any], device: str) -> None:
        """Spread the frozen weights of a module over the ranks (FSDP2).

        What is trained stays whole on every rank: it is small, and its gradients
        are summed by `add_gradients`.

        Args:
            module: whose `forward` is called.
            layers: in it, gathered one at a time.
            device: `cpu` or `cuda`.

        Raises:
            FailedPrecondition: there are no layers.
        """
        if self.world == 1:
            return
        from torch.distributed.device_mesh import init_device_mesh
        from torch.distributed.fsdp import fully_shard

        mesh = init_device_mesh(device, (self.world,))
        trained = {weight for weight in module.parameters() if weight.requires_grad}
        layers = list(layers)
        for weight in trained:
            weight.data = weight.data.to(device)  # the rest is taken there piece by piece
        for layer in layers:
            fully_shard(layer, mesh=mesh, ignored_params=trained)
        if not layers:
            raise FailedPrecondition(
                "fsdp: transformers cannot spread this kind of model in pieces; train without it"
            )
        fully_shard(module, mesh=mesh, ignored_params=trained)

    @contextlib.contextmanager
    def together(self) -> Iterator[None]:
        """Around work in which the ranks wait for each other, to name the error when one is lost.

        Raises:
            Unavailable: one was.
        """
        if self.world == 1:
            yield
            return
        with _others():
            yield


# A training in one process.
ALONE = Ranks()


def _add(gradients: list[torch.Tensor]) -> None:
    import torch

    flat = torch.cat([gradient.reshape(-1) for gradient in gradients])
    with _others():
        torch.distributed.all_reduce(flat)
    begin = 0
    for gradient in gradients:
        gradient.copy_(flat[begin : begin + gradient.numel()].view_as(gradient))
        begin += gradient.numel()


# How gloo, NCCL and the rendezvous say that the other side is gone.
_LOST = ("connection", "socket", "peer", "timed out", "nccl", "broken pipe")


@contextlib.contextmanager
def _others() -> Iterator[None]:
    try:
        yield
    except RuntimeError as error:
        import torch.distributed

        text = str(error).lower()
        known = isinstance(error, torch.distributed.DistError)
        if not known and not any(word in text for word in _LOST):
            raise
        lines = str(error).strip().splitlines()
        raise Unavailable(
            "another process of this training was lost, so that this one cannot go on "
            f"({lines[0] if lines else type(error).__name__}); the next attempt goes on from "
            "the newest checkpoint",
            reason=RANK_LOST,
        ) from error
