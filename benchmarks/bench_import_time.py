"""The time of `import lightning_accel` against that of `import lightning.pytorch`, each in a new process.

python benchmarks/bench_import_time.py [--quick]
"""

from __future__ import annotations

import argparse
import random
import resource
import subprocess
import sys

from _timing import compare, environment, table

SIDES = {
    "`import lightning.pytorch`": "import lightning.pytorch",
    "`import lightning_accel`, which imports Lightning": "import lightning_accel",
    "and every public name": "from lightning_accel import *",
}
OPTIONAL = ("bitsandbytes", "deepspeed", "kornia", "onnx", "optuna", "peft", "ray", "sklearn", "torchao")


def cpu_seconds(code: str) -> float:
    """CPU seconds of a process that runs ``code``, with those of starting Python."""
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    subprocess.run([sys.executable, "-W", "ignore", "-c", code], check=True)
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    return after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime


def main() -> None:
    """Print the table, and the optional packages that were imported: none."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--quick", action="store_true", help="one round, to see that it runs")
    rounds = 1 if parser.parse_args().quick else 5
    print(environment())
    seconds: dict[str, list[float]] = {name: [] for name in SIDES}
    for number in range(rounds + 1):
        for name in random.Random(number).sample(list(SIDES), k=len(SIDES)):
            used = cpu_seconds(SIDES[name])
            if number > 0:
                seconds[name].append(used)
    print(table("CPU time of a process", compare(seconds), unit=1.0, unit_name="s"))
    code = f"import sys; from lightning_accel import *; print([name for name in {OPTIONAL} if name in sys.modules])"
    done = subprocess.run([sys.executable, "-W", "ignore", "-c", code], check=True, capture_output=True, text=True)
    print(f"\nOptional packages that all public names import: {done.stdout.strip()}")


if __name__ == "__main__":
    main()
