"""A selector of one's own: its parameters name what it is given (see the head of select.py)."""

import numpy as np


def uncertain_and_aligned(pass_rate, cosine):
    """Mean cosine with the validation sets, for prompts that are neither hopeless nor solved."""
    score = cosine.mean(1)  # (N, V) -> (N,); NaN where a prompt is not live: never chosen
    return np.where((pass_rate > 0.1) & (pass_rate < 0.9), score, np.nan)
