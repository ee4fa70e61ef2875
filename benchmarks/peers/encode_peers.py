"""The other encoders of ``benchmarks/encode.py``, each a process: TOOL CORPUS TOKENIZER PREFIX."""

from __future__ import annotations

import json
import struct
import sys
from pathlib import Path


def classic(corpus: str, tokenizer_folder: str, prefix: str) -> None:
    """The recipe of Megatron-LM's preprocess_data.py with one worker and --append-eod."""
    import numpy as np
    import torch
    from megatron.core.datasets.indexed_dataset import IndexedDatasetBuilder
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(tokenizer_folder)
    builder = IndexedDatasetBuilder(f"{prefix}.bin", dtype=np.uint16)
    with open(corpus, encoding="utf-8") as lines:
        for line in lines:
            ids = tokenizer(json.loads(line)["text"])["input_ids"]
            if ids:
                ids.append(tokenizer.eos_token_id)
            builder.add_document(torch.tensor(ids, dtype=torch.int64), [len(ids)] if ids else [])
    builder.finalize(f"{prefix}.idx")


def gigatoken(corpus: str, tokenizer_folder: str, prefix: str) -> None:
    """The whole corpus at once with gigatoken, then a writer of its own."""
    import gigatoken as package
    import numpy as np

    tokenizer = package.Tokenizer(str(Path(tokenizer_folder) / "tokenizer.json"))
    with open(corpus, encoding="utf-8") as lines:
        rows = tokenizer.encode_batch([json.loads(line)["text"] for line in lines])
    import awkward

    lengths = awkward.to_numpy(awkward.num(rows)).astype(np.int64)
    ids = awkward.to_numpy(awkward.flatten(rows)).astype(np.uint16)
    ids = np.insert(ids, np.cumsum(lengths), 0)
    lengths += 1
    ids.tofile(f"{prefix}.bin")
    with open(f"{prefix}.idx", "wb") as index:
        index.write(struct.pack("<9sQBQQ", b"MMIDIDX\0\0", 1, 8, len(lengths), len(lengths) + 1))
        index.write(lengths.astype(np.int32).tobytes())
        index.write(((np.cumsum(lengths) - lengths) * 2).tobytes())
        index.write(np.arange(len(lengths) + 1, dtype=np.int64).tobytes())


if __name__ == "__main__":
    {"classic": classic, "gigatoken": gigatoken}[sys.argv[1]](*sys.argv[2:])
