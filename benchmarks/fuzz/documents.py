"""Mutations of manifests: as trees of JSON values, and as text."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from typing import Any

from fuzz.container import DOCUMENT as KEY
from fuzz.container import Container
from fuzz.registry import ALWAYS, CONTENT, DOCUMENT, PACKAGE, WMATRIX, Rng, kind

Where = tuple[Any, Any]
"""A dict or list of the tree, and the key or index of a value in it."""


class Raw(str):
    """A value whose text json.dumps would not write."""


def nested(depth: int) -> Raw:
    return Raw("[" * depth + "]" * depth)


VALUES: list[Any] = [
    None, True, False, 0, -1, 1, 2, 3, 7, 2**31, 2**63, 2**64, 10**12, 10**30, -(2**63), 0.5, -0.0,
    1e308, 5e-324, Raw("1" + "0" * 400), Raw("1e400"), Raw("-1e400"), Raw("NaN"), Raw("Infinity"),
    Raw("-Infinity"), Raw("1" + "0" * 5000), "", " ", "5", "nan", "x" * 300, "x" * 100_000,
    "\x1b[31mred\n", "a\x00b", "\u202egnp", "\x7f", "a\r\nb", Raw('"\\ud800"'), "../../etc/passwd",
    "None", [], {}, [[]], [None], {"": {}}, [0] * 50_000, ["x"] * 20_000, nested(100),
    nested(20_000),
]  # fmt: skip


def places(tree: Any) -> Iterator[Where]:
    """Every place of a value below the root."""
    pairs = tree.items() if isinstance(tree, dict) else enumerate(tree)
    for key, value in list(pairs):
        yield tree, key
        if isinstance(value, (dict, list)):
            yield from places(value)


def numbers(tree: Any) -> list[Where]:
    return [(node, key) for node, key in places(tree) if type(node[key]) in (int, float)]


def objects(tree: Any) -> list[dict[str, Any]]:
    return [tree, *(node[key] for node, key in places(tree) if isinstance(node[key], dict))]


def dumps(tree: Any) -> str:
    """JSON, with Raw values as they are."""
    raws: list[Raw] = []

    def marked(value: Any) -> Any:
        if isinstance(value, Raw):
            raws.append(value)
            return f"@raw{len(raws) - 1}@"
        if isinstance(value, dict):
            return {key: marked(item) for key, item in value.items()}
        return [marked(item) for item in value] if isinstance(value, list) else value

    return re.sub(r'"@raw(\d+)@"', lambda match: raws[int(match[1])], json.dumps(marked(tree)))


def changed(file: Container, tree: Any) -> Container:
    file.metadata[KEY] = dumps(tree)
    return file


@kind(DOCUMENT)
def value_replaced(rng: Rng, file: Container) -> Container:
    tree = file.document
    node, key = rng.choice(list(places(tree)))
    node[key] = rng.choice(VALUES)
    return changed(file, tree)


@kind(DOCUMENT)
def number_changed(rng: Rng, file: Container) -> Container:
    tree = file.document
    node, key = rng.choice(numbers(tree))
    value = node[key]
    node[key] = rng.choice(
        [value + 1, value - 1, -value, 2 * value, value * 1000, value / 2, str(value), float(value),
         [value], value * 1e30, 0]
    )  # fmt: skip
    return changed(file, tree)


@kind(DOCUMENT)
def field_removed(rng: Rng, file: Container) -> Container:
    tree = file.document
    node, key = rng.choice(list(places(tree)))
    del node[key]
    return changed(file, tree)


@kind(DOCUMENT)
def field_added(rng: Rng, file: Container) -> Container:
    tree = file.document
    node = rng.choice(objects(tree))
    node[
        rng.choice(["", "x", "__class__", "scale", "first_tokens", "woven", "begins", "\x1b[2J"])
    ] = rng.choice(VALUES)
    return changed(file, tree)


@kind(DOCUMENT)
def values_swapped(rng: Rng, file: Container) -> Container:
    tree = file.document
    (a, i), (b, j) = (rng.choice(list(places(tree))) for _ in range(2))
    a[i], b[j] = json.loads(json.dumps(b[j])), json.loads(json.dumps(a[i]))
    return changed(file, tree)


@kind(DOCUMENT)
def list_grown(rng: Rng, file: Container) -> Container | None:
    tree = file.document
    lists = [n[k] for n, k in places(tree) if isinstance(n[k], list) and n[k]]
    if not lists:
        return None
    some = rng.choice(lists)
    some.extend(rng.choice(some) for _ in range(rng.choice([1, 3, 2000])))
    return changed(file, tree)


def field_text(rng: Rng, tree: Any) -> tuple[str, str]:
    """A field of the root and its JSON."""
    key = rng.choice(sorted(tree))
    return json.dumps(key), json.dumps(tree[key])


@kind(DOCUMENT, refuse=ALWAYS)
def key_twice(rng: Rng, file: Container) -> Container:
    """With another value first or last: what a reader takes depends on the reader."""
    tree = file.document
    key, value = field_text(rng, tree)
    other = rng.choice([value, "null", "7", '"x"'])
    rest = json.dumps(tree)[1:-1]
    file.metadata[KEY] = rng.choice([f"{{{key}: {other}, {rest}}}", f"{{{rest}, {key}: {other}}}"])
    return file


@kind(DOCUMENT, refuse=ALWAYS)
def nested_key_twice(rng: Rng, file: Container) -> Container:
    tree = file.document
    node = rng.choice([one for one in objects(tree) if one and one is not tree])
    key = rng.choice(sorted(node))
    inside = json.dumps(node)[1:-1]
    other = json.dumps(rng.choice([node[key], None, 3]))
    raw = Raw(f"{{{json.dumps(key)}: {other}, {inside}}}")
    for parent, at in places(tree):
        if parent[at] is node:
            parent[at] = raw
            break
    return changed(file, tree)


@kind(DOCUMENT, refuse=ALWAYS)
def text_broken(rng: Rng, file: Container) -> Container:
    text = file.metadata[KEY]
    file.metadata[KEY] = rng.choice(
        [
            "", "null", "7", "[]", "{}", '"x"', text[: rng.randrange(len(text))], text + "}",
            text + text, "\ufeff" + text, text.replace('"', "'"), "//\n" + text, text[:-1] + ",}",
            f"[{text}]", json.dumps(text), "[" * 100_000, '{"a":' * 100_000, "\x00" * 100,
            text[:-1] + ', "deep": ' + nested(5000) + "}",
        ]
    )  # fmt: skip
    return file


@kind(DOCUMENT)
def text_padded(rng: Rng, file: Container) -> Container:
    """The same JSON in more bytes: it may be served, in bounded time."""
    text = file.metadata[KEY]
    file.metadata[KEY] = rng.choice([" ", "\n", "\t"]) * rng.choice([1, 1000, 1_000_000]) + text
    return file


ROPE = {"theta": 1e4, "rotary_dim": 4}
RAMP = {**ROPE, "factor": 2.0, "original": 8, "beta_fast": 32.0, "beta_slow": 1.0}
POSITIONS: list[dict[str, Any]] = [
    {"scheme": "rope"}, {"scheme": "learned"}, {"scheme": "alibi"}, {"scheme": ""},
    {"scheme": "x" * 999}, {"scheme": "__import__('os')"}, {"scheme": "none", "rotary_dim": 4},
    *({"scheme": "rope", **ROPE, **change} for change in (
        {"rotary_dim": 64}, {"rotary_dim": 3}, {"rotary_dim": -4}, {"rotary_dim": 2**40},
        {"theta": 0.0}, {"theta": -1.0}, {"theta": 1e-300})),
    {"scheme": "linear", **ROPE, "factor": 1e-300},
    {"scheme": "dynamic", **ROPE, "rotary_dim": 2, "factor": 2.0, "original": 8, "length": 16},
    {"scheme": "dynamic", **ROPE, "factor": 1e300, "original": 1, "length": 2**40},
    {"scheme": "yarn", **RAMP, "scale": 1e30}, {"scheme": "yarn", **RAMP, "theta": 1.0},
    {"scheme": "yarn", **RAMP, "beta_fast": 0.0, "beta_slow": -1.0, "scale": 1e-40},
    {"scheme": "llama3", **RAMP, "beta_fast": 1.0},
    *({"scheme": "longrope", **ROPE, "scale": 1e38, "factors": factors} for factors in (
        [0.0, 0.0], [1.0] * 5000, [1e-30, 1e30])),
]  # fmt: skip


@kind(DOCUMENT)
def positions_changed(rng: Rng, file: Container) -> Container:
    tree = file.document
    layers = [node for node in objects(tree) if "positions" in node]
    for layer in rng.choice([layers, [rng.choice(layers)]]):
        layer["positions"] = rng.choice(POSITIONS)
    return changed(file, tree)


@kind(DOCUMENT)
def layers_changed(rng: Rng, file: Container) -> Container:
    tree = file.document
    geometry = rng.choice([node for node in objects(tree) if "hidden_size" in node])
    layers = geometry["layers"]
    geometry["layers"] = rng.choice(
        [[], layers[:1], layers + layers[:1], layers * 500, layers[::-1], layers * 5_000]
    )
    return changed(file, tree)


@kind(DOCUMENT, files=PACKAGE, refuse=ALWAYS)
def name_of_control_characters(rng: Rng, file: Container) -> Container:
    tree = file.document
    tree["name"] = rng.choice(
        ["\x1b[31mred", "a\nmem_0 forged", "a\x00", "\x07", "a\x85b", "x\x9b31m", "\x7f"]
    )
    return changed(file, tree)


@kind(DOCUMENT, files=PACKAGE, refuse=ALWAYS)
def name_of_a_hundred_thousand(rng: Rng, file: Container) -> Container:
    tree = file.document
    tree["name"] = "x" * 100_000
    return changed(file, tree)


@kind(DOCUMENT, files=WMATRIX, refuse=CONTENT)
def sink_forged(rng: Rng, file: Container) -> Container:
    """Sinks that the file's own tensors or vocabulary contradict."""
    tree = file.document
    tree["sink"] = rng.choice(
        [[], [10**9], [-1], [2**31], [2**63], tree["sink"] * 2, [2] * 100_000, [2.5], ["2"]]
    )
    return changed(file, tree)


@kind(DOCUMENT, files=WMATRIX, refuse=CONTENT)
def map_of_other_layers(rng: Rng, file: Container) -> Container:
    tree = file.document
    tree["layers"] = rng.choice([[], [0, 0], [-1, 0], [0, 9], [1], [0, 1, 0, 1], [2**63]])
    return changed(file, tree)


def interval(rng: Rng) -> dict[str, Any]:
    value = rng.choice([0.99, 1.0, 2.0, 42, -7, 1e9, Raw("NaN"), Raw("Infinity"), Raw("1e400")])
    return {"mean": value, "ci_low": rng.choice([value, -1, 9]), "ci_high": value}


def certificate(rng: Rng) -> dict[str, Any]:
    """A certificate of the right form with figures that nobody measured."""
    plan = {
        "context": rng.choice([256, 0, -1, 10**12]), "tail": rng.choice([0, 16, -1, 10**9]),
        "cost": rng.choice([0.1, -1, Raw("NaN"), 1e300]), "retention": interval(rng), "kinds": {},
        "top1": 0.9, "tokens_only": interval(rng), "facts": None,
    }  # fmt: skip
    return {
        "protocol": {"texts": "a", "cases": "b", "limit": 1, "context": 256, "continuation": 9},
        "texts": {}, "cases": {}, "metrics": None, "retention": interval(rng),
        "margin": interval(rng), "plans": [plan] * rng.choice([0, 1, 2, 500]),
        "facts": interval(rng), "facts_kinds": {}, "facts_distances": {},
        "facts_margin": interval(rng), "counts": {}, "tier": rng.choice([1, 9, -1, None]),
        "measured": rng.choice(["2025-01-01", "9999-12-31", 0, -1e18]), "hardware": "x",
        "versions": {},
    }  # fmt: skip


@kind(DOCUMENT, files=WMATRIX)
def certificate_forged(rng: Rng, file: Container) -> Container:
    tree = file.document
    tree["certificate"] = certificate(rng)
    return changed(file, tree)
