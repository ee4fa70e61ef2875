"""What a position in the data means: the settings and files that decide every sample."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from mtnlg.config.errors import DataError
from mtnlg.tokens.token_corpus import TokenCorpus

Fingerprint = dict[str, Any]
VERSION = 1  # of the order of samples; raised when the same settings would give another order


def make_fingerprint(
    corpora: Sequence[TokenCorpus],
    weights: Sequence[float],
    split: str,
    shares: Sequence[float],
    sequence_length: int,
    seed: int,
) -> Fingerprint:
    """Plain values that decide the sequence of samples; unchanged by a trip through JSON."""
    return {
        "version": VERSION,
        "sequence_length": sequence_length,
        "seed": seed,
        "split": split,
        "shares": [float(share) for share in shares],
        "corpora": [
            {
                "path": corpus.prefix,
                "weight": float(weight),
                "documents": corpus.num_documents,
                "tokens": corpus.num_tokens,
                "digest": corpus.digest,
            }
            for corpus, weight in zip(corpora, weights)
        ],
    }


def check_fingerprint(saved: Any, current: Fingerprint) -> None:
    """Refuse data that differ from those ``saved`` speaks of. Moved files are the same data.

    Raises:
        DataError: naming everything that changed.
    """
    if not isinstance(saved, dict) or not isinstance(saved.get("corpora"), list):
        raise DataError("the saved position in the data cannot be read: it has no fingerprint of them.")
    changes = [
        f"{label} was {saved.get(field)} and is {current.get(field)}"
        for field, label in (
            ("version", "the order of samples (version of mtnlg)"),
            ("sequence_length", "data.sequence_length"),
            ("seed", "the seed"),
            ("split", "the split"),
            ("shares", "data.split (as shares)"),
            ("objective", "data.objective"),
        )
        if saved.get(field) != current.get(field)
    ]
    changes += _corpus_changes(saved["corpora"], current["corpora"])
    if changes:
        raise DataError(
            "the data are not those of the saved position: "
            + "; ".join(changes)
            + ". Give the run the data and settings it was started with, or start a new run."
        )


def _corpus_changes(saved: list[dict[str, Any]], current: list[dict[str, Any]]) -> list[str]:
    if len(saved) != len(current):
        return [f"the blend had {len(saved)} corpora and has {len(current)}"]
    changes = []
    for old, new in zip(saved, current):
        name = new["path"] if old.get("path") == new["path"] else f"{new['path']} (was {old.get('path')})"
        for field in ("documents", "tokens"):
            if old.get(field) != new[field]:
                changes.append(f"{name} had {old.get(field)} {field} and has {new[field]}")
        if old.get("digest") != new["digest"] and not any(name in change for change in changes):
            changes.append(f"the tokens of {name} changed")
        if old.get("weight") != new["weight"]:
            changes.append(f"the weight of {name} was {old.get('weight')} and is {new['weight']}")
    return changes
