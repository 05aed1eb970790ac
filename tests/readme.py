"""Write the generated sections of the README: `python tests/readme.py [metrics] [families]`.

`metrics` are the docstrings of the analyses; `families` is the table that the conformance test
holds current. Each section lies between `<!-- begin NAME -->` and `<!-- end NAME -->`.
"""

import inspect
import re
import sys
from collections.abc import Callable
from pathlib import Path

from moetools import registry

README = Path(__file__).parents[1] / "README.md"


def metrics() -> str:
    """One subsection for each analysis."""
    parts = []
    for name in registry.names("analyses"):
        module = registry.load("analyses", name)
        analysis = module.ANALYSIS
        heading = f"### {analysis.title} (`{name}`)"
        parts.append(f"{heading}\n\nSource: {analysis.source}\n\n{inspect.getdoc(module)}")
    return "\n\n".join(parts)


def families() -> str:
    """The table of supported families; builds a tiny model of each."""
    import supported_families

    return supported_families.table().rstrip()


SECTIONS: dict[str, Callable[[], str]] = {"metrics": metrics, "families": families}


def bounds(text: str, name: str) -> tuple[int, int]:
    """Where a section begins and ends, between its marks."""
    found = re.search(rf"<!-- begin {name} -->\n\n(.*?)\n\n<!-- end {name} -->", text, re.DOTALL)
    assert found, f"README.md has no section {name}"
    return found.span(1)


def section(text: str, name: str) -> str:
    """What stands between the marks of a section."""
    begin, end = bounds(text, name)
    return text[begin:end]


def main() -> None:
    text = README.read_text(encoding="utf-8")
    for name in sys.argv[1:] or SECTIONS:
        begin, end = bounds(text, name)
        text = text[:begin] + SECTIONS[name]() + text[end:]
    README.write_text(text, encoding="utf-8")


if __name__ == "__main__":
    main()
