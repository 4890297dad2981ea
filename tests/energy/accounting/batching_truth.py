"""An instance that batches continuously, step by step: what each request really used, and what a meter reads.

Its own small loop on the profile's step functions, with the energy of every step shared by what each sequence put into
it (its arithmetic, its memory traffic, and an equal part of the rest): the truth that accounting is held against.
"""

from dataclasses import dataclass

import numpy as np

from energy.profile import StepCoefficients, step_power_w, step_time_s


@dataclass
class Job:
    id: str
    arrival_s: float
    input_tokens: int
    output_tokens: int
    first_token_s: float = 0.0
    end_s: float = 0.0
    done: int = 0
    prefill_j: float = 0.0
    decode_j: float = 0.0


class Meter:
    """The energy counter of an instance's GPUs: steps, and idle power between them."""

    def __init__(self, begins_s: list[float], ends_s: list[float], energies_j: list[float], idle_w: float) -> None:
        self._idle_w = idle_w
        # cumulative time and energy at the ends of every step, linear in between
        self._at_s = np.array([at_s for span in zip(begins_s, ends_s, strict=True) for at_s in span])
        self._busy_s = np.repeat(np.cumsum(np.subtract(ends_s, begins_s)), 2)
        self._busy_s[::2] -= np.subtract(ends_s, begins_s)
        self._busy_j = np.repeat(np.cumsum(energies_j), 2)
        self._busy_j[::2] -= energies_j

    def read_j(self, now_s: float) -> float:
        """Energy since 0."""
        busy_j = float(np.interp(now_s, self._at_s, self._busy_j))
        return busy_j + self._idle_w * (now_s - float(np.interp(now_s, self._at_s, self._busy_s)))


def play(c: StepCoefficients, gpus: int, jobs: list[Job], max_batch: int = 64) -> Meter:
    """Serve the jobs, by arrival; fills in their times and joules. One prompt a step joins the running batch."""
    waiting, running, now_s = sorted(jobs, key=lambda job: job.arrival_s), [], 0.0
    begins_s, ends_s, energies_j = [], [], []
    while waiting or running:
        if not running and waiting[0].arrival_s > now_s:
            now_s = waiting[0].arrival_s
        fresh = waiting.pop(0) if waiting and waiting[0].arrival_s <= now_s and len(running) < max_batch else None
        prompt = fresh.input_tokens if fresh else 0
        attention, context = 0.5 * prompt**2, float(sum(job.input_tokens + job.done for job in running))
        length_s = step_time_s(c, prompt, attention, len(running), context)
        energy_j = length_s * gpus * step_power_w(c, prompt, attention, len(running), context)
        begins_s.append(now_s)
        now_s += length_s
        ends_s.append(now_s)
        energies_j.append(energy_j)
        share(c, energy_j, fresh, running, attention)
        for job in running:
            job.done += 1
        if fresh:
            fresh.first_token_s, fresh.done = now_s, 1
            running.append(fresh)
        for job in [job for job in running if job.done >= job.output_tokens]:
            job.end_s = now_s
            running.remove(job)
    return Meter(begins_s, ends_s, energies_j, c.idle_w * gpus)


def share(c: StepCoefficients, energy_j: float, fresh: Job | None, running: list[Job], attention: float) -> None:
    """Split a step: by each sequence's own seconds of arithmetic and memory, fixed seconds by head."""
    heads = len(running) + (fresh is not None)
    fixed_s = (c.weights_s + c.overhead_s + c.communication_s) / heads
    token_own_s = c.compute_s_per_token + c.communication_s_per_token
    own_s = {
        job.id: token_own_s + c.host_s_per_seq + c.kv_s_per_token * (job.input_tokens + job.done) + fixed_s
        for job in running
    }
    if fresh:
        own_s[fresh.id] = token_own_s * fresh.input_tokens + c.attention_s_per_token2 * attention + fixed_s
    total_s = sum(own_s.values())
    for job in running:
        job.decode_j += energy_j * own_s[job.id] / total_s
    if fresh:
        fresh.prefill_j += energy_j * own_s[fresh.id] / total_s
