"""The validation loss during training: the same samples every time, in every layout."""

from __future__ import annotations

from mtnlg.config import RunConfig
from mtnlg.parallel.model import ParallelModel
from mtnlg.tokens.stream import BatchStream


class Validation:
    """Mean cross entropy over the first samples of the validation split.

    Args:
        config: ``evaluation.num_batches`` micro-batches of ``batch.micro_batch_size`` samples are
            read, or all samples of the split if that is 0.
    """

    def __init__(self, config: RunConfig) -> None:
        self.micro_batch_size = config.batch.micro_batch_size
        wanted = config.evaluation.num_batches * self.micro_batch_size or None
        self.stream = BatchStream(config.data, "validation", config.seed, num_samples=wanted)
        self.num_samples = self.stream.num_samples or 0

    def run(self, model: ParallelModel) -> tuple[float, int]:
        """Mean loss (nats a token) and the number of tokens it was measured on."""
        mesh = model.mesh
        summed = valid = 0.0
        at_once = self.micro_batch_size * mesh.num_replicas
        for start in range(0, self.num_samples, at_once):
            # Past the end the stream gives rows without labels: every replica runs as many forward
            # passes, or sharded weights would wait for ever.
            batch = self.stream.batch(start, at_once, mesh.replica, mesh.num_replicas)
            loss, tokens = model.evaluate([batch])
            summed += float(loss)
            valid += float(tokens)
        return summed / max(1.0, valid), int(valid)
