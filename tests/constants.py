"""Other constants than the product's, for a gateway that a test starts as a process.

    LiveGateway(environment | constants({"gateway.execs.records.KEPT_SECONDS": 1.0}), log)

`monkeypatch.setattr("gateway.execs.records.KEPT_SECONDS", 1.0)` does the same in the test's own process. Both
reach only code that reads the constant in the module that has it.

As a program this module is `python -m gateway` with these constants.
"""

from __future__ import annotations

import importlib
import json
import os
from collections.abc import Mapping
from typing import Any, Final

VARIABLE: Final = "GATEWAY_TEST_CONSTANTS"


def constants(values: Mapping[str, Any]) -> dict[str, str]:
    """Return the environment variable that gives another process these constants, each by its full name."""
    for name in values:
        _find(name)
    return {VARIABLE: json.dumps(dict(values))}


def program(words: tuple[str, ...], environment: Mapping[str, str]) -> tuple[str, ...]:
    """Return the words that start `python … -m gateway` with the constants of an environment."""
    return (*words[:-1], __name__) if VARIABLE in environment and words[-1] == "gateway" else words


def apply(environment: Mapping[str, str] = os.environ) -> None:
    """Give this process the constants of its environment, if there are any."""
    for name, value in json.loads(environment.get(VARIABLE, "{}")).items():
        module, attribute = _find(name)
        setattr(module, attribute, value)


def _find(name: str) -> tuple[object, str]:
    module, _, attribute = name.rpartition(".")
    found = importlib.import_module(module)
    assert hasattr(found, attribute), f"there is no {name}"
    return found, attribute


if __name__ == "__main__":
    from gateway.__main__ import main

    apply()
    main()
