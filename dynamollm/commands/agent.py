"""``dynamollm agent``: the node agent that sets GPU clocks for controllers elsewhere, and always resets them."""

from pathlib import Path

import click

from dynamollm.errors import UserError
from energy.adapters.agent_journal import JournalError
from energy.adapters.agent_process import AgentOptions, restore, run
from energy.gpu import GpuError

JOURNAL = Path("/var/lib/dynamollm/agent-locks.json")
POSITIVE = click.FloatRange(min=0, min_open=True)


class GpuIndices(click.ParamType[tuple[int, ...] | None]):
    """``all`` or ``0,1,2``."""

    name = "all|0,1,..."

    def convert(
        self, value: object, param: click.Parameter | None, ctx: click.Context | None
    ) -> tuple[int, ...] | None:
        """Indices, None for all."""
        if value is None or value == "all":
            return None
        parts = str(value).split(",")
        if not all(part.isascii() and part.isdigit() for part in parts):
            self.fail(f"{value!r} is neither 'all' nor indices as 0,1,2", param, ctx)
        return tuple(dict.fromkeys(int(part) for part in parts))


@click.command()
@click.option("--gpus", type=GpuIndices(), required=True, help="GPUs it may touch: all, or indices as 0,1,2.")
@click.option("--socket", "socket_path", type=click.Path(path_type=Path), help="Unix socket to listen on (mode 0660).")
@click.option("--host", default="127.0.0.1", show_default=True, help="Address to listen on, without --socket.")
@click.option("--port", type=click.IntRange(0, 65535), default=8089, show_default=True, help="Port, without --socket.")
@click.option(
    "--token-file",
    type=click.Path(path_type=Path, exists=True, dir_okay=False),
    help="File with the token that clients send; needed beyond loopback.",
)
@click.option("--ttl", "ttl_s", type=POSITIVE, default=30.0, show_default=True, help="Seconds of a lock's lease.")
@click.option(
    "--dwell",
    "dwell_s",
    type=click.FloatRange(min=0),
    default=1.0,
    show_default=True,
    help="Seconds after a change before a clock may be lowered.",
)
@click.option("--journal", type=click.Path(path_type=Path), default=JOURNAL, show_default=True, help="Notes the locks.")
@click.option("--node", default="", help="Name of this node in the metrics [default: the host's].")
@click.option("--restore", "only_restore", is_flag=True, help="Reset what a dead agent left locked, and end.")
def command(
    gpus: tuple[int, ...] | None,
    socket_path: Path | None,
    host: str,
    port: int,
    token_file: Path | None,
    ttl_s: float,
    dwell_s: float,
    journal: Path,
    node: str,
    only_restore: bool,
) -> None:
    """Set the clocks of this node's GPUs for a controller, on leases.

    A GPU goes back to its default clocks when the controller asks, when it is silent for the lease's time, when the
    agent is stopped, and when it starts again after it was killed. Needs root or CAP_SYS_ADMIN.
    """
    token = None if token_file is None else token_file.read_text(encoding="utf-8").strip()
    if token == "":
        raise UserError(f"--token-file {token_file}: it is empty")
    if socket_path is None and token is None and host not in ("127.0.0.1", "::1", "localhost"):
        raise UserError(f"--host {host} is reachable from elsewhere: give --token-file, or listen on a --socket")
    options = AgentOptions(gpus, journal, socket_path, host, port, token, ttl_s, dwell_s, node)
    try:
        if only_restore:
            _restore(options)
        else:
            run(options)
    except (GpuError, JournalError) as error:
        raise UserError(str(error)) from None
    except OSError as error:
        raise UserError(f"cannot listen on {socket_path or f'{host}:{port}'}: {error.strerror or error}") from None


def _restore(options: AgentOptions) -> None:
    restored, left = restore(options)
    click.echo(f"{len(restored)} GPU(s) reset to default clocks")
    if left:
        raise UserError(f"still locked, reset them with nvidia-smi -rgc: {', '.join(left)}")
