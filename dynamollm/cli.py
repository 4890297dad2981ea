"""The ``dynamollm`` command: a table of subcommands, each imported only when it is called.

Holds no logic: a subcommand lives in ``dynamollm/commands/<name>.py`` as a click command named ``command``.
"""

import importlib
import sys
from importlib.metadata import version

import click

from dynamollm.errors import UserError
from dynamollm.names import closest

# name -> one-line help; listed here so that `dynamollm --help` imports no subcommand
COMMANDS: dict[str, str] = {
    "serve": "Serve the OpenAI-compatible endpoint over a cluster.",
    "gateway": "Serve as one gateway of several; controllers elsewhere command the cluster.",
    "controller": "Command the cluster of several gateways, or stand by to do so.",
    "status": "Show pools, instances, clocks, load and power of a running gateway.",
    "explain": "Show what the controller of a running gateway decided, and why.",
    "reload": "Have a running gateway follow its configuration file as it is now.",
    "config": "Show, check or describe the configuration.",
    "replay": "Replay a request trace against an endpoint and report latency, SLOs and energy.",
    "simulate": "Run policies over a trace in virtual time and compare energy, cost and SLOs.",
    "report": "Show energy, CO2 and money by class, pool, tenant or model, from a running gateway.",
    "agent": "Set the clocks of this node's GPUs for a controller, on leases.",
    "intents": "Have this node's agent enforce the clocks that Kubernetes pods are annotated with.",
    "profile": "Fit, show, compare and check energy-performance profiles.",
    "emulate": "Run emulated vLLM instances (what `serve` starts without GPUs).",
    "doctor": "Check this machine, the configuration and a running gateway.",
}


class LazyGroup(click.Group):
    """A click group that imports a subcommand's module when it is used."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        """Names in the order of the table."""
        return list(COMMANDS)

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        """Import and return one subcommand; None if there is no such name."""
        if cmd_name not in COMMANDS:
            return None
        module = importlib.import_module(f"dynamollm.commands.{cmd_name}")
        command = module.command
        if not isinstance(command, click.Command):
            raise TypeError(f"dynamollm.commands.{cmd_name}.command is not a click command")
        return command

    def resolve_command(
        self, ctx: click.Context, args: list[str]
    ) -> tuple[str | None, click.Command | None, list[str]]:
        """As click does, and of an unknown name it tells the nearest known one."""
        if args[0] not in COMMANDS and (near := closest(args[0], tuple(COMMANDS))):
            ctx.fail(f"No such command {args[0]!r}. Did you mean {near}?")
        return super().resolve_command(ctx, args)

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        """List the table without importing anything."""
        with formatter.section("Commands"):
            formatter.write_dl(list(COMMANDS.items()))


@click.group(cls=LazyGroup, context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(version("dynamollm"), prog_name="dynamollm")
def group() -> None:
    """Serve LLMs within latency SLOs at the least energy, money and CO2."""


def main() -> None:
    """Run the command line; a ``UserError`` becomes one clear message and exit status 2."""
    try:
        group()
    except UserError as error:
        click.echo(f"dynamollm: {error}", err=True)
        sys.exit(2)
