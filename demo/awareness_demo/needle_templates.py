"""The words and sentences of `needles.py`; people, cities and jobs are those of `facts.py`."""

from awareness_vllm.anchors.words import words_of

FEMALE = words_of("Maya Melissa Monica Naomi Natalie Nora Olivia Pamela Rachel Sofia Wendy Zoe")
MALE = words_of("Nathan Neil Oliver Omar Oscar Pedro Raymond Ruben Samuel Tobias Victor Walter")
THINGS = words_of(
    "anvil harp lantern ladder compass saddle trumpet hammock cradle barrel globe loom rifle pulley"
)
ITEMS = words_of(
    "lemons candles rope vinegar nails almonds soap matches buttons onions honey ribbon chalk yeast"
)
ROOMS = words_of("attic pantry stable garage chapel greenhouse laundry nursery boathouse workshop")
SYNONYMS = {
    "automobile": "car", "settee": "couch", "dinghy": "boat", "spectacles": "glasses",
    "timepiece": "watch", "necklace": "jewellery", "rucksack": "bag", "infant's cot": "baby's bed",
    "refrigerator": "fridge", "cutlery": "knives and forks", "photograph": "picture",
    "spade": "shovel",
}  # fmt: skip
"""What a needle calls a thing, and what a paraphrased question calls it."""

PARAPHRASED = {
    "city": (
        "{name} rents two rooms above a shop in {city}.|Letters reach {name} in {city}, care of "
        "the harbour master.|{name} has kept house in {city} for a decade.",
        "Which town is home to {name}?",
        "{name} is at home in",
    ),
    "job": (
        "It is as {a_job} that {name} pays the bills.|{name} keeps hunger away as {a_job}.|"
        "{name} was taken on as {a_job}.",
        "What does {name} do for a living?",
        "{name} makes a living as {article}",
    ),
    "price": (
        "For the {word} one had to part with {number} dollars.|"
        "The {word} changed hands for {number} dollars.",
        "What was the price of the {other}?",
        "The price of the {other} was",
    ),
    "room": (
        "The {word} had been left in the {room}.|Somebody had locked the {word} into the {room}.",
        "In which room can the {other} be found?",
        "The {other} can be found in the",
    ),
}
"""Needles, question and the answer's beginning, by what is asked."""
BACKWARDS = {
    "city": (
        "{name} has long been living in {city}.|{name} settled in {city} with two dogs.",
        "Who lives in {city}?",
        "The person who lives in {city} is",
        "{name}",
    ),
    "code": (
        "{name} was assigned the code {code}.",
        "Who was assigned the code {code}?",
        "The code {code} was assigned to",
        "{name}",
    ),
    "room": (
        "The {thing} stands in the {room}.",
        "Which thing stands in the {room}?",
        "In the {room} stands the",
        "{thing}",
    ),
}
SPREAD = {
    "city": (
        "{They} has a flat above the bakery in {city}.|{Their} house stands near the river in "
        "{city}.|{They} went back to {city}, where {they} had grown up.",
        "In which city does {name} live?",
        "{name} lives in",
        "{city}",
    ),
    "job": (
        "{They} earned {their} bread as {a_job}.|{They} had trained as {a_job}.",
        "What is the job of {name}?",
        "{name} works as {article}",
        "{job}",
    ),
    "code": (
        "{Their} badge had the number {code}.|{They} wrote the number {code} on the form.",
        "What is the number of {name}?",
        "The number of {name} is",
        "{code}",
    ),
}
ARRIVALS = """
{name} came to the meeting late.|At the door stood {name}.|The letter was signed by {name}.
Nobody had expected {name}.|It was {name} who spoke next.
"""
BETWEEN = "The room went quiet.|It had begun to rain.|Tea was served.|A clock struck somewhere."
RELATIONS = words_of("neighbour cousin landlady tutor godfather partner assistant rival")
SHOPPING = "{name} went out to buy {items}.|{name} was sent for {items}.|{name} packed {items}."
PRICED = "The {thing} cost {number} dollars."
SEVERAL_EXAMPLE = """Where do the rake and the bell stand?
Answer: The rake stands in the barn. The bell stands in the tower.
Question: """
SUM_EXAMPLE = """What do the rake and the bell cost together?
Answer: The rake cost 2 dollars. The bell cost 5 dollars. 2 + 5 = 7
Question: """
"""Small base models answer with two facts only where they are shown how that is written."""
