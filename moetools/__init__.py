"""Record, analyse and edit the routers of pretrained Mixture-of-Experts language models."""

import importlib
from importlib.metadata import version
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from moetools.reporting.report import report
    from moetools.tracing import trace

__all__ = ["__version__", "report", "trace"]

__version__ = version("moetools")

_VERBS = {"report": "moetools.reporting.report", "trace": "moetools.tracing"}
"""Where each verb of the library lives; imported on first use."""


def __getattr__(name: str) -> Any:
    if name in _VERBS:
        return getattr(importlib.import_module(_VERBS[name]), name)
    raise AttributeError(f"module '{__name__}' has no attribute '{name}'")
