"""A reward that needs nothing but the answer: the share of 24 tokens that it leaves unused."""


def brevity(completion_ids, **kwargs):
    """1 for an empty answer, 0 for one of 24 tokens or more."""
    return [1 - min(len(ids), 24) / 24 for ids in completion_ids]
