"""CUT IT: pure functions from a model and a plan to a smaller model. The model given is never changed."""

from paredown.surgery._cut import cut, mask, parameters
from paredown.surgery._fold import fold
from paredown.surgery._graph import cut_graph, mask_graph

__all__ = ["cut", "cut_graph", "fold", "mask", "mask_graph", "parameters"]
