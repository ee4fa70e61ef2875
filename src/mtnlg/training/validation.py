"""The validation loss during training: the same samples every time, in every layout."""

from __future__ import annotations

from mtnlg.config import RunConfig
from mtnlg.parallel.model import ParallelModel
from mtnlg.tokens.stream import BatchStream
from mtnlg.training.step import pad_batch, split_batch


class Validation:
    """Mean cross entropy over the first samples of the validation split.

    Args:
        config: ``evaluation.num_batches`` micro-batches of ``batch.micro_batch_size`` samples are
            read, or all samples of the split if that is 0.
        stream: the validation split.
    """

    def __init__(self, config: RunConfig, stream: BatchStream) -> None:
        self.stream = stream
        self.micro_batch_size = config.batch.micro_batch_size
        wanted = config.evaluation.num_batches * self.micro_batch_size
        self.num_samples = min(wanted or stream.num_samples, stream.num_samples)

    def run(self, model: ParallelModel) -> tuple[float, int]:
        """Mean loss (nats a token) and the number of tokens it was measured on."""
        mesh = model.mesh
        summed = valid = 0.0
        at_once = self.micro_batch_size * mesh.num_replicas
        for start in range(0, self.num_samples, at_once):
            count = min(at_once, self.num_samples - start)
            batch = self.stream.batch(start, count, mesh.replica, mesh.num_replicas)
            # Every replica runs as many forward passes, or sharded weights would wait for ever.
            padded = pad_batch(batch, self.micro_batch_size)
            loss, tokens = model.evaluate(split_batch(padded, self.micro_batch_size))
            summed += float(loss)
            valid += float(tokens)
        return summed / max(1.0, valid), int(valid)
