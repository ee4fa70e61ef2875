"""A fast runner for searches that look at hidden states before they want logits."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from mtnlg.generation.fast_runner import FastRunner
from mtnlg.generation.row_counts import filled_up


class SearchRunner(FastRunner):
    """:class:`FastRunner` that also leads from hidden states to logits."""

    @torch.inference_mode()
    def logits_of(self, hidden: Tensor) -> Tensor | None:
        """The logits that hidden states lead to, float32 [tokens, vocab].

        Args:
            hidden: [tokens, hidden] as :meth:`hidden` gave them.

        Returns:
            ``None`` where adapters change the head, which goes with rows.
        """
        if self._own is not None or self._mixer is not None:
            return None
        count = len(hidden)
        rows = F.pad(hidden, (0, 0, 0, filled_up(count, self._fewest) - count))
        return self._decoder.output(rows)[:count].float()
