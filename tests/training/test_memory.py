"""Logits of a large vocabulary never dominate memory, and recomputation changes no number."""

from __future__ import annotations

import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
from tests.training.helpers import Recorder, small_config, train_here

ROOT = Path(__file__).resolve().parents[2]
VOCAB_SIZE, TOKENS = 30_000, 1024

STEP = f"""
import resource, torch
from mtnlg.config import LayoutConfig, MegatronModelConfig
from mtnlg.parallel import build_mesh, lay_out
from mtnlg.model import loss
from mtnlg.tokens.batch import Batch
loss.LOGITS_BYTES = 2**23
torch.set_num_threads(1)
config = MegatronModelConfig(
    vocab_size={VOCAB_SIZE}, hidden_size=16, num_hidden_layers=1, num_attention_heads=2,
    max_position_embeddings=1024, tie_word_embeddings=False,
)
model = lay_out(config, build_mesh(LayoutConfig(data_parallel_size=1)))
def step(rows):
    ids = torch.randint(0, {VOCAB_SIZE}, (rows, 1024))
    model.forward_backward([Batch(ids, ids)], rows * 1024)
    model.zero_gradients()
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
step(0)  # everything is loaded
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
print(step({TOKENS} // 1024) - before)
"""


@pytest.mark.skipif(sys.platform != "linux", reason="reads Linux's peak memory")
def test_step_never_holds_the_logits_of_all_tokens():
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [sys.executable, "-c", STEP], env=environment, cwd=ROOT, capture_output=True, text=True, timeout=200
    )
    assert done.returncode == 0, done.stderr
    whole_logits = 4 * VOCAB_SIZE * TOKENS
    assert int(done.stdout) < 0.5 * whole_logits  # a plain loss holds them three times


@pytest.mark.parametrize("what", ["selective", "operators", "budget", "full"])
def test_recomputation_changes_no_number(tmp_path, what):
    """Dropout included: the masks of the second forward pass are those of the first."""
    config, losses = small_config(tmp_path), []
    for number, recomputation in enumerate(["none", what]):
        run_dir = tmp_path / str(number)
        run_dir.mkdir()
        recorder = Recorder()
        training = replace(config.training, activation_recomputation=recomputation)
        train_here(replace(config, run_dir=str(run_dir), training=training), recorder)
        losses.append(recorder.losses)
    assert losses[0] == losses[1]
