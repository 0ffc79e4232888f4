"""Bad arguments are refused in one sentence; good ones are left as they were."""

from __future__ import annotations

import copy
import inspect
import re
from typing import Any

import pytest
import torch

from tests.conformance.cases import cases, wrong
from tests.conformance.toy import run
from tests.methods import METHODS, Method, build, find_class, use

# Rows that configure a class which another row has already.
FIRST = list({method.callbacks[0]["class_path"]: method for method in reversed(METHODS)}.values())[::-1]


def check_bad_arguments(method: Method, arguments: dict[str, Any], exception: type[Exception], blamed: str) -> None:
    cls = find_class(method.callbacks[0])
    try:
        cls(**{name: build(value) for name, value in arguments.items()})
    except exception as error:
        shape = rf"Expected (each of )?`{re.escape(blamed)}` to .+, but (got|one of them is) .+\."
        assert re.fullmatch(shape, str(error)), f"not the sentence: {error}"
    except Exception as error:
        raise AssertionError(f"{error!r} instead of {exception.__name__}") from error
    else:
        raise AssertionError(f"{cls.__name__} accepts {arguments}")


def check_unchanged_arguments(method: Method) -> None:
    """Neither making the callback nor a run changes what the caller passed."""
    spec = method.callbacks[0]
    arguments = {name: build(value) for name, value in spec.get("init_args", {}).items()}
    before = plain(arguments)
    callback = find_class(spec)(**arguments)
    assert plain(arguments) == before, "the constructor changed its arguments"
    run([callback, *map(build, method.callbacks[1:])], max_epochs=1)
    assert plain(arguments) == before, "the run changed the callback's arguments"


def plain(value: Any) -> Any:
    """``value`` in comparable form, with the attributes of modules."""
    if isinstance(value, torch.nn.Module):
        return type(value), {key: plain(item) for key, item in vars(value).items()}
    if isinstance(value, dict):
        return {key: plain(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return type(value), [plain(item) for item in value]
    return copy.deepcopy(value)


@pytest.mark.parametrize(
    ("method", "arguments", "exception", "blamed"),
    [pytest.param(method, *bad, id=f"{method.name}-{bad[0]}") for method in METHODS for bad in method.bad],
)
def test_bad_arguments(method: Method, arguments: dict[str, Any], exception: type[Exception], blamed: str) -> None:
    check_bad_arguments(method, arguments, exception, blamed)


@pytest.mark.parametrize("method", FIRST, ids=lambda m: m.name)
def test_every_argument_that_can_be_checked_has_a_bad_value(method: Method) -> None:
    names = set(inspect.signature(find_class(method.callbacks[0])).parameters) - {"input_key", "target_key"}
    assert names <= {name for arguments, *_ in method.bad for name in arguments}


@pytest.mark.parametrize("method", cases(METHODS))
def test_unchanged_arguments(method: Method) -> None:
    check_unchanged_arguments(method)


@pytest.mark.parametrize(
    ("name", "amount", "message"),
    [("AcceptsAll", 2, "accepts"), ("Mumbles", 2, "not the sentence"), ("Mumbles", "x", "instead of ValueError")],
)
def test_a_bad_argument_that_is_not_refused_right_is_flagged(name: str, amount: Any, message: str) -> None:
    with pytest.raises(AssertionError, match=message):
        check_bad_arguments(wrong(name), {"amount": amount}, ValueError, "amount")


@pytest.mark.parametrize(("name", "message"), [("Mutates", "the constructor"), ("MutatesLater", "the run")])
def test_changed_arguments_are_flagged(name: str, message: str) -> None:
    method = Method(name, [use(f"tests.conformance.wrong_methods.{name}", amounts=[1, 2])])
    with pytest.raises(AssertionError, match=f"{message} changed"):
        check_unchanged_arguments(method)
