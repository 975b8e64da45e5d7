"""Generated mathematics: exercises of many kinds with their worked solutions.

Digits and the names of quantities cannot be guessed, only carried over, which a map must learn;
sympy does the algebra. (The `mathematics_dataset` of PyPI fails to import with the sympy and
numpy that torch needs.)
"""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator
from fractions import Fraction

from awareness_demo.sources import group
from awareness_vllm.anchors.corpus import Document
from awareness_vllm.anchors.words import FIT, words_of

Exercise = Callable[[random.Random], str]

GOODS = words_of(
    """
    apples bottles bricks buttons candles chairs coins cups eggs envelopes flowers lamps lemons
    marbles nails notebooks oranges pears pencils plates ribbons shells stamps tickets tiles
    """
)
NAMES = FIT.first


def addition(rng: random.Random) -> str:
    a, b, c = (rng.randrange(10, 9999) for _ in range(3))
    return f"Calculate {a} + {b} - {c}.\n{a} + {b} = {a + b}, and {a + b} - {c} = {a + b - c}."


def multiplication(rng: random.Random) -> str:
    a, b = rng.randrange(12, 400), rng.randrange(3, 60)
    tens, ones = divmod(b, 10)
    return (
        f"What is {a} times {b}?\n{a} * {10 * tens} = {10 * a * tens} and {a} * {ones} = "
        f"{a * ones}. Together that is {a * b}."
    )


def division(rng: random.Random) -> str:
    b, quotient = rng.randrange(3, 90), rng.randrange(5, 300)
    rest = rng.randrange(b)
    a = b * quotient + rest
    return (
        f"Divide {a} by {b}.\n{b} goes into {a} {quotient} times, since {b} * {quotient} = "
        f"{b * quotient}. The remainder is {a} - {b * quotient} = {rest}."
    )


def fractions(rng: random.Random) -> str:
    a, b = (Fraction(rng.randrange(1, 12), rng.randrange(2, 15)) for _ in range(2))
    return f"Add {a} and {b}, then multiply them.\nThe sum is {a + b}. The product is {a * b}."


def percentage(rng: random.Random) -> str:
    whole, percent = 20 * rng.randrange(2, 300), 5 * rng.randrange(1, 19)
    part = Fraction(whole * percent, 100)
    return (
        f"A coat costs {whole} dollars and is reduced by {percent} percent. What is its new "
        f"price?\n{percent} percent of {whole} is {part}, so the coat now costs {whole - part} "
        "dollars."
    )


def shopping(rng: random.Random) -> str:
    who, other = rng.sample(NAMES, 2)
    thing, more = rng.sample(GOODS, 2)
    a, b, price = rng.randrange(3, 40), rng.randrange(2, 30), rng.randrange(2, 25)
    return (
        f"{who} buys {a} {thing} at {price} dollars each and {b} {more} at {price + 3} dollars "
        f"each. {other} pays for the {more}. How much does each of them pay?\n{who} pays {a} * "
        f"{price} = {a * price} dollars for the {thing}. {other} pays {b} * {price + 3} = "
        f"{b * (price + 3)} dollars for the {more}."
    )


def sharing(rng: random.Random) -> str:
    first, second, third = rng.sample(NAMES, 3)
    thing = rng.choice(GOODS)
    a, b, c = (rng.randrange(4, 80) for _ in range(3))
    return (
        f"{first} has {a} {thing}, {second} has {b} more than {first}, and {third} has {c}. How "
        f"many {thing} do they have?\n{second} has {a} + {b} = {a + b} {thing}. All three have "
        f"{a} + {a + b} + {c} = {2 * a + b + c} {thing}."
    )


def journey(rng: random.Random) -> str:
    speed, hours = 5 * rng.randrange(6, 30), rng.randrange(2, 12)
    start, end = rng.sample(FIT.cities, 2)
    return (
        f"A train leaves {start} at {speed} kilometres per hour and reaches {end} after {hours} "
        f"hours. How far is it?\nThe distance is speed times time: {speed} * {hours} = "
        f"{speed * hours} kilometres from {start} to {end}."
    )


def equation(rng: random.Random) -> str:
    import sympy

    x = sympy.Symbol(rng.choice("abchknpqstwxyz"))
    a, b, root = rng.randrange(2, 20), rng.randrange(1, 60), rng.randrange(-20, 21)
    left = a * x + b
    return (
        f"Solve {left} = {a * root + b} for {x}.\nSubtract {b}: {a * x} = {a * root}. Divide by "
        f"{a}: {x} = {root}."
    )


def quadratic(rng: random.Random) -> str:
    import sympy

    x = sympy.Symbol(rng.choice("xyzt"))
    a, b = rng.randrange(-12, 13), rng.randrange(-12, 13)
    factors = (x - a) * (x - b)
    return (
        f"Find the roots of {sympy.expand(factors)}.\nIt is {factors}, so it vanishes at {x} = "
        f"{min(a, b)} and {x} = {max(a, b)}."
    )


def derivative(rng: random.Random) -> str:
    import sympy

    x = sympy.Symbol(rng.choice("xyzuv"))
    function = sum(rng.randrange(-9, 10) * x**power for power in range(rng.randrange(2, 6)))
    first = sympy.diff(function, x)
    return (
        f"Differentiate f({x}) = {function} twice.\nThe first derivative is {first}, the second "
        f"one {sympy.diff(first, x)}."
    )


def sequence(rng: random.Random) -> str:
    start, step = rng.randrange(-50, 100), rng.randrange(2, 40)
    terms = [start + i * step for i in range(6)]
    return (
        f"Continue the sequence {', '.join(map(str, terms[:4]))}.\nEach term is {step} more than "
        f"the one before, so it goes on {terms[4]}, {terms[5]}."
    )


def divisors(rng: random.Random) -> str:
    import sympy

    a, b = 6 * rng.randrange(4, 60), 4 * rng.randrange(4, 60)
    powers = " * ".join(f"{p}^{n}" if n > 1 else str(p) for p, n in sympy.factorint(a).items())
    return (
        f"Factorise {a}; find its greatest common divisor with {b}.\n{a} = {powers}. The greatest "
        f"common divisor of {a} and {b} is {sympy.gcd(a, b)}, their least common multiple "
        f"{sympy.lcm(a, b)}."
    )


EXERCISES: tuple[Exercise, ...] = (
    addition,
    multiplication,
    division,
    fractions,
    percentage,
    shopping,
    sharing,
    journey,
    equation,
    quadratic,
    derivative,
    sequence,
    divisors,
)


def mathematics(count: int, seed: int) -> Iterator[Document]:
    """About `count` exercises, numbered, some twenty to a document."""
    rng = random.Random(f"mathematics {seed}")
    exercises = (f"{i % 20 + 1}. {rng.choice(EXERCISES)(rng)}" for i in range(count))
    for i, text in enumerate(group(exercises)):
        yield Document(f"exercises-{i:04}", text)
