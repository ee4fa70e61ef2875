"""Greedy generation by this project, transformers and CTranslate2, one process each.

python generate_here.py mtnlg folder bf16 2
"""

import json
import os
import sys
import time

# (weights, activations)
FEW_BITS = {
    "int8": ("int8", "int8"),
    "int4": ("int4", "int8"),
    "int8w": ("int8", "float"),
    "int4w": ("int4", "float"),
}


def mtnlg(folder: str, precision: str):
    """Through the engine, as ``model.generate`` and the server use it."""
    from mtnlg import MegatronLmModel, __version__
    from mtnlg.config.generation import EngineConfig
    from mtnlg.generation import Engine, GenerationRequest

    quantize = None
    if precision in FEW_BITS:  # 4 bits for the head too, as the peers have it
        weights, activations = FEW_BITS[precision]
        quantize, precision = dict(weights=weights, activations=activations, head="same"), "bf16"
    model = MegatronLmModel.from_pretrained(folder, quantize=quantize).eval()
    config = EngineConfig(dtype=precision, compile="on", prefix_cache=False, prefill_chunk=2048)
    engine = Engine(model, config=config)

    def run(prompts, new):
        asked = [engine.submit(GenerationRequest(prompt, max_new_tokens=new)) for prompt in prompts]
        done = [generation.result() for generation in asked]
        return [generation.new_ids for generation in done], max(g.usage.first_token_seconds for g in done)

    return run, __version__


def transformers(folder: str, precision: str):
    """``generate`` with its own settings."""
    import torch
    import transformers as hugging_face

    dtype = {"float32": torch.float32, "bf16": torch.bfloat16}[precision]
    model = hugging_face.AutoModelForCausalLM.from_pretrained(folder, dtype=dtype).eval()

    @torch.inference_mode()
    def run(prompts, new):
        ids = torch.tensor(prompts)
        options = dict(max_new_tokens=new, min_new_tokens=new, do_sample=False, pad_token_id=0)
        found = model.generate(ids, attention_mask=torch.ones_like(ids), **options)
        return found[:, ids.shape[1] :].tolist(), None

    return run, hugging_face.__version__


def ctranslate2(folder: str, precision: str):
    """``generate_batch`` of a converted model."""
    import ctranslate2 as ct2

    target = f"{folder}-ct2-{precision}"
    if not os.path.isdir(target):
        converter = ct2.converters.TransformersConverter(folder)
        converter.convert(target, quantization=precision)
    threads = int(os.environ["OMP_NUM_THREADS"])
    generator = ct2.Generator(target, compute_type=precision, inter_threads=1, intra_threads=threads)

    def run(prompts, new):
        texts = [[f"t{token}" for token in prompt] for prompt in prompts]
        done = generator.generate_batch(
            texts, max_length=new, min_length=new, include_prompt_in_result=False, sampling_topk=1
        )
        return [result.sequences_ids[0] for result in done], None

    return run, ct2.__version__


PEERS = {"mtnlg": mtnlg, "transformers": transformers, "ctranslate2": ctranslate2}

if __name__ == "__main__":
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    peer, folder, precision, threads = sys.argv[1:]
    os.environ["OMP_NUM_THREADS"] = threads
    run, version = PEERS[peer](folder, precision)
    print(json.dumps({"ready": version}), file=answers, flush=True)
    for line in sys.stdin:
        task = json.loads(line)
        began = time.perf_counter()
        ids, first = run(task["prompts"], task["new"])
        seconds = time.perf_counter() - began
        print(
            json.dumps({"seconds": seconds, "first_seconds": first, "ids": ids}), file=answers, flush=True
        )
