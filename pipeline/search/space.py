"""The space of recipes: which fields a trial sets, and the values it draws for them.

Fields are addressed through the recipe's schema by dotted path, list items by number:
``learning_rate``, ``router.learning_rate``, ``data.1.repeat``. The n-th draw depends on the
search's seed and on n alone, so a search that was interrupted, or is given more trials, goes
through the same ones.
"""

import json
import zlib
from collections.abc import Callable, Iterator
from typing import Any, get_args

import numpy as np
from pydantic import BaseModel, ValidationError

from pipeline.search.spec import Dimension
from pipeline.sweep_file import nearest
from stages.errors import BadInput
from stages.finetune.recipe import Recipe
from stages.finetune.refusals import contradictions

Values = dict[str, Any]
"""Dotted field of the recipe to the value that a trial sets; fields it leaves alone are absent."""


MOST_NUMBERS = 1000
"""Whole numbers of a range that are each tried before a search; of more, the ends are."""


class Space:
    """The fields that a search sets in a base recipe.

    Raises BadInput, one line per problem, for a field that the recipe does not have, a condition
    on a field that is not in the space, and conditions in a circle.

    ``own_top_k`` is the number of experts per token that the model has already, where that is
    known: a trial that draws it trains without ``router.top_k``.
    """

    def __init__(
        self, base: Recipe, dimensions: dict[str, Dimension], own_top_k: int | None = None
    ):
        self.base, self.own_top_k = base, own_top_k
        # What the sweep says; defaults of the schema are not said, so that validators of fields
        # that exclude each other see what the user wrote.
        self._given = base.model_dump(mode="json", by_alias=True, exclude_unset=True)
        self._whole = base.model_dump(mode="json", by_alias=True)
        self.dimensions = _ordered(dimensions)
        problems = [_unknown_field(path, base, self._whole) for path in dimensions]
        if any(problems):
            raise BadInput("\n".join(filter(None, problems)))
        self.whole_numbers = {
            path for path, dimension in dimensions.items()
            if dimension.bounds and _takes_whole_numbers(path, base)
        }

    def recipe(self, values: Values) -> Recipe:
        """The base recipe with values set; raises BadInput where the schema refuses one."""
        content = json.loads(json.dumps(self._given))
        for path, value in values.items():
            _set(content, path.split("."), value)
        try:
            recipe = type(self.base).model_validate_json(json.dumps(content), strict=True)
        except ValidationError as error:
            first = error.errors()[0]
            field = ".".join(map(str, first["loc"]))
            shown = f"{field}: " if field and field not in values else ""
            reason = first["msg"].removeprefix("Value error, ")
            raise BadInput(f"{shown}{reason[0].lower()}{reason[1:]}") from None
        for field, reason in contradictions(recipe):
            raise BadInput(f"{field}: {reason}")
        if recipe.router.top_k is not None and recipe.router.top_k == self.own_top_k:
            router = recipe.router.model_copy(update={"top_k": None})
            recipe = recipe.model_copy(update={"router": router})
        return recipe

    def active(self, path: str, values: Values) -> bool:
        """Whether a field is searched, given the values of the fields that its condition names."""
        return all(
            values.get(other, self.base_value(other)) in allowed
            for other, allowed in self.dimensions[path].when.items()
        )

    def base_value(self, path: str) -> Any:
        """The value of a field in the base recipe."""
        place: Any = self._whole
        for part in path.split("."):
            if place is None:
                return None
            place = place[int(part)] if isinstance(place, list) else place.get(part)
        return place

    def suggest(self, draw: Callable[[str, Dimension], Any]) -> Values:
        """Values of all fields that are active, each drawn after those its condition names."""
        values: Values = {}
        for path, dimension in self.dimensions.items():
            if self.active(path, values):
                values[path] = draw(path, dimension)
        return values

    def combinations(self) -> list[Values]:
        """Every combination of the grids; one without values where there is none.

        A field under a condition adds its values only to combinations that meet it.
        """
        points: list[Values] = [{}]
        for path, dimension in self.dimensions.items():
            if dimension.grid is None:
                continue
            points = [
                longer for point in points
                for longer in ([{**point, path: value} for value in dimension.grid]
                               if self.active(path, point) else [point])
            ]
        return points

    def draw(self, seed: int, number: int) -> Values:
        """Trial ``number`` of random search; trials go through the grids in turn."""
        points = self.combinations()
        point = points[number % len(points)]

        def value(path: str, dimension: Dimension) -> Any:
            if dimension.grid is not None:
                return point[path]
            # A number of its own for each field: both sides of a pair draw the same values for the
            # fields that they share.
            entropy = [seed, number, zlib.crc32(path.encode())]
            return self.quantile(path, np.random.default_rng(entropy).random())

        return self.suggest(value)

    def quantile(self, path: str, share: float) -> Any:
        """The value below which a share, in [0, 1), of a field's distribution lies."""
        dimension = self.dimensions[path]
        if dimension.values is not None:
            return dimension.values[int(share * len(dimension.values))]
        low, high = dimension.bounds
        whole = path in self.whole_numbers
        if whole:
            low, high = low - 0.5, high + 0.5  # so that both ends are as likely as the others
        if dimension.log_uniform:
            found = float(np.exp(np.log(low) + share * (np.log(high) - np.log(low))))
        else:
            found = low + share * (high - low)
        return self.inside(path, found) if whole else found

    def inside(self, path: str, value: float) -> float | int:
        """A number brought into a field's range, and to a whole one where the field takes those."""
        low, high = self.dimensions[path].bounds
        value = min(max(value, low), high)
        return int(min(max(round(value), low), high)) if path in self.whole_numbers else value

    def probes(self) -> Iterator[tuple[str, Values]]:
        """Field and values that try, one at a time, each listed value and both ends of ranges."""
        for path, dimension in self.dimensions.items():
            ends = dimension.values
            if ends is None:
                ends = tuple(self.inside(path, bound) for bound in dimension.bounds)
            for value in ends:
                values = self._meeting(path)
                yield path, {**values, path: value}

    def drawable(self) -> Iterator[tuple[str, Values]]:
        """Field and values as in ``probes``, then every whole number that a range can draw, unless
        there are more than ``MOST_NUMBERS``."""
        yield from self.probes()
        for path in sorted(self.whole_numbers):
            low, high = (self.inside(path, bound) for bound in self.dimensions[path].bounds)
            if high - low < MOST_NUMBERS:
                for value in range(low + 1, high):
                    yield path, {**self._meeting(path), path: value}

    def _meeting(self, path: str) -> Values:
        """Values of the fields that a field's condition names, such that it is met."""
        values: Values = {}
        for other, allowed in self.dimensions[path].when.items():
            values |= self._meeting(other)
            values[other] = allowed[0]
        return values


def _ordered(dimensions: dict[str, Dimension]) -> dict[str, Dimension]:
    """The dimensions, each after those that its condition names."""
    ordered: dict[str, Dimension] = {}

    def add(path: str, below: tuple[str, ...]) -> None:
        if path in below:
            raise BadInput(f"{path}.when: waits for itself ({' for '.join((*below, path))}); "
                           "break the circle")
        for other, allowed in dimensions[path].when.items():
            if other not in dimensions:
                raise BadInput(f"{path}.when: {other} is not in the space; "
                               "name a field that is searched")
            known = dimensions[other].values
            strange = [v for v in allowed if known is not None and v not in known]
            if known is None or strange:
                shown = f"{strange[0]!r} is none of its values" if strange else "it is a range"
                raise BadInput(f"{path}.when.{other}: {shown}; name values of a choice or grid")
            if dimensions[path].grid is not None and dimensions[other].grid is None:
                raise BadInput(f"{path}.when.{other}: is drawn, and grids are gone through in "
                               f"turn; write {other} as a grid, or {path} as a choice")
            if other not in ordered:
                add(other, (*below, path))
        ordered.setdefault(path, dimensions[path])

    for path in dimensions:
        add(path, ())
    return ordered


def _set(place: Any, parts: list[str], value: Any) -> None:
    """Set a dotted field in JSON content, with mappings made where there are none."""
    *parents, last = parts
    for part in parents:
        if isinstance(place, list):
            place = place[int(part)]
        else:
            if place.get(part) is None:
                place[part] = {}
            place = place[part]
    if isinstance(place, list):
        place[int(last)] = value
    else:
        place[last] = value


def _unknown_field(path: str, base: Recipe, content: dict) -> str | None:
    """Why a dotted path names no field of a recipe; None if it names one."""
    models: list[type[BaseModel]] = [type(base)]
    place: Any = content
    parts = path.split(".")
    for depth, part in enumerate(parts):
        before = ".".join(parts[:depth])
        if isinstance(place, list):
            if not part.isdigit() or int(part) >= len(place):
                return f"{path}: {before} has {len(place)} items; count from 0"
            place = place[int(part)]
            continue
        fields = {f.alias or name: f for m in models for name, f in m.model_fields.items()}
        if part not in fields:
            return f"{path}: unknown field{nearest(part, list(fields))}"
        models = _models(fields[part].annotation)
        place = place.get(part) if isinstance(place, dict) else None
        if depth < len(parts) - 1 and place is not None and not isinstance(place, dict | list):
            whole = ".".join(parts[: depth + 1])
            return (f"{path}: {whole} is {place!r} in the base recipe and has no such part; write "
                    f"it out there, or search {whole} as a whole")
    return None


def _takes_whole_numbers(path: str, base: Recipe) -> bool:
    annotation: Any = type(base)
    for part in path.split("."):
        if part.isdigit():
            continue
        for model in _models(annotation):
            for name, field in model.model_fields.items():
                if part in (name, field.alias):
                    annotation = field.annotation
    leaves = _leaves(annotation)
    return int in leaves and float not in leaves


def _models(annotation: Any) -> list[type[BaseModel]]:
    return [leaf for leaf in _leaves(annotation)
            if isinstance(leaf, type) and issubclass(leaf, BaseModel)]


def _leaves(annotation: Any) -> list[Any]:
    """The types of a union or container, without the containers."""
    arguments = get_args(annotation)
    return [leaf for a in arguments for leaf in _leaves(a)] if arguments else [annotation]
