"""``lightning-accel plan``: what a configuration needs on each device under each strategy, without running it."""

from __future__ import annotations

import argparse
import json
import re
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lightning_accel.cli.usage import UsageError
from lightning_accel.errors import parse_bytes

if TYPE_CHECKING:
    from rich.console import Console

    from lightning_accel.tuning.plan import Plan

__all__ = ["parse_input", "parse_memory", "run_plan"]

_EPILOG = """\
Nothing is trained and no weights are made: the module is built on the meta device, and takes one step that computes
nothing. The batch is the first one of the configuration's data, whose prepare_data is not called; --input gives its
shapes instead, and the data is then not touched. What follows a lone -- goes to the configuration:
`-- --model.init_args.width=512`. The exit status is 0 where a strategy fits, 1 where none does, 2 for bad arguments.
"""


def make_parser() -> argparse.ArgumentParser:
    """Return the parser of the command's arguments."""
    parser = argparse.ArgumentParser(
        prog="lightning-accel plan",
        description="Tell what a configuration needs on each device under each strategy, and the cheapest that fits.",
        epilog=_EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add = parser.add_argument
    add("--config", action="append", required=True, metavar="YAML", help="as of `lightning-accel fit`; may be repeated")
    add("--devices", type=int, required=True, metavar="N", help="devices in one machine")
    add("--device-memory", required=True, metavar="SIZE", help="memory of a device: 80GiB, 24GB")
    add("--nodes", type=int, default=1, metavar="N", help="machines (default: 1)")
    add("--batch-size", type=int, default=0, metavar="N", help="micro-batch of a device (default: as the batch has it)")
    add(
        "--input",
        action="append",
        default=[],
        metavar="SHAPE",
        help="a tensor of the batch: 8x1024:int64, or tokens=8x1024:int64 for a batch that is a dict; may be repeated",
    )
    add("--states-only", action="store_true", help="leave the activations out; needs no batch")
    add("--headroom", type=float, default=0.1, metavar="F", help="fraction of the memory to leave free (default: 0.1)")
    add("--json", metavar="FILE", help="write all numbers there; - prints them and nothing else")
    return parser


def parse_memory(text: str) -> int:
    """Return the bytes of a size such as "80GiB".

    Raises:
        UsageError: If the unit is missing or unknown, or the size is not above 0.
    """
    if (size := parse_bytes(text)) is None:
        raise UsageError(f"Expected --device-memory to be like 80GiB or 24GB, but got {text!r}.")
    return size


def parse_input(texts: list[str]) -> Any:
    """Return the batch, on the meta device, that ``--input`` describes: a tensor, a tuple of them, or a dict.

    Raises:
        UsageError: If a shape or a type is wrong, or only some have names.
    """
    import torch

    tensors: list[tuple[str, torch.Tensor]] = []
    for text in texts:
        found = re.fullmatch(r"(?:(\w+)=)?(\d+(?:x\d+)*)(?::(\w+))?", text)
        dtype = getattr(torch, found[3] or "float32", None) if found else None
        if not found or not isinstance(dtype, torch.dtype):
            raise UsageError(f"Expected --input to be like 8x1024:int64 or 8x3x224x224, but got {text!r}.")
        shape = [int(part) for part in found[2].split("x")]
        tensors.append((found[1] or "", torch.empty(shape, dtype=dtype, device="meta")))
    named = [name for name, _ in tensors if name]
    if named and len(set(named)) < len(tensors):
        raise UsageError("Expected each --input to have a name of its own, or none to have one.")
    if named:
        return dict(tensors)
    return tensors[0][1] if len(tensors) == 1 else tuple(tensor for _, tensor in tensors)


def run_plan(argv: list[str]) -> int:
    """Print the plan; return the exit status: 0 where a strategy fits, 1 where none does.

    Raises:
        UsageError: If an argument is wrong, or the configuration can't be planned.
    """
    own, extra = argv, []
    if "--" in argv:
        split = argv.index("--")
        own, extra = argv[:split], argv[split + 1 :]
    options = make_parser().parse_args(own)
    for name in ("devices", "nodes"):
        if getattr(options, name) < 1:
            raise UsageError(f"Expected --{name} to be at least 1, but got {getattr(options, name)}.")
    if options.batch_size < 0:
        raise UsageError(f"Expected --batch-size to be at least 1, but got {options.batch_size}.")
    if not 0 <= options.headroom < 1:
        raise UsageError(f"Expected --headroom to be in [0, 1), but got {options.headroom}.")
    memory = parse_memory(options.device_memory)
    for path in options.config:
        if not Path(path).is_file():
            raise UsageError(f"There is no configuration file {path}.")

    from lightning_accel.cli.plan_config import plan_config
    from lightning_accel.cli.terminal import make_console

    batch = parse_input(options.input) if options.input else None
    console = make_console()
    status = console.status if options.json != "-" else _silent
    with status("Building the module on the meta device") as shown:
        plan = plan_config(options, extra, memory, batch, shown.update)
    if options.json == "-":
        print(json.dumps(plan.to_dict(), indent=1))
    else:
        show_plan(plan, console)
        if options.json:
            try:
                Path(options.json).write_text(json.dumps(plan.to_dict(), indent=1) + "\n", encoding="utf-8")
            except OSError as error:
                raise UsageError(f"Could not write {options.json}: {error.strerror or error}.") from None
    return 0 if plan.choice else 1


class _silent:  # stands for the function `console.status`
    def __init__(self, _: str) -> None: ...

    def __enter__(self) -> _silent:
        return self

    def __exit__(self, *_: object) -> None: ...

    def update(self, _: str) -> None:
        """Show nothing."""


def show_plan(plan: Plan, console: Console) -> None:
    """Print the table, the choice as YAML, or what is missing."""
    import yaml
    from rich.markup import escape
    from rich.table import Table

    from lightning_accel.report.text import format_number
    from lightning_accel.tuning.memory import STRATEGIES

    def size(value: int) -> str:
        return format_number(value, "bytes") if value else "-"

    numbers = plan.to_dict()
    world = plan.world
    table = Table(
        title=f"{numbers['parameters']:,} parameters ({numbers['trainable']:,} trained), {plan.precision}, "
        f"{world} device{'s' * (world > 1)} of {size(plan.device_memory)}"
        + (f", micro-batch of {plan.batch_size}" if plan.batch_size else ""),
        title_justify="left",
        header_style="bold",
        caption="Of one device. Total: the most at a time, which may be less than the sum.",
        caption_justify="left",
    )
    titles = ("Strategy", "Parameters", "Gradients", "State", "Master", "Activations", "Buffers", "Working", "Total")
    table.add_column(titles[0], no_wrap=True)
    for title in (*titles[1:], "Main memory"):
        table.add_column(title, justify="right")
    table.add_column("Fits")
    for usage in plan.usages:
        cells = (usage.parameters, usage.gradients, usage.state, usage.master, usage.activations, usage.buffers)
        fits = f"[yellow]{escape(usage.refusal)}[/]" if usage.refusal else "[red]no[/]"
        if plan.fits(usage):
            fits = "[bold green]yes, cheapest[/]" if usage is plan.choice else "[green]yes[/]"
        row = [*map(size, (*cells, usage.working, usage.total, usage.host)), fits]
        table.add_row(STRATEGIES[usage.strategy], *row, style="bold" if usage is plan.choice else "")
    console.print(table)
    for note in plan.notes:
        console.print(f"[yellow]Note:[/] {escape(note)}")
    if plan.choice:
        limit = f"{size(plan.choice.total)} of {size(plan.device_memory)} a device"
        console.print(f"\n[bold]{STRATEGIES[plan.choice.strategy]}[/] is the cheapest that fits: {limit}.\n")
        console.print(yaml.safe_dump({"trainer": plan.trainer_settings()}, sort_keys=False), markup=False)
        return
    least = plan.smallest
    console.print(
        f"\n[bold red]Nothing fits.[/] {STRATEGIES[least.strategy]} needs least, {size(least.total)} a device, which "
        f"is {size(plan.missing)} more than the {size(plan.available)} that may be filled. What would help:"
    )
    for advice in plan.advice():
        verdict = "[green]fits[/]" if advice.enough else f"{size(advice.total - plan.available)} too much"
        where = f"{size(advice.total)} under {STRATEGIES[advice.strategy]}"
        console.print(f"- {escape(advice.text)}: {where}, {verdict}")
