"""Names and values of which the tasks are made, drawn anew for each task."""

from __future__ import annotations

import random
from collections.abc import Sequence

FIRST = (
    "Mia", "Yusuf", "Ines", "Olaf", "Chloe", "Rahul", "Greta", "Mateo", "Aiko", "Noah", "Sofia", "Kofi", "Lena",
    "Omar", "Tessa", "Ivan", "Priya", "Hugo", "Zara", "Felix", "Nadia", "Ethan", "Carla", "Bram", "Leila", "Marco",
)  # fmt: skip
LAST = (
    "Li", "Rossi", "Santos", "Weber", "Okafor", "Patel", "Novak", "Garcia", "Tanaka", "Larsen", "Moreau", "Mensah",
    "Fischer", "Haddad", "Dubois", "Petrov", "Sharma", "Keller", "Ahmed", "Vogel", "Costa", "Reed", "Silva", "Jansen",
)  # fmt: skip
ITEMS = (
    "desk lamp", "hiking boots", "water bottle", "office chair", "tea kettle", "backpack", "headphones", "keyboard",
    "jigsaw puzzle", "yoga mat", "air purifier", "bookshelf", "espresso machine", "fleece jacket", "garden hose",
    "pet bed", "action camera", "skateboard", "wall clock", "vacuum cleaner", "bluetooth speaker", "sunglasses",
)  # fmt: skip
CITIES = ("Lyon", "Graz", "Porto", "Ghent", "Malmo", "Turin", "Gdansk", "Bilbao", "Utrecht", "Cork", "Brno", "Tampere")
STREETS = ("Oak Street", "Mill Lane", "Station Road", "Park Avenue", "Harbour Walk", "Church Hill", "Elm Court")
YES = ("yes", "Yes, please.", "Yes, go ahead.", "yes, please proceed", "Sure, do it.")


def digits(chance: random.Random, count: int) -> str:
    """Return this many digits, the first not 0."""
    return str(chance.randrange(10 ** (count - 1), 10**count))


def person(chance: random.Random) -> tuple[str, str]:
    """Return a first and a last name."""
    return chance.choice(FIRST), chance.choice(LAST)


def distinct(chance: random.Random, texts: Sequence[str], count: int) -> list[str]:
    """Return this many different texts in any order."""
    return chance.sample(list(texts), count)
