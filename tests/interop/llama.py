"""Asks llama.cpp, where it is: in this environment, or under the Python that LLAMA_PYTHON names."""

import json
import os
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest

PROGRAM = Path(__file__).with_name("llama_peer.py")
PYTHON = os.environ.get("LLAMA_PYTHON") or (sys.executable if find_spec("llama_cpp") else None)
needs_llama_cpp = pytest.mark.skipif(
    PYTHON is None, reason="needs llama.cpp: pip install llama-cpp-python, or LLAMA_PYTHON=its Python"
)


def ask(*tasks):
    """What llama.cpp finds in each file (see ``llama_peer.py``)."""
    text = json.dumps([{**task, "file": str(task["file"])} for task in tasks])
    done = subprocess.run([PYTHON, PROGRAM], input=text, capture_output=True, text=True, timeout=500)
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads(done.stdout)
