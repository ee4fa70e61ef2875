"""What a rank reads of files when it takes its place in a layout."""

from __future__ import annotations

from pathlib import Path

from tests.parallel.workers import mesh_of

from mtnlg.interop import lazy_tensor
from mtnlg.parallel.inference import lay_out_for_inference
from mtnlg.training.model_files import open_model_files


def bytes_of_rank(folder: str, tensor: int, pipeline: int) -> tuple[int, int]:
    """(bytes of weights that this rank read, bytes of the weights that it has)."""
    layout = dict(tensor_parallel_size=tensor, pipeline_parallel_size=pipeline, data_parallel_size=1)
    mesh = mesh_of({**layout, "sequence_parallel": False})
    files = open_model_files(Path(folder))
    counted = 0
    original = lazy_tensor.read_bytes

    def counting(file, start, target):
        nonlocal counted
        counted += len(target)
        original(file, start, target)

    lazy_tensor.read_bytes = counting
    try:
        decoder = lay_out_for_inference(files.config, mesh, files.stream)
    finally:
        lazy_tensor.read_bytes = original
    return counted, sum(item.nbytes for item in decoder.parameters())
