"""The public names and their signatures are those of ``public_api.txt``.

After a change that was meant: ``make api`` writes the file again. Look at its diff: each line that went or changed
breaks somebody's code.
"""

from __future__ import annotations

import importlib
import importlib.util
import inspect
import os
import re
from collections.abc import Iterator
from typing import Any

import pytest

from tests.conftest import REPO

MODULES = ["lightning_accel", "lightning_accel.augment", "lightning_accel.hooks", "lightning_accel.schedules"]
SNAPSHOT = REPO / "tests" / "public_api.txt"


def signature(thing: Any) -> str:
    """The signature as it is written in the source: annotations are text there, and print with quotes."""
    try:
        found = inspect.signature(thing)
    except ValueError:  # a class made by C: a warning, a tensor
        return ""
    for parameter in found.parameters.values():
        assert " at 0x" not in repr(parameter.default), f"{thing}: a default without a stable repr"
    text = re.sub(r"(: |-> )'([^']*)'", r"\1\2", re.sub(r'(: |-> )"([^"]*)"', r"\1\2", str(found)))
    return text.removesuffix(" -> None") if inspect.isclass(thing) else text


def members(cls: type) -> Iterator[str]:
    """The public attributes that the class adds to its public bases, overridden ones left out."""
    private = [base for base in cls.__mro__ if base is cls or base.__name__.startswith("_")]
    public = [base for base in cls.__mro__ if base not in private]
    inherited = {name for base in public for name in [*vars(base), *vars(base).get("__annotations__", ())]}
    for name in sorted({name for base in private for name in vars(base)} - inherited):
        if name.startswith("_"):
            continue
        member = inspect.getattr_static(cls, name)
        if isinstance(member, property):
            yield f"    {name} -> {inspect.signature(member.fget).return_annotation}"  # type: ignore[arg-type]
        elif isinstance(member, (staticmethod, classmethod)) or inspect.isfunction(member):
            yield f"    {name}{signature(getattr(cls, name))}"
        else:
            yield f"    {name}"


def describe() -> str:
    lines = []
    for module_name in MODULES:
        module = importlib.import_module(module_name)
        lines += ["", f"[{module_name}]"]
        for name in sorted(module.__all__):
            thing = getattr(module, name)
            if inspect.isclass(thing):
                bases = ", ".join(base.__name__ for base in thing.__bases__)
                lines += [f"class {name}{signature(thing)}: {bases}", *members(thing)]
            elif inspect.isroutine(thing):
                lines.append(f"{name}{signature(thing)}")
            else:
                lines.append(name)
    return "\n".join(lines).strip() + "\n"


def test_public_api_is_that_of_the_snapshot() -> None:
    now = describe()
    if os.environ.get("UPDATE_API"):
        SNAPSHOT.write_text(now)
    before = SNAPSHOT.read_text()
    if now != before:
        changed = sorted(set(now.splitlines()) ^ set(before.splitlines()))
        marked = [f"{'+' if line in now.splitlines() else '-'} {line.strip()}" for line in changed]
        pytest.fail(
            "The public API is not that of tests/public_api.txt. If that was meant, run `make api`, commit the file, "
            "and say it in CHANGELOG.md.\n" + "\n".join(marked),
            pytrace=False,
        )


@pytest.mark.parametrize("module_name", MODULES)
def test_every_public_name_is_there_and_documented(module_name: str) -> None:
    module = importlib.import_module(module_name)
    assert len(set(module.__all__)) == len(module.__all__)
    for name in module.__all__:
        thing = getattr(module, name)
        if inspect.isclass(thing) or inspect.isfunction(thing):
            assert inspect.getdoc(thing), f"{module_name}.{name} has no docstring"
    assert set(module.__all__) <= set(dir(module))


def test_the_flat_api_has_every_callback() -> None:
    import lightning_accel
    from lightning_accel.hooks import AccelCallback

    for path in (REPO / "lightning_accel").rglob("*.py"):
        if path.stem == "triton_kernels" and importlib.util.find_spec("triton") is None:
            continue
        importlib.import_module(".".join(path.relative_to(REPO).with_suffix("").parts).removesuffix(".__init__"))

    def below(cls: type) -> set[type]:
        return {cls}.union(*map(below, cls.__subclasses__()))

    # one without a contract is a base of others
    ours = {cls.__name__ for cls in below(AccelCallback) if cls.__module__.startswith("lightning_accel.")}
    complete = {cls.__name__ for cls in below(AccelCallback) if hasattr(cls, "contract")} & ours
    assert complete and complete <= set(lightning_accel.__all__)
