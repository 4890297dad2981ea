"""Re-shard transfers: which GPU takes which place in the new instances, and who sends it the weights it lacks. Pure.

Weights are cut into eighths; GPU j of a TP-k instance holds eighths [8j/k, 8(j+1)/k). Places are matched to GPUs so
that as many bytes as can be stay where they are (linear sum assignment); what is missing is copied GPU to GPU, each
eighth from the holder that has sent the least. Time is that of the busiest GPU, sending or receiving, in units of tau:
one eighth over NVLink, about 50 ms for Llama-2-70B at 300 GB/s (DynamoLLM, camera-ready, second-hand).
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from scipy.optimize import linear_sum_assignment

from solver.control import BoolArray, Transfer

EIGHTHS = 8
NVLINK_BYTES_PER_S = 300e9
"""Effective rate of one GPU's NVLink, as the paper assumes."""


@dataclass(frozen=True, slots=True)
class TransferPlan:
    """Where the new instances lie, and the copies that fill them."""

    placements: tuple[tuple[int, ...], ...]  # GPUs of each new instance, by rank
    transfers: tuple[Transfer, ...]
    taus: int  # of the busiest GPU
    kept_eighths: int  # weight eighths that needed no copy

    def time_s(self, weight_bytes: float) -> float:
        """Time of the copies for a model of this size."""
        return self.taus * weight_bytes / EIGHTHS / NVLINK_BYTES_PER_S


def rank_eighths(tp: int, rank: int) -> range:
    """Eighths of the weights that a rank of a TP-``tp`` instance holds. Raises ``ValueError`` unless TP divides 8."""
    if tp < 1 or EIGHTHS % tp:
        raise ValueError(f"TP{tp} does not divide the weights into whole eighths; use 1, 2, 4 or 8")
    width = EIGHTHS // tp
    return range(rank * width, (rank + 1) * width)


def plan_transfers(held: Mapping[int, range], gpus: Sequence[int], tps: Sequence[int]) -> TransferPlan:
    """Fill new instances of these TPs on some of these GPUs; ``held`` says which eighths a GPU holds before.

    Holders need not be among ``gpus``: they may only send. Raises ``ValueError`` where the GPUs are fewer than the
    instances need, or an eighth is held by nobody.
    """
    wanted = np.array([_mask(rank_eighths(tp, rank)) for tp in tps for rank in range(tp)], dtype=np.bool_)
    if len(wanted) > len(gpus):
        raise ValueError(f"instances of TP {tuple(tps)} need {len(wanted)} GPUs, only {len(gpus)} are given")
    present = {gpu: _mask(eighths) for gpu, eighths in held.items()}
    empty = np.zeros(EIGHTHS, dtype=np.bool_)
    before = np.array([present.get(gpu, empty) for gpu in gpus], dtype=np.bool_).reshape(len(gpus), EIGHTHS)
    missing = np.sum(wanted[None, :, :] & ~before[:, None, :], axis=2)  # (gpu, place)
    gpu_at, place_at = linear_sum_assignment(missing)
    at_place = {int(place): gpus[int(gpu)] for gpu, place in zip(gpu_at, place_at, strict=True)}
    placements, place = [], 0
    for tp in tps:
        placements.append(tuple(at_place[place + rank] for rank in range(tp)))
        place += tp
    transfers, taus = _copies(present, at_place, wanted)
    return TransferPlan(tuple(placements), transfers, taus, int(wanted.sum() - missing[gpu_at, place_at].sum()))


def _mask(eighths: range) -> BoolArray:
    mask = np.zeros(EIGHTHS, dtype=np.bool_)
    mask[list(eighths)] = True
    return mask


def _copies(
    present: Mapping[int, BoolArray], at_place: Mapping[int, int], wanted: BoolArray
) -> tuple[tuple[Transfer, ...], int]:
    """The copies, spread over the holders, and the eighths of the busiest GPU."""
    sent: dict[int, int] = dict.fromkeys(present, 0)
    received: dict[int, int] = {}
    copies: list[tuple[int, int, int]] = []
    for place, gpu in sorted(at_place.items()):
        have = present.get(gpu)
        for eighth in np.flatnonzero(wanted[place] if have is None else wanted[place] & ~have):
            holders = [g for g, mask in present.items() if mask[eighth] and g != gpu]
            if not holders:
                raise ValueError(f"eighth {eighth} of the weights is held by no GPU: load it from disk")
            source = min(holders, key=lambda g: (sent[g], g))
            sent[source] += 1
            received[gpu] = received.get(gpu, 0) + 1
            copies.append((source, gpu, int(eighth)))
    transfers = tuple(Transfer(source, gpu, eighth, eighth + 1) for source, gpu, eighth in copies)
    return transfers, max([*sent.values(), *received.values()], default=0)
