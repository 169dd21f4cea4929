"""A reward of one's own, in TRL's form: called with lists, returns one float for each completion."""


def share_right(prompts, completions, answer, kind, **columns):
    """The share of characters that stand where they should. Columns of the data (here `kind`) come as lists, too."""
    rewards = []
    for completion, right in zip(completions, answer, strict=True):
        same = sum(a == b for a, b in zip(completion.strip(), right, strict=False))
        rewards.append(same / max(len(completion.strip()), len(right)))
    return rewards
