"""CUT IT: pure functions from a model and a plan to a smaller model. The model given is never changed."""

from paredown.surgery._cut import cut, mask, parameters
from paredown.surgery._fold import fold

__all__ = ["cut", "fold", "mask", "parameters"]
