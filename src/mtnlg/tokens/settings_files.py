"""What a tokenizer's folder says beside its ``tokenizer.json``."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from mtnlg.config.errors import DataError

CONFIG_NAME, SPECIAL_MAP_NAME = "tokenizer_config.json", "special_tokens_map.json"


def read_settings(folder: Path) -> dict[str, Any]:
    """The settings of both files, those of ``tokenizer_config.json`` where both have one.

    Raises:
        DataError: a file holds no JSON object.
        ValueError: it is no JSON or not UTF-8.
    """
    settings: dict[str, Any] = {}
    for name in (SPECIAL_MAP_NAME, CONFIG_NAME):
        file = folder / name
        if file.is_file():
            content = json.loads(file.read_text(encoding="utf-8"))
            if not isinstance(content, dict):
                raise DataError(f"{file} must hold one JSON object.")
            settings.update({key: value for key, value in content.items() if value is not None})
    return settings
