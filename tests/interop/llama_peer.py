"""llama.cpp's opinion of GGUF files; runs in an environment of its own, without mtnlg.

    python llama_peer.py < '[{"file": FILE, "prompts": ["..."], "ids": [[1]], "complete": [], "new": 8}]'

Prints for each task ``{"tokens": [ids of each prompt], "greedy": [ids after each row of ids], "logits":
[after each of these ids], "texts": [what completes each text], "template": the chat template}``. Without
``new`` only the vocabulary is loaded.
"""

import json
import sys

import numpy as np
from llama_cpp import Llama


def answer(task):
    vocab_only = not task.get("new")
    model = Llama(
        task["file"], n_ctx=256, n_threads=1, n_threads_batch=1, logits_all=not vocab_only,
        type_k=0, type_v=0, flash_attn=False, vocab_only=vocab_only, verbose=False,
    )  # fmt: skip
    found = {"tokens": [], "greedy": [], "logits": [], "texts": []}
    for text in task.get("prompts", []):
        found["tokens"].append(model.tokenize(text.encode(), add_bos=False, special=False))
    for text in task.get("complete", []):
        completion = model.create_completion(text, max_tokens=task["new"], temperature=0.0)
        found["texts"].append(completion["choices"][0]["text"])
    for ids in task.get("ids", []):
        greedy, logits = continue_ids(model, ids, task["new"])
        found["greedy"].append(greedy)
        found["logits"].append(logits)
    found["template"] = model.metadata.get("tokenizer.chat_template")
    return found


def continue_ids(model, ids, new):
    """The most likely tokens after ``ids``, and the logits after each of ``ids``."""
    model.reset()
    model.eval(ids)
    first = np.array(model.scores[: len(ids)]).tolist()
    chosen = []
    for _ in range(new):
        chosen.append(int(np.argmax(model.scores[model.n_tokens - 1])))
        model.eval(chosen[-1:])
    return chosen, first


print(json.dumps([answer(task) for task in json.load(sys.stdin)]))
