"""Mutated packages, W-Matrices and disk-cache entries, and the oracle of what may come of them."""
