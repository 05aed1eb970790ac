"""The `moetools` command: one subcommand per file of `commands/`, errors as single lines."""

import errno
import functools
import inspect
import os
import sys
import traceback
from collections.abc import Callable, Sequence
from typing import Annotated, Any

import typer

from moetools import console, registry
from moetools.errors import MachineError, MoEToolsError

EXIT_BUG = 1
EXIT_USAGE = 2
EXIT_INTERRUPTED = 130

DebugOption = Annotated[bool, typer.Option("--debug", help="Show the traceback of an error.")]
QuietOption = Annotated[bool, typer.Option("--quiet", help="No progress, only results and errors.")]


def _with_common_options(command: Callable[..., None]) -> Callable[..., None]:
    """Give a command `--debug` and `--quiet`, which no command needs to know about."""

    @functools.wraps(command)
    def run(*args: Any, debug: bool, quiet: bool, **kwargs: Any) -> None:
        console.settings.debug, console.settings.quiet = debug, quiet
        console.settings.resume_hint = None
        console.setup_logging()
        command(*args, **kwargs)

    signature = inspect.signature(command)
    common = [
        inspect.Parameter(name, inspect.Parameter.KEYWORD_ONLY, default=False, annotation=option)
        for name, option in (("debug", DebugOption), ("quiet", QuietOption))
    ]
    parameters = [*signature.parameters.values(), *common]
    run.__signature__ = signature.replace(parameters=parameters)  # type: ignore[attr-defined]
    run.__annotations__ = {p.name: p.annotation for p in parameters} | {"return": None}
    return run


def _show_version(wanted: bool) -> None:
    if wanted:
        from moetools import __version__

        print(f"moetools {__version__}")
        raise typer.Exit


def _root(
    version: Annotated[
        bool,
        typer.Option("--version", callback=_show_version, is_eager=True, help="Print the version."),
    ] = False,
) -> None:
    """Record and analyse the routers of Mixture-of-Experts language models."""


def build_app() -> typer.Typer:
    """The typer application with every command of the `commands` folder."""
    app = typer.Typer(no_args_is_help=True, add_completion=False, pretty_exceptions_enable=False)
    app.callback()(_root)
    for name in registry.names("commands"):
        command = getattr(registry.load("commands", name), name)
        app.command(name.replace("_", "-"))(_with_common_options(command))
    return app


def run(arguments: Sequence[str] | None = None) -> int:
    """Run the command line and return its exit code.

    Returns:
        0 done; 2 the input or the request is wrong; 1 a bug, or the machine failed;
        3 a difference, where a command was asked for that; 130 interrupted.
    """
    arguments = list(sys.argv[1:] if arguments is None else arguments) or ["--help"]
    # Threads that spin while they wait make two of them crawl on a busy machine.
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    try:
        code = build_app()(args=arguments, standalone_mode=False, prog_name="moetools")
    except KeyboardInterrupt:
        code = EXIT_INTERRUPTED
    except MoEToolsError as error:
        return _failed(str(error), error.exit_code)
    except (MemoryError, OSError) as error:
        return _machine_failed(error)
    except Exception as error:
        usage_message = getattr(error, "format_message", None)  # its class differs by typer release
        if usage_message:
            command = "" if arguments[0].startswith("-") else f"{arguments[0]} "
            return _failed(f"{usage_message()} See: moetools {command}--help", EXIT_USAGE)
        if type(error).__name__ == "OutOfMemoryError":
            return _machine_failed(error)
        return _failed(f"Unexpected {type(error).__name__}: {error}", EXIT_BUG)
    if code == EXIT_INTERRUPTED:
        return _interrupted()
    return code if isinstance(code, int) else 0


def _interrupted() -> int:
    hint = f" {console.settings.resume_hint}" if console.settings.resume_hint else ""
    print(f"Interrupted.{hint}", file=sys.stderr)
    return EXIT_INTERRUPTED


def _machine_failed(error: BaseException) -> int:
    if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT):
        where = f" while writing {error.filename}" if error.filename else ""
        hint = f" {console.settings.resume_hint}" if console.settings.resume_hint else ""
        return _failed(f"The disk is full{where}. Free some space.{hint}", MachineError.exit_code)
    if isinstance(error, OSError):
        return _failed(str(error), MachineError.exit_code)
    return _failed(
        f"Out of memory: {error}. Try a smaller --batch-tokens or another --device.",
        MachineError.exit_code,
    )


def _failed(message: str, code: int) -> int:
    if console.settings.debug:
        traceback.print_exc()
    line = " ".join(message.split())
    print(f"Error: {line}", file=sys.stderr)
    return code


def main() -> None:
    """Entry point of the `moetools` script."""
    sys.exit(run())


if __name__ == "__main__":
    main()
