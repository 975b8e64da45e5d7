BUDGET = 48
"""The tokens that are re-read by default at most; a question needs about half of them."""
