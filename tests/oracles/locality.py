"""Local routing consistency by brute force, in plain Python, from the published definitions.

A sequence is a list of tokens, a token the list of the experts it demands, in serving order.
"""

from collections.abc import Sequence
from fractions import Fraction
from itertools import product

Tokens = Sequence[Sequence[int]]


def window_counts(sequences: Sequence[Tokens], num_experts: int, window: int) -> list[list[int]]:
    """How often each window of each sequence selects each expert."""
    return [
        [sum(e in token for token in tokens[p : p + window]) for e in range(num_experts)]
        for tokens in sequences
        for p in range(len(tokens) - window + 1)
    ]


def f1(chosen: Sequence[bool], counts: Sequence[int], window: int) -> Fraction:
    """F1 of switching on the chosen (window, expert) pairs; 0 without any selection."""
    positives = sum(counts)
    if not positives:
        return Fraction(0)
    caught = sum(f for on, f in zip(chosen, counts, strict=True) if on)
    return Fraction(2 * caught, window * sum(chosen) + positives)


def srp_by_enumeration(counts: Sequence[int], window: int) -> Fraction:
    """The best F1 over every way to switch (window, expert) pairs on or off."""
    return max(f1(chosen, counts, window) for chosen in product([False, True], repeat=len(counts)))


def f1_at(alpha: int, counts: Sequence[int], window: int) -> Fraction:
    """F1 of switching on the pairs with a count of at least alpha."""
    return f1([f >= alpha for f in counts], counts, window)


def sch_window(counts: Sequence[Sequence[int]], size: int) -> Fraction:
    """Share of selections within the `size` most used experts of each window."""
    best = sum(sum(sorted(row, reverse=True)[:size]) for row in counts)
    return Fraction(best, sum(map(sum, counts)))


class Cache:
    """One cache of one sequence, step by step.

    Args:
        tokens: The sequence.
        size: Slots.
        policy: `lru`, `lfu`, `belady` or `sch`.
        window: m of `sch`.
        strict: Never drop an expert that the current token demands.
    """

    def __init__(
        self, tokens: Tokens, size: int, policy: str, *, window: int = 1, strict: bool = False
    ) -> None:
        self.tokens, self.size, self.policy = tokens, size, policy
        self.window, self.strict = window, strict
        self.last_use: dict[int, tuple[int, int]] = {}
        self.uses: dict[int, int] = {}
        self.resident: set[int] = set()
        self.hits: dict[int, int] = {}
        self.cold: dict[int, int] = {}
        self.contents: list[frozenset[int]] = []
        for t, token in enumerate(tokens):
            self._token(t, token)

    def _token(self, t: int, token: Sequence[int]) -> None:
        for expert in token:
            if expert in self.resident:
                self.hits[expert] = self.hits.get(expert, 0) + 1
        for i, expert in enumerate(token):
            if expert not in self.last_use and len(self.last_use) < self.size:
                self.cold[expert] = self.cold.get(expert, 0) + 1
            if expert not in self.resident:
                if len(self.resident) == self.size:
                    self.resident.remove(min(self.resident, key=lambda e: self._priority(e, t, i)))
                self.resident.add(expert)
            self.last_use[expert] = (t, i)
            self.uses[expert] = self.uses.get(expert, 0) + 1
            self.contents.append(frozenset(self.resident))

    def _priority(self, expert: int, t: int, i: int) -> tuple[object, ...]:
        token = self.tokens[t]
        demanded = self.strict and expert in token
        if self.policy == "lru":
            return demanded, self.last_use[expert]
        if self.policy == "lfu":
            return demanded, self.uses[expert], self.last_use[expert]
        if self.policy == "sch":
            ahead = sum(expert in later for later in self.tokens[t + 1 : t + self.window])
            return demanded, ahead + (expert in token[i:]), self.last_use[expert]
        for at, later in enumerate(self.tokens[t:], t):
            for j, other in enumerate(later):
                if other == expert and (at, j) > (t, i):
                    return demanded, (-at, -j)
        return demanded, (-len(self.tokens), 0)

    @property
    def num_hits(self) -> int:
        """Requests that found their expert."""
        return sum(self.hits.values())

    @property
    def num_cold(self) -> int:
        """First requests that found a free slot."""
        return sum(self.cold.values())
