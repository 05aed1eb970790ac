"""Router steering by scalar loops, one token and one expert at a time."""

import math


def spread(logits: list[float]) -> float:
    mean = sum(logits) / len(logits)
    return math.sqrt(sum((each - mean) ** 2 for each in logits) / len(logits))


def soft(
    logits: list[float], promote: list[int], demote: list[int], strength: float
) -> list[float]:
    steered = []
    for expert, logit in enumerate(logits):
        sign = (expert in promote) - (expert in demote)
        steered.append(logit + sign * strength * spread(logits))
    return steered


def surely_selected(logits: list[float], expert: int, top_k: int) -> bool:
    """Among the K best however ties fall."""
    as_good = [other for other, logit in enumerate(logits) if logit >= logits[expert]]
    return len(as_good) <= top_k


def flips(
    logits: list[float], targets: list[int], target: int, top_k: int, strength: float
) -> bool:
    """Whether a target is selected with this strength, and was not without."""
    steered = soft(logits, targets, [], strength)
    was = surely_selected(logits, target, top_k)
    return surely_selected(steered, target, top_k) and not was


def flip_strength(logits: list[float], targets: list[int], target: int, top_k: int) -> float:
    """The least strength that brings a target in, by bisection; infinite above 1e6."""
    if surely_selected(logits, target, top_k):
        return 0.0
    low, high = 0.0, 1e6
    if not flips(logits, targets, target, top_k, high):
        return math.inf
    for _ in range(200):
        middle = (low + high) / 2
        if flips(logits, targets, target, top_k, middle):
            high = middle
        else:
            low = middle
    return high


def delta(target: list[list[list[int]]], generic: list[list[list[int]]], num_experts: int) -> list:
    """Mean frequency over sequences of token selections: target minus generic, per expert."""

    def mean_frequency(sequences: list[list[list[int]]], expert: int) -> float:
        shares = [sum(expert in ids for ids in each) / len(each) for each in sequences]
        return sum(shares) / len(shares)

    return [
        mean_frequency(target, expert) - mean_frequency(generic, expert)
        for expert in range(num_experts)
    ]
