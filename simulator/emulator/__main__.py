"""``python -m simulator.emulator``: one emulator process, controlled over HTTP (see ``adapters.control``)."""

import argparse

from energy.profile import ProfileError
from simulator.emulator.adapters.process import NodeOptions, ProcessOptions, run


def _node(text: str) -> NodeOptions:
    name, _, rest = text.partition("=")
    gpus, _, gpu = (rest or "8xH100-SXM").partition("x")
    if not name or not gpus.isdigit() or not gpu:
        raise argparse.ArgumentTypeError(f"{text!r} is not NAME=COUNTxGPU, as node-0=8xH100-SXM")
    return NodeOptions(name, gpu, int(gpus))


def main() -> None:
    """Parse the command line and serve."""
    parser = argparse.ArgumentParser(prog="python -m simulator.emulator", description=__doc__)
    parser.add_argument("--node", type=_node, action="append", help="NAME=COUNTxGPU, repeatable (node-0=8xH100-SXM)")
    parser.add_argument("--host", default="127.0.0.1")
    parser.add_argument("--control-port", type=int, default=0, help="0: any free port; it is printed")
    parser.add_argument("--shutdown-timeout", type=float, default=0.0, help="seconds for running requests on SIGTERM")
    parser.add_argument("--watch-stdin", action="store_true", help="end when standard input closes")
    given = parser.parse_args()
    nodes = given.node or [NodeOptions("node-0")]
    try:
        run(ProcessOptions(nodes, given.host, given.control_port, given.shutdown_timeout, given.watch_stdin))
    except (ProfileError, OSError) as error:
        parser.exit(2, f"emulator: {error}\n")


if __name__ == "__main__":
    main()
