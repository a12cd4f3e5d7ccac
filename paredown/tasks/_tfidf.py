"""The control that no transformer should lose to: TF-IDF features and a linear classifier.

Legend: N texts, C classes.
"""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from paredown.errors import BadData
from paredown.tasks._text import TextData
from paredown.types import Array

_UNSEEN = -30.0  # the log-odds of a class that the training data never shows: finite, and never the largest

_MOST_FEATURES = 20_000  # of each kind: banking77 has 24,000 in all and is fitted in 0.7 GB
_MOST_LETTERS = 2_500  # of a text: about the 512 tokens that the encoder it is compared with can read
_LONG = 400  # letters of a text on average
_RARE_FROM = 1_000  # texts, from which on a feature seen once is noise


@dataclass(frozen=True)
class Tfidf:
    """A fitted control. `classes` [K] are the class indices that its K score columns stand for."""

    features: Any
    classifier: Any
    classes: Array
    num_classes: int

    def predict_logits(self, texts: Sequence[str]) -> Array:
        """Scores [N, C] whose softmax is the control's class probabilities."""
        scores = self.classifier.decision_function(self.features.transform(texts))
        if scores.ndim == 1:  # two classes: scikit-learn gives the log-odds of the second one
            scores = np.stack((np.zeros_like(scores), scores), axis=1)
        logits = np.full((len(scores), self.num_classes), scores.min(axis=1, keepdims=True) + _UNSEEN)
        logits[:, self.classes] = scores
        return logits.astype(np.float32)


def fit_tfidf(data: TextData, *, num_classes: int) -> Tfidf:
    """The control trained on labelled texts: words, word pairs and, for short texts, runs of 3 to 5 letters in words.

    Raises BadData without labels of two classes or more.
    """
    from sklearn.exceptions import ConvergenceWarning
    from sklearn.feature_extraction.text import TfidfVectorizer
    from sklearn.linear_model import LogisticRegression
    from sklearn.pipeline import FeatureUnion

    if data.labels is None or len(np.unique(data.labels)) < 2:
        raise BadData("The TF-IDF control needs training texts with labels of two classes or more.")
    # In long texts the words say it all, and counting runs of letters would take over a minute.
    long = sum(map(len, data.texts)) > _LONG * len(data)
    features = FeatureUnion(
        [
            (
                analyzer,
                TfidfVectorizer(
                    analyzer=analyzer,
                    ngram_range=lengths,
                    preprocessor=_preprocess,
                    sublinear_tf=True,
                    min_df=2 if len(data) >= _RARE_FROM else 1,
                    max_features=_MOST_FEATURES,
                    dtype=np.float32,
                ),
            )
            for analyzer, lengths in (("word", (1, 2)), ("char_wb", (3, 5)))[: 1 if long else 2]
        ]
    )
    # C = 10: TF-IDF rows have length 1, so the usual C = 1 underfits short texts.
    classifier = LogisticRegression(C=10.0, max_iter=100, tol=1e-3)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ConvergenceWarning)  # a control a little short of its optimum is still one
        classifier.fit(features.fit_transform(data.texts), data.labels)
    return Tfidf(features, classifier, np.asarray(classifier.classes_), num_classes)


def _preprocess(text: str) -> str:
    return text[:_MOST_LETTERS].lower()
