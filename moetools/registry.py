"""What a folder of plug-in files offers, by file name: commands and analyses."""

import difflib
import importlib
import pkgutil
from collections.abc import Iterable
from types import ModuleType

from moetools.errors import RequestError


def names(package: str) -> tuple[str, ...]:
    """Names of the files of `moetools.<package>`, sorted; nothing but the package is imported."""
    folder = importlib.import_module(f"moetools.{package}")
    return tuple(sorted(module.name for module in pkgutil.iter_modules(folder.__path__)))


def load(package: str, name: str) -> ModuleType:
    """Import `moetools.<package>.<name>`.

    Raises:
        RequestError: No such file; the message lists the known names.
    """
    known = names(package)
    if name not in known:
        raise RequestError(unknown(package, name, known))
    return importlib.import_module(f"moetools.{package}.{name}")


def unknown(what: str, name: str, known: Iterable[str]) -> str:
    """A message for a name that nothing answers to, with the nearest known one."""
    known = sorted(known)
    close = difflib.get_close_matches(name, known, n=1)
    hint = f" Did you mean '{close[0]}'?" if close else ""
    return f"Nothing named '{name}' in {what}.{hint} Known: {', '.join(known)}"
