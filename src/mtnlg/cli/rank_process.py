"""``python -m mtnlg.cli.rank_process SETTINGS``: a rank that ``generate``, ``chat`` or ``serve`` starts."""

from __future__ import annotations

import json
import sys
import warnings
from typing import Any


def main() -> int:
    """Be a rank until rank 0 ends; returns the exit code."""
    from mtnlg.cli.ranks import backend_of
    from mtnlg.parallel.companions import serve_as_companion

    warnings.simplefilter("ignore")  # rank 0 says the same
    device = json.loads(sys.argv[1])["settings"]["device"]
    return serve_as_companion(sys.argv[1], follow_model, backend_of(device))


def follow_model(settings: dict[str, Any]) -> None:
    """Hold this rank's share of the model and follow rank 0."""
    from mtnlg.cli.ranks import control_group, join_layout, open_with_adapter
    from mtnlg.generation.ranks import follow

    files, _ = open_with_adapter(settings["model"], settings["adapter"])
    share = join_layout(files, settings["tensor"], settings["pipeline"], settings["device"])
    follow(share, control_group(settings["device"]))


if __name__ == "__main__":
    sys.exit(main())
