"""The options of every command are a contract; after a wanted change run this file as a script."""

import json
from pathlib import Path

import typer.main

from moetools import cli

GOLDEN = Path(__file__).with_name("options.json")


def options() -> dict[str, list[str]]:
    """Arguments and options of every command, in the order of its help."""
    app = typer.main.get_command(cli.build_app())
    return {
        name: [" ".join(parameter.opts) for parameter in command.params]
        for name, command in sorted(app.commands.items())  # type: ignore[attr-defined]
    }


def test_options_are_the_documented_ones():
    assert options() == json.loads(GOLDEN.read_text(encoding="utf-8"))


if __name__ == "__main__":
    GOLDEN.write_text(json.dumps(options(), indent=1) + "\n", encoding="utf-8")
