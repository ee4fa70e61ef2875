"""llama.cpp through llama-cpp-python's low-level functions; runs in that project's own environment.

    python generate_llama.py convert weights.npz model.gguf bf16
    python generate_llama.py serve model.gguf 2

``serve`` answers each line ``{"prompts": [[ids]], "new": count}`` of its input with one line:
``{"seconds": s, "first_seconds": s, "ids": [[ids]]}``.
"""

import ctypes
import json
import os
import sys
import time

import numpy as np

CONTEXT = 512  # tokens of each sequence


def convert(source: str, target: str, precision: str) -> None:
    """GPT-2's weights by their Hugging Face names → GGUF."""
    import gguf

    kinds = {"float32": "F32", "bf16": "BF16", "q8_0": "Q8_0", "q4_0": "Q4_0"}
    kind = gguf.GGMLQuantizationType[kinds[precision]]
    weights = np.load(source)
    layers = 1 + max(int(name.split(".")[2]) for name in weights if ".h." in name)
    vocabulary, hidden = weights["transformer.wte.weight"].shape
    writer = gguf.GGUFWriter(target, "gpt2")
    writer.add_context_length(weights["transformer.wpe.weight"].shape[0])
    writer.add_embedding_length(hidden)
    writer.add_block_count(layers)
    writer.add_feed_forward_length(4 * hidden)
    writer.add_head_count(hidden // 64)
    writer.add_layer_norm_eps(1e-5)
    writer.add_vocab_size(vocabulary)
    writer.add_tokenizer_model("no_vocab")
    for name, tensor in tensors(weights, layers):
        if tensor.ndim == 2 and name != "position_embd.weight":
            writer.add_tensor(name, gguf.quants.quantize(tensor, kind), raw_dtype=kind)
        else:
            writer.add_tensor(name, tensor)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def tensors(weights, layers):
    """(GGUF's name, tensor) of everything; matrices as [out, in]."""
    ends = {"wte.weight": "token_embd.weight", "wpe.weight": "position_embd.weight"}
    ends |= {"ln_f.weight": "output_norm.weight", "ln_f.bias": "output_norm.bias"}
    for old, new in ends.items():
        yield new, weights[f"transformer.{old}"]
    names = {
        "ln_1": "attn_norm",
        "ln_2": "ffn_norm",
        "attn.c_attn": "attn_qkv",
        "attn.c_proj": "attn_output",
        "mlp.c_fc": "ffn_up",
        "mlp.c_proj": "ffn_down",
    }
    for layer in range(layers):
        for old, new in names.items():
            for part in ("weight", "bias"):
                tensor = weights[f"transformer.h.{layer}.{old}.{part}"]
                yield f"blk.{layer}.{new}.{part}", np.ascontiguousarray(tensor.T)


def serve(path: str, threads: int) -> None:
    import llama_cpp as llama

    llama.llama_backend_init()
    model = llama.llama_model_load_from_file(path.encode(), llama.llama_model_default_params())
    vocabulary = llama.llama_vocab_n_tokens(llama.llama_model_get_vocab(model))
    contexts = {}
    answers.write(json.dumps({"ready": llama.__version__}) + "\n")
    answers.flush()
    for line in sys.stdin:
        task = json.loads(line)
        count = len(task["prompts"])
        if count not in contexts:
            settings = llama.llama_context_default_params()
            settings.n_ctx, settings.n_seq_max = CONTEXT * count, count
            settings.n_batch = settings.n_ubatch = 2048
            settings.n_threads = settings.n_threads_batch = threads
            contexts[count] = llama.llama_init_from_model(model, settings)
        print(json.dumps(run(llama, contexts[count], vocabulary, **task)), file=answers, flush=True)


def run(llama, context, vocabulary, prompts, new):
    """All prompts as sequences of one batch, greedy."""
    llama.llama_memory_clear(llama.llama_get_memory(context), True)
    batch = llama.llama_batch_init(sum(map(len, prompts)), 0, 1)
    began = time.perf_counter()
    entries, last = [], []
    for sequence, prompt in enumerate(prompts):
        entries += [
            (token, place, sequence, place == len(prompt) - 1) for place, token in enumerate(prompt)
        ]
        last.append(len(entries) - 1)
    ids = [[] for _ in prompts]
    first = 0.0
    for step in range(new):
        fill(batch, entries)
        if llama.llama_decode(context, batch):
            raise RuntimeError("llama_decode failed")
        for sequence, place in enumerate(last):
            logits = llama.llama_get_logits_ith(context, place)
            numbers = np.ctypeslib.as_array(
                ctypes.cast(logits, ctypes.POINTER(ctypes.c_float)), (vocabulary,)
            )
            ids[sequence].append(int(numbers.argmax()))
        first = first or time.perf_counter() - began
        entries = [
            (own[-1], len(prompt) + step, sequence, True)
            for sequence, (own, prompt) in enumerate(zip(ids, prompts))
        ]
        last = list(range(len(prompts)))
    seconds = time.perf_counter() - began
    llama.llama_batch_free(batch)
    return {"seconds": seconds, "first_seconds": first, "ids": ids}


def fill(batch, entries) -> None:
    batch.n_tokens = len(entries)
    for index, (token, place, sequence, wanted) in enumerate(entries):
        batch.token[index], batch.pos[index] = token, place
        batch.n_seq_id[index], batch.seq_id[index][0] = 1, sequence
        batch.logits[index] = wanted


if __name__ == "__main__":
    # What llama.cpp prints itself must not come between the answers.
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    if sys.argv[1] == "convert":
        convert(*sys.argv[2:])
    else:
        serve(sys.argv[2], int(sys.argv[3]))
