"""LengthPrediction: what the gateway believes of an output's length, for requests whose real length is known.

As in the paper, a predictor names one of the three output sizes; it is right with probability ``accuracy``, else it
names a neighbouring size. What routing and accounting then use is the mean length of that size.
"""

from dataclasses import dataclass
from typing import Any

import numpy as np

from pools.classes import ClassCuts


@dataclass(frozen=True, slots=True)
class LengthPrediction:
    """How good the predictor is, and the mean output of each size (Azure 2023 Conversation trace)."""

    accuracy: float = 1.0
    mean_tokens: tuple[float, float, float] = (46.0, 204.0, 424.0)

    def predict(self, output_tokens: Any, cuts: ClassCuts, rng: np.random.Generator) -> tuple[Any, Any]:
        """Predicted (size 0..2, tokens) of each true length; arrays of shape (n,)."""
        size = np.searchsorted(np.asarray(cuts.output_tokens), output_tokens, side="right")
        if self.accuracy < 1.0:
            wrong = rng.random(len(size)) >= self.accuracy
            up = rng.random(len(size)) < 0.5
            neighbour = np.where(size == 0, 1, np.where(size == 2, 1, np.where(up, 2, 0)))
            size = np.where(wrong, neighbour, size)
        return size, np.asarray(self.mean_tokens)[size]
