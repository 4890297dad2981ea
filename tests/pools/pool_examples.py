"""Small clusters, requests and a steady hand for the tests of pools/."""

from energy.profile import StepCoefficients
from pools.classes import REQUEST_CLASSES, RequestClass, Slo
from pools.instances import Instance, InstanceShape, InstanceState
from pools.request import Request
from pools.view import ClusterView, EngineLimits, InstanceView, PoolView

MODEL = "llama"
# about a 70B FP8 model on four H100s
STEP = StepCoefficients(
    overhead_s=2e-3,
    host_s_per_seq=5e-6,
    compute_s_per_token=4e-5,
    attention_s_per_token2=1e-10,
    weights_s=6e-3,
    kv_s_per_token=3e-8,
    communication_s=1e-3,
    communication_s_per_token=2e-6,
    sharpness=4.0,
    idle_w=120.0,
    active_w=60.0,
    compute_w=400.0,
    memory_w=200.0,
    max_w=700.0,
)
SLOW_STEP = STEP._replace(compute_s_per_token=8e-5, weights_s=7e-3, compute_w=180.0, active_w=20.0)


def instance_view(
    instance_id,
    pool,
    state=InstanceState.READY,
    step=STEP,
    tp=4,
    max_seqs=256,
    kv_capacity_tokens=400_000,
    clock=1980,
    model=MODEL,
):
    instance = Instance(instance_id, pool, InstanceShape(model, "H100", tp), "http://127.0.0.1:1", state, clock)
    return InstanceView(instance, step, EngineLimits(max_seqs, 2048, kv_capacity_tokens))


def pool_view(request_class, name=None, model=MODEL):
    return PoolView(name or request_class.name, model, request_class)


def cluster(counts, version=1, shares=None, **options):
    """A view of ``{class: number of READY instances}``; pools are named after their class."""
    pools = tuple(pool_view(c) for c in counts)
    instances = tuple(
        instance_view(f"{c.name}-{k}", c.name, **options) for c, count in counts.items() for k in range(count)
    )
    return ClusterView(version, 0.0, pools, instances, shares or {})


def nine_pools(each=1, **options):
    return cluster(dict.fromkeys(REQUEST_CLASSES, each), **options)


def request(
    request_id,
    request_class=RequestClass.MM,
    arrival_s=0.0,
    input_tokens=500,
    output_tokens=200.0,
    slo=None,
    priority=0,
    model=MODEL,
    tenant="default-flow",
    prefix=None,
):
    slo = slo or Slo(0.4, 0.1)
    return Request(
        str(request_id),
        model,
        arrival_s,
        input_tokens,
        output_tokens,
        request_class,
        slo,
        priority,
        tenant,
        prefix=prefix,
    )
