"""Does a converted model deserve its memory? Measurements on real text."""

from linattn.audit.perplexity import Perplexity, perplexity

__all__ = ["Perplexity", "perplexity"]
