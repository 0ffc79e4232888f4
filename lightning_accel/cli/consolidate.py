"""``lightning-accel consolidate``: one plain file of a sharded checkpoint."""

from __future__ import annotations

import sys
import time
from pathlib import Path

from lightning_accel.cli.usage import UsageError, suggest

__all__ = ["run_consolidate"]

_HELP = """usage: lightning-accel consolidate CKPT OUT [--overwrite] [--no-optimizer]

Write one plain file of a sharded checkpoint, without its module and on one machine.

  CKPT            a directory that a ModelCheckpoint wrote under accel_zero1, 2, 3, accel_fsdp2, or Lightning's own
                  deepspeed and FSDP2 strategies; or a plain checkpoint
  OUT             x.ckpt: a Lightning checkpoint, for load_from_checkpoint, and for Trainer.fit under any strategy
                  x.safetensors: the module's weights and buffers alone
  --overwrite     replace OUT where it is there
  --no-optimizer  leave the optimizer's state out of a .ckpt
"""
_OPTIONS = ("--overwrite", "--no-optimizer")


def run_consolidate(args: list[str]) -> int:
    """Write the file, and say what was made; return the exit status."""
    if not args or "-h" in args or "--help" in args:
        print(_HELP, end="")
        return 0 if args else 2
    for option in args:
        if option.startswith("-") and option not in _OPTIONS:
            raise UsageError(f"`lightning-accel consolidate` has no option {option!r}.{suggest(option, _OPTIONS)}")
    paths = [Path(argument) for argument in args if argument not in _OPTIONS]
    if len(paths) != 2:
        raise UsageError(f"`lightning-accel consolidate` takes CKPT and OUT, but got {len(paths)} path(s).")

    from lightning_accel.hooks.atomic import CheckpointError
    from lightning_accel.strategies.consolidate import consolidate_checkpoint

    begun = time.monotonic()
    try:
        made = consolidate_checkpoint(*paths, overwrite="--overwrite" in args, optimizer="--no-optimizer" not in args)
    except ValueError as error:
        raise UsageError(str(error)) from error
    except (CheckpointError, ImportError, OSError) as error:
        if isinstance(error, FileExistsError) and error.errno is None:  # OUT, and not a file in the way of a directory
            raise UsageError(f"{error} Give another name, or --overwrite.") from error
        print(f"lightning-accel: {error}", file=sys.stderr)
        return 1
    for note in made.notes:
        print(note, file=sys.stderr)
    seconds = time.monotonic() - begun
    print(f"{paths[1]}: {made.tensors} tensors, {made.bytes / 1e6:,.1f} MB, in {seconds:.1f} s, of a {made.kind}")
    return 0
