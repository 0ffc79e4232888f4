"""The command ``lightning-accel``. What a command needs beyond the package is imported when it runs."""

from __future__ import annotations

import sys
from collections.abc import Sequence

from lightning_accel.cli.usage import UsageError, suggest

__all__ = ["main"]

_LIGHTNING = ("fit", "validate", "test", "predict")
_COMMANDS = (*_LIGHTNING, "compare", "consolidate", "methods", "plan", "recipe")
_HELP = """usage: lightning-accel COMMAND [ARGUMENTS]

  fit, validate, test, predict   LightningCLI, where LowBitOptimizer is enough for lightning_accel.LowBitOptimizer;
                                 `fit --recipe NAME` appends a recipe's callbacks to yours
  compare                        run plain and accelerated side by side, and write the receipt
  consolidate                    write one plain file of a sharded checkpoint
  plan                           tell what a run needs on each device under each strategy, and which fit
  methods                        list every method, what it does and what it touches
  recipe                         list the recipes, or print one

`lightning-accel COMMAND --help` tells more. --version prints the version.
"""


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line.

    Args:
        argv: The arguments after the program's name; ``sys.argv`` by default.

    Returns:
        The exit status: 0; 1 where a run failed or a result could not be written; 2 for bad usage; 130 after Ctrl-C.
    """
    args = list(sys.argv[1:] if argv is None else argv)
    command, rest = (args[0], args[1:]) if args else ("--help", [])
    try:
        return _run(command, rest)
    except UsageError as error:
        print(f"lightning-accel: {error}", file=sys.stderr)
        return 2


def _run(command: str, args: list[str]) -> int:
    if command in ("-h", "--help"):
        print(_HELP, end="")
        return 0
    if command == "--version":
        from lightning_accel import __version__

        print(f"lightning-accel {__version__}")
        return 0
    if command == "recipe":
        from lightning_accel.cli.recipes import run_recipe

        return run_recipe(args)
    if command == "methods":
        from lightning_accel.cli.methods import run_methods

        return run_methods(args)
    if command == "plan":
        from lightning_accel.cli.plan import run_plan

        return run_plan(args)
    if command == "consolidate":
        from lightning_accel.cli.consolidate import run_consolidate

        return run_consolidate(args)
    if command == "compare":
        from lightning_accel.cli.compare import run_compare

        return run_compare(args)
    if command in _LIGHTNING:
        from lightning_accel.cli.lightning_commands import run_lightning

        return run_lightning(command, args)
    raise UsageError(f"There is no command {command!r}.{suggest(command, _COMMANDS)}")
