"""What the parity matrix compares, topic by topic.

Each module here has two lists of :class:`tests.parallel.parity.Case`: ``SLICE``, a few that every test
run takes, and ``CASES``, the rest of the matrix; it may have a third, ``COMPILED``, which takes longer. A
new module is found by being here.
"""

from __future__ import annotations

import importlib
import pkgutil

from tests.parallel.parity import Case


def topics() -> list[str]:
    """The names of the modules."""
    return sorted(module.name for module in pkgutil.iter_modules(__path__))


def cases_of(topic: str, whole: bool = False, compiled: bool = False) -> list[Case]:
    """The slice of a topic or more of its cases, each once; few ranks come first.

    Cases of as many ranks stand together, so that ranks are started once for all of them.
    """
    module = importlib.import_module(f"{__name__}.{topic}")
    cases = [
        *module.SLICE,
        *(module.CASES if whole else []),
        *(getattr(module, "COMPILED", []) if compiled else []),
    ]
    return sorted({case.name: case for case in cases}.values(), key=lambda case: case.size)
