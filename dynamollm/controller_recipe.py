"""ControllerRecipe: what a controller is made of, small enough to be sent to the process that runs it.

The solver is imported where the controller is made: the gateway's process does without it and its 46 MB of SciPy.
"""

from dataclasses import dataclass, replace

from dynamollm.adapters.clock import monotonic_s, unix_offset_s
from dynamollm.errors import UserError
from dynamollm.settings import ControllerSettings, Settings
from energy.adapters.capacity_file import load_capacity
from energy.profile import ProfileError
from pools.classes import RequestClass
from pools.view import PoolView
from solver.control import Controller, Demand


@dataclass(frozen=True, slots=True)
class ControllerRecipe:
    """Makes the controller; pickled to the process that runs it."""

    profiles: tuple[tuple[str, str], ...]  # model, profile
    pools: tuple[PoolView, ...]
    controller: ControllerSettings
    startup_s: float  # of an instance
    past: tuple[tuple[float, Demand], ...] = ()  # demand seen before, and when

    def __call__(self, epoch: int) -> Controller:
        """A fresh controller; its plans supersede those of lower epochs."""
        from solver.candidates import CLASSES
        from solver.controllers import ControlSettings, PlanningController
        from solver.diff import DiffSettings
        from solver.forecast import SlotForecaster
        from solver.load_history import LoadHistory
        from solver.pace import PacedForecaster, paced
        from solver.planner import ChangeCosts
        from solver.policies import policies

        tables = {model: load_capacity(profile) for model, profile in self.profiles}
        first = next(iter(tables.values()))
        controller = self.controller
        parked_w, deadline_s = controller.parked_w_per_gpu, controller.transition_deadline_s
        policy, pace = policies(first.tps[-1], first.sm_clocks_mhz[-1])[controller.policy], controller.pace
        slots = SlotForecaster(CLASSES * len(tables), history=LoadHistory(pace * unix_offset_s()))
        made = PlanningController(
            replace(policy, periods=paced(policy.periods, pace)),
            tables,
            self.pools,
            ControlSettings(
                changes=ChangeCosts(
                    start_s=self.startup_s,
                    reshard_s=self.startup_s,
                    parked_w_per_gpu=float("inf") if parked_w is None else parked_w,
                    dwell_s=controller.dwell_s / pace,
                ),
                diff=DiffSettings(start_deadline_s=deadline_s, drain_deadline_s=deadline_s),
                lead_s=self.startup_s,
                history_s=controller.warm_up_s / pace,
            ),
            forecaster=PacedForecaster(slots, pace),
            epoch=epoch,
            stopwatch=monotonic_s,
        )
        for at_s, demand in self.past:
            made.recall(at_s, demand)
        return made


def controller_recipe(settings: Settings) -> ControllerRecipe:
    """The controller that the settings ask for. Raises ``UserError`` where a profile has no capacity table."""
    for index, model in enumerate(settings.models):
        try:
            load_capacity(model.profile)
        except ProfileError as error:
            raise UserError(f"models[{index}].profile: {error}; or set controller.policy: static") from None
    return ControllerRecipe(
        tuple((model.name, model.profile) for model in settings.models),
        tuple(PoolView(pool.name, pool.model, RequestClass[pool.request_class]) for pool in settings.pools),
        settings.controller,
        settings.driver.startup_s,
    )
