"""How long `moetools --help` takes as a whole process; target: under 0.5 s.

python tests/benchmarks/startup.py
"""

import statistics
import subprocess
import sys
import time

RUNS = 9


def seconds(command: list[str]) -> float:
    start = time.perf_counter()
    subprocess.run(command, check=True, capture_output=True)
    return time.perf_counter() - start


def main() -> None:
    program = [sys.executable, "-m", "moetools.cli", "--help"]
    empty = [sys.executable, "-c", "pass"]
    seconds(program)
    pairs = [(seconds(program), seconds(empty)) for _ in range(RUNS)]
    helps, empties = (statistics.median(column) for column in zip(*pairs, strict=True))
    print(f"moetools --help: {helps:.3f} s (target < 0.5 s), empty interpreter {empties:.3f} s,")
    print(f"ratio {helps / empties:.1f}; medians of {RUNS} runs")


if __name__ == "__main__":
    main()
