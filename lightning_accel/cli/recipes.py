"""``lightning-accel recipe``: ready sets of callbacks, and how ``--recipe`` adds them to a run."""

from __future__ import annotations

from importlib import resources
from pathlib import Path

from lightning_accel.cli.usage import UsageError, suggest

__all__ = ["recipe_names", "recipe_path", "recipe_summary", "run_recipe", "split_recipes"]

_HELP = """usage: lightning-accel recipe [NAME]

Print the recipe NAME, a YAML file that adds callbacks to a run; without NAME, list them all.
Add one to a run with `lightning-accel fit --config my.yaml --recipe NAME`.
"""


def _folder() -> Path:
    return Path(str(resources.files("lightning_accel") / "recipes"))


def recipe_names() -> list[str]:
    """Return the names of all recipes."""
    return sorted(path.stem for path in _folder().glob("*.yaml"))


def recipe_path(name: str) -> Path:
    """Return the file of a recipe.

    Raises:
        UsageError: If there is none of that name; it says which is nearest.
    """
    if name not in recipe_names():
        raise UsageError(f"There is no recipe {name!r}.{suggest(name, recipe_names())}")
    return _folder() / f"{name}.yaml"


def recipe_summary(name: str) -> str:
    """Return the first line of a recipe's comment: what it does."""
    return recipe_path(name).read_text(encoding="utf-8").splitlines()[0].lstrip("# ")


def split_recipes(args: list[str]) -> tuple[list[str], list[str]]:
    """Take every ``--recipe NAME`` out of ``args``.

    Returns:
        The other arguments, and the paths of the recipes in the order given.

    Raises:
        UsageError: If a name is missing or unknown.
    """
    rest, paths = [], []
    remaining = iter(args)
    for argument in remaining:
        if argument == "--recipe":
            name = next(remaining, "")
            if not name or name.startswith("-"):
                raise UsageError(f"Expected a name after --recipe.{suggest(name, recipe_names())}")
            paths.append(str(recipe_path(name)))
        elif argument.startswith("--recipe="):
            paths.append(str(recipe_path(argument.removeprefix("--recipe="))))
        else:
            rest.append(argument)
    return rest, paths


def run_recipe(args: list[str]) -> int:
    """Print one recipe, or the list of all; return the exit status."""
    if "-h" in args or "--help" in args:
        print(_HELP, end="")
    elif not args:
        width = max(map(len, recipe_names()), default=0)
        for name in recipe_names():
            print(f"{name:{width}}  {recipe_summary(name)}")
    elif len(args) > 1:
        raise UsageError(f"Expected one recipe, but got {' '.join(args)}.")
    else:
        print(recipe_path(args[0]).read_text(encoding="utf-8"), end="")
    return 0
