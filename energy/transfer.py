"""moved_to: a fitted profile carried to a GPU of the same die with other memory; physics, not measurement.

Arithmetic, host and communication stay; weight and KV traffic go with the bandwidth ratio. How far this is off is
measured where both GPUs were: see docs/profiles.md.
"""

from dataclasses import replace

from energy.fitted import FittedProfile, Provenance, StepTimes
from energy.gpus import GpuPhysics
from energy.models import model_architecture


def moved_times(times: dict[int, StepTimes], bandwidth_ratio: float) -> dict[int, StepTimes]:
    """Step times where memory is ``bandwidth_ratio`` times as fast."""
    return {
        tp: replace(t, weights_s=t.weights_s / bandwidth_ratio, kv_s_per_token=t.kv_s_per_token / bandwidth_ratio)
        for tp, t in times.items()
    }


def moved_to(profile: FittedProfile, gpu: GpuPhysics, name: str, errors: dict[str, float]) -> FittedProfile:
    """The profile on ``gpu``; ``errors`` are those of the same move where it could be measured."""
    old = profile.physics
    model = model_architecture(profile.model)
    moved = f"physical assumption: the fit of {profile.name} with the memory bandwidth of {gpu.name}"
    return replace(
        profile,
        name=name,
        physics=replace(gpu, active_w=old.active_w, compute_w=old.compute_w, memory_w=old.memory_w),
        times=moved_times(profile.times, gpu.bandwidth_bytes_per_s / old.bandwidth_bytes_per_s),
        kv_capacity={
            tp: model.kv_capacity_tokens(tp, gpu.memory_bytes, profile.precision) for tp in profile.tensor_parallel
        },
        provenance=Provenance(
            origin={
                **profile.provenance.origin,
                "load": moved,
                "tensor_parallel": moved,
                "idle_power": gpu.idle_origin,
                "activity_power": f"physical assumption: that of {profile.name}, the same die",
            },
            sources=profile.provenance.sources,
            validity=profile.provenance.validity,
            errors=errors,
        ),
    )
