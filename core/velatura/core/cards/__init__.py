"""Reward cards: how far a reward agrees with people, how noisy it is, and what it can be fooled with."""
