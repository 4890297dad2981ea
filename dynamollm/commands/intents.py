"""``dynamollm intents``: stands beside the node agent on Kubernetes and tells it which clocks pods are to have."""

import asyncio

import click

from dynamollm.adapters.clock import monotonic_s
from dynamollm.errors import UserError
from energy.adapters.agent_client import AgentClient

HOLDER = "kubernetes-intents"


@click.command()
@click.option("--node", required=True, envvar="NODE_NAME", help="Name of this node in the cluster.")
@click.option(
    "--agent", "address", default="unix:/run/dynamollm/agent.sock", show_default=True, help="The node's agent."
)
@click.option("--namespace", default="default", show_default=True, envvar="NAMESPACE", help="Of the engines' pods.")
@click.option(
    "--deployment", default="dynamollm", show_default=True, help="driver.kubernetes.deployment of the driver."
)
def command(node: str, address: str, namespace: str, deployment: str) -> None:
    """Enforce the SM clocks that pods of this node are annotated with, until Ctrl-C.

    Reads the pods and the driver's Lease from the API server; where either falls silent, locks lapse.
    """
    try:
        from pools.drivers.kubernetes_api import KubernetesApi
        from pools.drivers.kubernetes_intents import ClockIntents
    except ModuleNotFoundError:
        raise UserError("intents needs an extra: pip install 'dynamollm[kubernetes]'") from None

    async def follow() -> None:
        api = KubernetesApi(namespace)
        try:
            with AgentClient(address, HOLDER) as agent:
                await ClockIntents(api, node, deployment, agent.gpus, monotonic_s).run()
        finally:
            await api.close()

    asyncio.run(follow())
