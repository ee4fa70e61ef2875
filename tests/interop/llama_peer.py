"""llama.cpp's opinion of GGUF files; runs in an environment of its own, without mtnlg.

    python llama_peer.py < '[{"file": FILE, "prompts": ["..."], "ids": [[1]], "complete": [], "new": 8}]'

Prints for each task ``{"tokens": [ids of each prompt], "greedy": [ids after each row of ids], "logits":
[after each of these ids], "texts": [what completes each text], "template": the chat template}``. Without
``new`` only the vocabulary is loaded. Of an encoder-decoder, ``ids`` are what its encoder reads, and
``logits`` those that ``greedy`` was chosen from. ``{"file": FILE, "quantize": {NAME: number, ...}}`` writes
``FILE.NAME`` by llama.cpp's own quantizer instead.
"""

import ctypes
import json
import sys

import llama_cpp
import numpy as np
from llama_cpp import Llama


def answer(task):
    if "quantize" in task:
        return [
            quantize(task["file"], f"{task['file']}.{name}", kind)
            for name, kind in task["quantize"].items()
        ]
    vocab_only = not task.get("new")
    model = Llama(
        task["file"], n_ctx=task.get("context", 64), n_threads=1, n_threads_batch=1,
        logits_all=not vocab_only, type_k=0, type_v=0, flash_attn=False, vocab_only=vocab_only,
        verbose=False,
    )  # fmt: skip
    found = {"tokens": [], "greedy": [], "logits": [], "texts": []}
    for text in task.get("prompts", []):
        found["tokens"].append(model.tokenize(text.encode(), add_bos=False, special=False))
    for text in task.get("complete", []):
        completion = model.create_completion(text, max_tokens=task["new"], temperature=0.0)
        found["texts"].append(completion["choices"][0]["text"])
    has_encoder = not vocab_only and llama_cpp.llama_model_has_encoder(model.model)
    for ids in task.get("ids", []):
        greedy, logits = (write_answer if has_encoder else continue_ids)(model, ids, task["new"])
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


def write_answer(model, ids, new):
    """What the decoder writes when the encoder has read ``ids``, and the logits it was chosen from."""
    llama_cpp.llama_memory_clear(llama_cpp.llama_get_memory(model.ctx), True)
    tokens = (llama_cpp.llama_token * len(ids))(*ids)  # a batch does not keep them
    batch = llama_cpp.llama_batch_get_one(tokens, len(ids))
    assert llama_cpp.llama_encode(model.ctx, batch) == 0
    token = llama_cpp.llama_model_decoder_start_token(model.model)
    chosen, logits = [], []
    for _ in range(new):
        tokens = (llama_cpp.llama_token * 1)(token)
        batch = llama_cpp.llama_batch_get_one(tokens, 1)
        assert llama_cpp.llama_decode(model.ctx, batch) == 0
        row = np.ctypeslib.as_array(llama_cpp.llama_get_logits(model.ctx), (model.n_vocab(),))
        logits.append(row.tolist())
        token = int(row.argmax())
        chosen.append(token)
    return chosen, logits


def quantize(source, target, kind):
    """What llama.cpp's own quantizer makes of a file."""
    options = llama_cpp.llama_model_quantize_default_params()
    options.ftype, options.nthread = kind, 1
    done = llama_cpp.llama_model_quantize(source.encode(), target.encode(), ctypes.byref(options))
    assert done == 0, f"{source}: {done}"
    return target


print(json.dumps([answer(task) for task in json.load(sys.stdin)]))
