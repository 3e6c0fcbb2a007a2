"""Retained tokens: the best-scored ones behind the window stay exact, the others go on through their features."""
