"""What labels say of an embedder: how well a linear classifier on its embeddings answers.

Legend: N texts, D width.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from paredown.errors import BadData
from paredown.tasks._text import TextData
from paredown.types import Array

STRENGTH = 10.0  # inverse regularization: embeddings of length 1 are far apart only with large weights
ITERATIONS = 500


class LinearProbe:
    """A task, seen as `Task`, whose metric is the accuracy of one logistic regression, fitted to the dense model's
    embeddings and kept as it is: a pruned embedder has to serve what was built on the dense one.
    """

    NAME = "text-embedding"
    METRIC = "accuracy"

    def __init__(self, embeddings: Array, labels: Array):
        """Fitted to embeddings [N, D] and labels [N]. Raises BadData where all labels are the same."""
        from sklearn.linear_model import LogisticRegression

        if len(np.unique(labels)) < 2:
            raise BadData("All calibration texts have the same label, so nothing can be fitted to the labels.")
        self._fitted: Any = LogisticRegression(C=STRENGTH, max_iter=ITERATIONS).fit(embeddings, labels)

    def metric_name(self, data: TextData) -> str:
        """ "accuracy"."""
        return self.METRIC

    def all_texts(self, data: TextData) -> tuple[str, ...]:
        """The N texts to encode."""
        return data.texts

    def metrics(self, outputs: Array, data: TextData, reference: Array) -> dict[str, float]:
        """`accuracy`, and the mean `cosine` to the dense model's embeddings."""
        norms = np.linalg.norm(outputs, axis=1) * np.linalg.norm(reference, axis=1)
        cosine = float(((outputs * reference).sum(1) / np.maximum(norms, 1e-12)).mean())
        return {"accuracy": float(self.per_example(outputs, data, reference).mean()), "cosine": cosine}

    def per_example(self, outputs: Array, data: TextData, reference: Array) -> Array:
        """1.0 for a right answer, 0.0 for a wrong one [N]; embeddings that are not finite are wrong."""
        assert data.labels is not None
        sound = np.isfinite(outputs).all(axis=1)  # the classifier takes no other
        right = np.zeros(len(outputs))
        if sound.any():
            right[sound] = self._fitted.predict(outputs[sound]) == data.labels[sound]
        return right
