"""Reload: another configuration for a cluster that serves, without losing a request.

The policy and its settings (``controller``) and the models' profiles can change while it runs: the next controller
begins with what the one before has seen of the load, in a higher epoch, and the router prices instances by the new
profile at once. Everything else needs a restart, and is refused by name before anything is changed.
"""

import logging
from collections.abc import Callable, Mapping
from dataclasses import fields, replace

from dynamollm.control_loop import AsyncController, ControlLoop
from dynamollm.deployment import Deployment
from dynamollm.errors import UserError
from dynamollm.operations import Operations
from dynamollm.settings import Settings
from energy.profile import EnergyProfile

log = logging.getLogger("dynamollm.reload")


class Reload:
    """Call it to read the configuration anew and follow it; answers with what has changed."""

    def __init__(
        self,
        read: Callable[[], Settings],
        profiles_of: Callable[[Settings], Mapping[str, EnergyProfile]],
        controller_of: Callable[[Settings, int], AsyncController],
        deployment: Deployment,
        publish: Callable[[], None],
        operations: Operations,
        control: ControlLoop,
    ) -> None:
        """``controller_of``: who decides under these settings, from an epoch on. Both may raise ``UserError``."""
        self._read = read
        self._profiles_of = profiles_of
        self._controller_of = controller_of
        self._deployment = deployment
        self._publish = publish
        self._operations = operations
        self._control = control

    def __call__(self) -> list[str]:
        """Raises ``UserError`` for a configuration that is wrong or asks for more; nothing has changed then."""
        before, after = self._deployment.settings, self._read()
        if fixed := restart_needed(before, after):
            raise UserError(f"{', '.join(fixed)}: cannot change while it runs; restart, or leave as it was")
        changed = [f"models[{i}].profile" for i, m in enumerate(after.models) if m != before.models[i]]
        changed += ["controller"] if after.controller != before.controller else []
        if changed:
            profiles = self._profiles_of(after)
            controller = self._controller_of(after, self._operations.newest[0] + 1)
            self._deployment.reconfigure(after, profiles)
            self._publish()
            self._control.switch(controller)
        return changed


def as_it_is_now(before: Settings, read: Callable[[], Settings], check: Callable[[Settings], object]) -> Settings:
    """The configuration for one who begins to command; as before where it cannot be followed, which is said.

    ``check`` raises ``UserError`` for what cannot be used.
    """
    try:
        after = read()
        if fixed := restart_needed(before, after):
            raise UserError(f"{', '.join(fixed)}: cannot change while it runs")
        check(after)
    except UserError as error:
        log.warning("the configuration as it is now is not followed: %s", error)
        return before
    return after


def restart_needed(before: Settings, after: Settings) -> list[str]:
    """Sections that differ in what cannot change while it runs."""
    if len(before.models) != len(after.models):
        return ["models"]
    pairs = zip(before.models, after.models, strict=True)
    models = tuple(replace(new, profile=old.profile) for old, new in pairs)
    same = replace(after, controller=before.controller, models=models)
    return [field.name for field in fields(Settings) if getattr(same, field.name) != getattr(before, field.name)]
