"""``dynamollm reload``: have a running gateway follow its configuration file as it is now."""

import json

import click

from dynamollm.adapters.admin_client import fetch


@click.command()
@click.option("--url", default="http://127.0.0.1:8080", show_default=True, help="Base URL of the gateway.")
@click.option("--api-key", envvar="OPENAI_API_KEY", show_envvar=True, help="Bearer key of the gateway.")
def command(url: str, api_key: str | None) -> None:
    """Follow the configuration file as it is now: policy, settings of the controller, profiles; nothing is lost.

    What needs a restart is refused by name, and then nothing has changed. SIGHUP does the same.
    """
    changed = json.loads(fetch(url, "reload", api_key, "POST"))["changed"]
    click.echo(f"changed: {', '.join(changed) or 'nothing'}")
