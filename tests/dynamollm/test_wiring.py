"""Wiring: what the settings say reaches the pieces; what they name and is not there is told with its key."""

import asyncio
import dataclasses
import json
import sys

import pytest

from dynamollm import wiring
from dynamollm.adapters.configuration import load
from dynamollm.control_loop import StaticController
from dynamollm.errors import UserError
from dynamollm.settings import (
    ControllerSettings,
    DriverSettings,
    EnergySettings,
    KubernetesSettings,
    RaySettings,
    RoutingSettings,
    Settings,
    VllmSettings,
)
from pools.drivers.attach import AttachDriver
from pools.drivers.emulator import EmulatorDriver

STATIC = ControllerSettings("static")


def settings_with(**changes: object) -> Settings:
    return dataclasses.replace(load(None, {}), **changes)


def test_keys_of_the_configuration_and_of_the_file_are_both_taken(tmp_path):
    keys = tmp_path / "keys"
    keys.write_text("# operators\nsk-file  # alice\n\n")
    auth = dataclasses.replace(load(None, {}).auth, api_keys=("sk-inline",), api_keys_file=str(keys))
    assert wiring.proxy_settings(settings_with(auth=auth)).api_keys == ("sk-inline", "sk-file")


def test_a_key_file_that_is_missing_or_empty_is_refused(tmp_path):
    with pytest.raises(UserError, match=r"auth.api_keys_file: .*No such file"):
        wiring.read_keys(str(tmp_path / "none"))
    empty = tmp_path / "empty"
    empty.write_text("# nothing\n")
    with pytest.raises(UserError, match="holds no key"):
        wiring.read_keys(str(empty))
    assert wiring.read_keys(None) == ()


def test_limits_and_slos_reach_gateway_and_router():
    environ = {
        "DYNAMOLLM_LIMITS__QUEUE_REQUESTS": "7",
        "DYNAMOLLM_LIMITS__BODY_BYTES": "2048",
        "DYNAMOLLM_SLO__TBT_S": "0.05",
    }
    settings = load(None, environ)
    assert wiring.router_limits(settings.limits).queue.max_depth == 7
    assert wiring.router_limits(settings.limits).escalation.squash_late_s == float("inf")
    squashing = load(None, {"DYNAMOLLM_LIMITS__SQUASH_LATE_S": "2.5"})
    assert wiring.router_limits(squashing.limits).escalation.squash_late_s == 2.5
    told = wiring.proxy_settings(settings)
    assert told.limits.body_bytes == 2048
    assert told.slos.tbt_s == 0.05
    assert told.request_id_prefix != wiring.proxy_settings(settings).request_id_prefix


@pytest.mark.parametrize(
    ("asked", "kind", "told"),
    [
        (None, "emulator", False),
        (None, "vllm", True),
        (None, "vllm-emulated", True),
        (False, "vllm", False),
        (True, "emulator", True),
    ],
)
def test_prefixes_count_where_engines_cache_them_or_it_is_asked_for(asked, kind, told):
    settings = settings_with(driver=DriverSettings(kind), routing=RoutingSettings(asked))
    assert wiring.proxy_settings(settings).prefix_affinity is told


def test_the_driver_is_the_one_asked_for():
    assert isinstance(wiring.build_driver(load(None, {})), EmulatorDriver)
    attach = DriverSettings("attach", urls={"LL": ("http://h:1",)})
    driver = wiring.build_driver(settings_with(driver=attach, controller=STATIC))
    assert isinstance(driver, AttachDriver)
    assert wiring.build_meter(driver) is None
    assert isinstance(wiring.build_controller(settings_with(controller=STATIC)), StaticController)


def test_engines_on_emulated_devices_are_metered_and_those_without_agents_are_not():
    emulated = wiring.build_driver(settings_with(driver=DriverSettings("vllm-emulated")))
    assert emulated.metered_nodes == {f"h100-{index}" for index in range(4)}
    meter = wiring.build_meter(emulated)
    readings = asyncio.run(meter.read())
    assert len(readings) == 32
    assert min(reading.power_w for reading in readings) > 0
    asyncio.run(emulated.close())
    assert wiring.build_meter(wiring.build_driver(settings_with(driver=DriverSettings("vllm")))) is None


def test_a_profile_that_cannot_serve_a_pool_is_refused_with_the_pool():
    pools = load(None, {}).pools
    wrong = dataclasses.replace(pools[0], tp=1)
    with pytest.raises(UserError, match=r"pools\[0\].tp: profile .* holds for TP 2, 4, 8, not 1"):
        wiring.load_profiles(settings_with(pools=(wrong, *pools[1:])))


def test_a_tokenizer_file_is_read_or_refused_with_its_key(tmp_path):
    model = load(None, {}).models[0]
    missing = dataclasses.replace(model, tokenizer_file=str(tmp_path / "tokenizer.json"))
    with pytest.raises(UserError, match=r"models\[0\].tokenizer_file"):
        wiring.load_tokenizers(settings_with(models=(missing,)))
    words = {"hello": 0, "world": 1, "[UNK]": 2}
    tokenizer = {
        "version": "1.0",
        "pre_tokenizer": {"type": "Whitespace"},
        "model": {"type": "WordLevel", "vocab": words, "unk_token": "[UNK]"},
    }
    (tmp_path / "tokenizer.json").write_text(json.dumps(tokenizer))
    counter = wiring.load_tokenizers(settings_with(models=(missing,)))[model.name]
    assert counter.of_text("hello world hello") == 3


@pytest.mark.parametrize(
    ("energy", "told"),
    [
        (EnergySettings(carbon_region="mars"), "energy.carbon_region: no carbon intensity is known for region 'mars'"),
        (EnergySettings(carbon_file="/nowhere.csv"), "energy.carbon_file: "),
    ],
)
def test_carbon_that_is_not_known_is_refused(energy, told):
    with pytest.raises(UserError, match=told):
        wiring.build_carbon(energy)


def test_carbon_comes_from_where_it_was_asked_for():
    assert wiring.build_carbon(EnergySettings(carbon_g_per_kwh=12.5)).g_per_kwh(0.0) == 12.5
    default = wiring.build_carbon(EnergySettings())
    assert default.g_per_kwh(0.0) == wiring.build_carbon(EnergySettings(carbon_region="us-west2")).g_per_kwh(0.0)


def test_a_zone_is_asked_live_and_answers_as_the_default_region_until_then():
    energy = EnergySettings(carbon_zone="DE", carbon_token="secret")
    carbon = wiring.build_carbon(energy)
    assert carbon.source == "Electricity Maps, zone DE"
    assert carbon.g_per_kwh(0.0) == wiring.build_carbon(EnergySettings()).g_per_kwh(0.0)
    application = wiring.build(settings_with(energy=energy, controller=STATIC), clock=lambda: 5.0)
    assert application.carbon is not None
    assert wiring.build(settings_with(controller=STATIC), clock=lambda: 5.0).carbon is None


def test_the_application_is_put_together_without_starting_anything():
    application = wiring.build(load(None, {}), clock=lambda: 5.0)
    assert application.services.energy_j is not None
    assert application.deployment.instances == {}
    assert application.services.directory.models().keys() == {"llama-3.1-70b"}


def test_an_application_without_meters_promises_no_energy():
    attach = DriverSettings("attach", urls={"LL": ("http://h:1",)})
    application = wiring.build(settings_with(driver=attach, controller=STATIC), clock=lambda: 5.0)
    assert application.metering is None
    assert application.services.energy_j is None


@pytest.mark.parametrize("kind", ["ray", "kubernetes"])
def test_a_driver_whose_extra_is_missing_says_what_to_install(monkeypatch, kind):
    for name in (kind, f"{kind}.aio"):
        monkeypatch.setitem(sys.modules, name, None)
    for name in [name for name in sys.modules if name.startswith(f"pools.drivers.{kind}")]:
        monkeypatch.delitem(sys.modules, name)
    with pytest.raises(UserError, match=rf"driver.kind: .*dynamollm\[{kind}\]"):
        wiring.build_driver(settings_with(driver=DriverSettings(kind)))


def test_the_kubernetes_driver_and_its_replicas_are_put_together_without_a_cluster():
    pytest.importorskip("kubernetes")
    from pools.drivers.kubernetes import KubernetesDriver

    for kubernetes in (KubernetesSettings(), KubernetesSettings(engine="emulated", mode="metrics")):
        told = settings_with(driver=DriverSettings("kubernetes", kubernetes=kubernetes), controller=STATIC)
        application = wiring.build(told, clock=lambda: 5.0)
        assert isinstance(application.runner._driver, KubernetesDriver)
        assert application.metering is None
        assert application.services.metrics.registry.get_sample_value("wva_desired_replicas") is None


def test_the_ray_driver_is_put_together_without_a_cluster():
    pytest.importorskip("ray")
    from pools.drivers.ray import RayDriver

    for ray in (RaySettings(), RaySettings(engine="emulated"), RaySettings(clocks="none")):
        driver = wiring.build_driver(settings_with(driver=DriverSettings("ray", ray=ray)))
        assert isinstance(driver, RayDriver)
        assert driver.lost_nodes() == frozenset()
        assert driver.metered_nodes == (frozenset() if ray.clocks == "none" else {f"h100-{n}" for n in range(4)})
    named = DriverSettings("ray", vllm=VllmSettings(agents={"h100-1": "http://h100-1:9"}))
    assert wiring.build_driver(settings_with(driver=named)).metered_nodes == {"h100-1"}


def test_leadership_is_the_stores_or_a_lease():
    pytest.importorskip("kubernetes")
    from dynamollm.adapters.kubernetes_lease import KubernetesLease
    from dynamollm.kubernetes_wiring import build_leadership

    store = wiring.build_store(settings_with().store)
    assert build_leadership(settings_with(), store, lambda: 5.0) is store
    lease = settings_with(controller=dataclasses.replace(STATIC, leadership="kubernetes"))
    assert isinstance(build_leadership(lease, store, lambda: 5.0), KubernetesLease)
