"""(query, document) pairs for tests, of very different lengths, the same in every process."""

import random

from tiny_models import CHINESE, ENGLISH


def some_pairs(count: int) -> list[tuple[str, str]]:
    """Pairs of very different lengths, in random order, some with an empty text."""
    generator = random.Random(3)
    pairs = [("", ""), ("", "water"), (CHINESE[0], ""), (CHINESE[1], CHINESE[2])]
    while len(pairs) < count:
        document = " ".join(generator.choices(ENGLISH + CHINESE, k=generator.randint(1, 6)))
        pairs.append((generator.choice(ENGLISH + CHINESE), document[: generator.randint(0, 400)]))
    generator.shuffle(pairs)
    return pairs
