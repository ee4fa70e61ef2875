"""The validation loss during training: the same samples every time, in every layout."""

from __future__ import annotations

from mtnlg.config import RunConfig
from mtnlg.parallel.model import ParallelModel
from mtnlg.training.work import Stream, Work


class Validation:
    """Mean cross entropy over the samples of a stream that ends.

    Args:
        stream: of the samples.
        micro_batch_size: samples that a replica evaluates at once.
    """

    def __init__(self, stream: Stream, micro_batch_size: int) -> None:
        self.stream, self.micro_batch_size = stream, micro_batch_size
        self.num_samples = stream.num_samples or 0

    @classmethod
    def of(cls, config: RunConfig, work: Work) -> Validation | None:
        """On the first ``evaluation.num_batches`` micro-batches (0 is all), where there are any."""
        size = config.batch.micro_batch_size
        stream = work.validation_stream(config, config.evaluation.num_batches * size or None)
        return None if stream is None else cls(stream, size)

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
