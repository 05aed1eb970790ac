"""How two checkpoints differ, or the routing of two traces: which of both it is."""

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from moetools.errors import RequestError

if TYPE_CHECKING:
    from moetools.comparing import CheckpointDiff
    from moetools.paired_traces import TraceDiff

Kind = Literal["trace", "checkpoint"]


def diff(a: str | Path, b: str | Path, **options: Any) -> "TraceDiff | CheckpointDiff":
    """Compare two traces of the same texts, or two checkpoints, as `moetools diff` does.

    Args:
        a: The reference: a trace, or a checkpoint folder, hub id or `demo`.
        b: What is compared with it, of that kind.
        **options: Of `diff_traces` for traces; fields of `CompareOptions` for checkpoints.

    Raises:
        MoEToolsError: The input or the request is wrong.
    """
    if same_kind(str(a), str(b)) == "trace":
        from moetools.paired_traces import diff_traces

        return diff_traces(a, b, **options)
    from moetools.comparing import CompareOptions, diff_checkpoints

    data = options.pop("data", ())
    sources = (data,) if isinstance(data, str) else tuple(data)
    return diff_checkpoints(str(a), str(b), CompareOptions(data=sources, **options))


def same_kind(a: str, b: str) -> Kind:
    """Whether both are traces, or both something else, which opening will tell.

    Raises:
        RequestError: One is a trace and the other is not.
    """
    from moetools.checkpoint import HUB_ID

    traces = [name for name in (a, b) if is_trace(Path(name).expanduser())]
    if len(traces) == 1:
        other = b if traces[0] == a else a
        if (
            not Path(other).expanduser().exists()
            and other != "demo"
            and not HUB_ID.fullmatch(other)
        ):
            raise RequestError(f"{other}: no such folder.")
        raise RequestError(
            f"{traces[0]} is a trace and {other} is not. Compare two of a kind: trace {other} "
            "on the same texts first."
        )
    return "trace" if traces else "checkpoint"


def is_trace(path: Path) -> bool:
    """Whether a folder holds a trace, finished or not."""
    from moetools.trace_store import FORMAT, MANIFEST

    try:
        document = json.loads((path / MANIFEST).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return False
    return isinstance(document, dict) and document.get("format") == FORMAT
