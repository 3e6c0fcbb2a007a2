"""What `import linattn` costs beyond `import torch`.

    python benchmarks/import_time.py [--runs 20]

Each run is a fresh interpreter that imports torch first and then times the import of linattn. The result goes to
benchmarks/results/import_time.json. The claim: a median under 0.2 s.
"""

from __future__ import annotations

import argparse
import statistics
import subprocess
import sys

from _common import RESULTS, ROOT, write_results

RESULT = RESULTS / "import_time.json"
LIMIT_S = 0.2
PROBE = """
import time, torch
start = time.perf_counter()
import linattn
print(time.perf_counter() - start)
"""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--runs", type=int, default=20, help="fresh interpreters to time (default 20)")
    runs = parser.parse_args().runs

    seconds = []
    for _ in range(runs + 1):
        probe = subprocess.run([sys.executable, "-c", PROBE], capture_output=True, text=True, check=True, cwd=ROOT)
        seconds.append(float(probe.stdout))
    seconds = seconds[1:]  # the first run may compile bytecode

    median = statistics.median(seconds)
    result = {
        "what": "seconds that `import linattn` takes in a fresh interpreter that has imported torch",
        "claims": {"import_time": {"claim": f"the median is below {LIMIT_S} s", "holds": median < LIMIT_S}},
        "runs": runs,
        "median_s": median,
        "min_s": min(seconds),
        "max_s": max(seconds),
    }
    write_results(RESULT, result)
    print(RESULT.read_text())


if __name__ == "__main__":
    main()
