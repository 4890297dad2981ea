"""Wiring of the shadows: the pretend worlds that a configuration is compared with, and the process they are in.

Solver and simulator are imported where the worlds are made: the gateway's process does without them.
"""

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from dynamollm.adapters.shadow_process import ShadowProcess
from dynamollm.controller_recipe import controller_recipe
from dynamollm.counterfactual import OWN
from dynamollm.errors import UserError
from dynamollm.settings import Settings, of_one_kind

if TYPE_CHECKING:
    from simulator.setup import SimulationSetup
    from solver.control import Controller

BASELINES = ("single-pool", "packing")  # the paper's, and the strong one


@dataclass(frozen=True, slots=True)
class ShadowWorld:
    """Makes one pretend world; pickled to the process that runs it."""

    settings: Settings
    policy: str  # ``OWN``, or one of ``BASELINES``

    def __call__(self) -> "tuple[SimulationSetup, Controller]":
        """The world and what controls it. Raises ``UserError`` where the simulator has no such world."""
        from dynamollm.twin import baseline, twin
        from energy.adapters.catalogue import load_profile
        from solver.policies import policies

        settings = self.settings
        profile = load_profile(settings.models[0].profile)
        if self.policy == OWN:
            static = settings.controller.policy == "static"
            return twin(settings, profile, None if static else controller_recipe(settings)(1))
        policy = policies(profile.tensor_parallel[-1], profile.sm_clocks_mhz[-1])[self.policy]
        if self.policy == "single-pool":  # every GPU, always
            return baseline(settings, profile, policy, None)
        controller = replace(settings.controller, policy=policy.name)  # type: ignore[arg-type] # none to be configured
        recipe = controller_recipe(replace(settings, controller=controller))
        return baseline(settings, profile, policy, replace(recipe, pools=policy.pools(settings.models[0].name))(1))


def build_shadows(settings: Settings) -> ShadowProcess | None:
    """The configuration's own shadow and the baselines'; None where the simulator has no such world."""
    try:
        controller_recipe(settings)
    except UserError:  # no capacity table
        return None
    if not of_one_kind(settings):
        return None
    return ShadowProcess({name: ShadowWorld(settings, name) for name in (OWN, *BASELINES)})
