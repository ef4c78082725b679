"""JSON schemas such as public collections hold, made from a seed.

A schema has nested objects, arrays, enums, patterns, formats, bounds, references, recursion, and now and then what no
grammar says (`not`, `if`). How often each keyword stands is a guess at those collections (GitHub's, Kubernetes',
functions to call), which are not copied here.
"""

from __future__ import annotations

from collections.abc import Callable
from random import Random
from typing import Any

Schema = dict[str, Any]

_WORDS = """id name kind size color price owner email address city state tags items count enabled version description
created updated status level parent children metadata labels config port host path url timeout retries weight height
width currency amount quantity total phone country zip language"""
WORDS = _WORDS.split()
PATTERNS = [
    "^[a-z][a-z0-9-]{1,14}$",
    "^[A-Z]{2}[0-9]{4}$",
    r"^\d{3}-\d{2}-\d{4}$",
    "^#[0-9a-fA-F]{6}$",
    r"^v?\d+\.\d+\.\d+$",
    "^(GET|PUT|POST|DELETE)$",
    r"^[\w.]+@[\w.]+$",
    "[0-9]",
]
FORMATS = ["date", "time", "date-time", "email", "uuid", "ipv4", "ipv6", "hostname", "uri"]


def schemas(count: int, seed: int = 0) -> list[Schema]:
    """The same ones for the same seed; the first of many are the first of few."""
    return [schema(Random(f"{seed}/{index}")) for index in range(count)]


def schema(rng: Random) -> Schema:
    """One schema with its definitions."""
    maker = _Maker(rng)
    made = maker.object(0) if rng.random() < 0.85 else maker.array(0)
    head: Schema = {"$schema": "https://json-schema.org/draft/2020-12/schema"} if rng.random() < 0.5 else {}
    if rng.random() < 0.5:
        head["title"] = rng.choice(WORDS).title()
    return head | made | ({"$defs": maker.definitions} if maker.definitions else {})


class _Maker:
    """Makes the parts of one schema."""

    def __init__(self, rng: Random) -> None:
        self.rng = rng
        self.definitions: dict[str, Schema] = {}

    def any(self, depth: int) -> Schema:
        """A value of some kind; the deeper, the plainer."""
        kinds: list[tuple[float, Callable[[int], Schema]]] = [
            (30, lambda _: self.string()),
            (18, lambda _: self.number()),
            (10, lambda _: {"type": "boolean"}),
            (12, lambda _: self.enum()),
            (2, lambda _: {"type": "null"}),
            (2, lambda _: {"const": self.rng.choice(["a", 1, True, None, {"a": 1}, [1, 2]])}),
            (4, lambda _: self.nullable()),
        ]
        if depth < 3:
            kinds += [(14, self.object), (12, self.array), (5, self.any_of), (3, self.one_of), (2.5, self.all_of)]
            kinds += [(6, self.reference), (0.8, self.unserved)]
        weights, makers = zip(*kinds, strict=True)
        made: Schema = self.rng.choices(makers, weights)[0](depth)
        if self.rng.random() < 0.3:
            made = {"description": f"The {self.rng.choice(WORDS)}."} | made
        if "$ref" not in made and self.rng.random() < 0.04:
            made |= {"default": None}
        return made

    def object(self, depth: int) -> Schema:
        """Properties, some of them required, and what else may be there."""
        rng = self.rng
        names = rng.sample(WORDS, rng.choice([1, 2, 2, 3, 3, 4, 5, 6]) if depth else rng.randint(2, 8))
        made: Schema = {"type": "object", "properties": {name: self.any(depth + 1) for name in names}}
        if required := [name for name in names if rng.random() < 0.5]:
            made["required"] = required
        others = rng.random()
        if others < 0.5:
            made["additionalProperties"] = False
        elif others < 0.6:
            made["additionalProperties"] = self.any(3)
        if rng.random() < 0.03:
            made["patternProperties"] = {"^x-[a-z]+$": self.any(3)}
        if rng.random() < 0.015:
            made["minProperties"] = 1
        return made

    def array(self, depth: int) -> Schema:
        """Items of one kind, or a tuple."""
        rng = self.rng
        if rng.random() < 0.1:
            return {
                "type": "array",
                "prefixItems": [self.any(depth + 1) for _ in range(rng.randint(1, 3))],
                "items": False,
            }
        made: Schema = {"type": "array", "items": self.any(depth + 1)}
        if rng.random() < 0.35:
            made["minItems"] = rng.randint(0, 2)
        if rng.random() < 0.35:
            made["maxItems"] = made.get("minItems", 0) + rng.randint(1, 5)
        if rng.random() < 0.04:
            made["uniqueItems"] = True
        return made

    def string(self) -> Schema:
        """Free, or bounded by length, pattern or format."""
        rng, kind = self.rng, self.rng.random()
        if kind < 0.45:
            return {"type": "string"}
        if kind < 0.65:
            low = rng.randint(0, 8)
            bounds = {"minLength": low, "maxLength": low + rng.randint(1, 40)}
            return {"type": "string"} | {name: n for name, n in bounds.items() if rng.random() < 0.7}
        if kind < 0.83:
            return {"type": "string", "pattern": rng.choice(PATTERNS)}
        return {"type": "string", "format": rng.choice(FORMATS)}

    def number(self) -> Schema:
        """Whole or not, with or without bounds."""
        rng = self.rng
        made: Schema = {"type": rng.choice(["integer", "integer", "number"])}
        low = rng.choice([0, 0, 1, -90, -180, 10])
        if rng.random() < 0.45:
            made[rng.choice(["minimum", "minimum", "exclusiveMinimum"])] = low
        if rng.random() < 0.35:
            made[rng.choice(["maximum", "maximum", "exclusiveMaximum"])] = low + rng.choice([5, 100, 65535])
        if rng.random() < 0.04:
            made["multipleOf"] = rng.choice([2, 5, 10] if made["type"] == "integer" else [0.5, 0.01])
        return made

    def enum(self) -> Schema:
        """Texts, mostly."""
        rng = self.rng
        if rng.random() < 0.15:
            return {"enum": rng.sample([1, 2, 3, 5, 8, None, True, "other"], rng.randint(2, 5))}
        return {"type": "string", "enum": rng.sample(WORDS, rng.randint(2, 9))}

    def nullable(self) -> Schema:
        """One type or null."""
        return {"type": [self.rng.choice(["string", "integer", "boolean"]), "null"]}

    def any_of(self, depth: int) -> Schema:
        """Two or three ways."""
        return {"anyOf": [self.any(depth + 1) for _ in range(self.rng.randint(2, 3))]}

    def one_of(self, depth: int) -> Schema:
        """Ways told apart by their types or by a constant; now and then by nothing."""
        rng = self.rng
        if rng.random() < 0.15:
            return {"oneOf": [self.any(depth + 1), self.any(depth + 1)]}
        if rng.random() < 0.5:
            return {"oneOf": [self.string(), self.number(), {"type": "boolean"}][: rng.randint(2, 3)]}
        return {"oneOf": [self._tagged(name, depth) for name in rng.sample(WORDS, 2)]}

    def _tagged(self, name: str, depth: int) -> Schema:
        properties = {"kind": {"const": name}, "value": self.any(depth + 2)}
        return {"type": "object", "properties": properties, "required": ["kind"], "additionalProperties": False}

    def all_of(self, depth: int) -> Schema:
        """An object put together."""
        parts = []
        for name in self.rng.sample(WORDS, 2):
            parts.append({"type": "object", "properties": {name: self.any(depth + 1)}, "required": [name]})
        return {"allOf": parts}

    def reference(self, depth: int) -> Schema:
        """To a definition, perhaps one that refers to itself."""
        rng = self.rng
        if not self.definitions or rng.random() < 0.4:
            name = rng.choice(WORDS).title()
            if name not in self.definitions:
                self.definitions[name] = {}  # known while it is made
                made = self.object(depth + 1)
                if rng.random() < 0.25:
                    items = {"type": "array", "items": {"$ref": f"#/$defs/{name}"}, "maxItems": 3}
                    made["properties"]["children"] = items
                    made["required"] = [n for n in made.get("required", ()) if n != "children"]
                self.definitions[name] = made
        return {"$ref": f"#/$defs/{rng.choice(sorted(self.definitions))}"}

    def unserved(self, depth: int) -> Schema:
        """What no grammar says."""
        plain = self.object(depth + 1)
        return plain | self.rng.choice(
            [
                {"not": {"required": ["forbidden"]}},
                {"if": {"required": ["kind"]}, "then": {"required": ["size"]}},
                {"dependentRequired": {"city": ["country"]}},
                {"propertyNames": {"pattern": "^[a-z]+$"}},
            ]
        )
