"""What every section of a recipe has in common: frozen, nothing unknown, nothing coerced, and every fault of a combination named.

A section lists its impossible combinations in `faults`; the loader turns each into a problem at the place of the key it names.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Annotated, Self

from pydantic import AfterValidator, BaseModel, BeforeValidator, ConfigDict, Field, model_validator
from pydantic_core import PydanticCustomError

from qwha_cli.catalog import nearest

COMBINATION = "combination"
UNKNOWN_NAME = "unknown_name"

Count = Annotated[int, Field(ge=1)]
Fraction = Annotated[float, Field(ge=0, lt=1)]
Positive = Annotated[float, Field(gt=0, allow_inf_nan=False)]
NotNegative = Annotated[float, Field(ge=0, allow_inf_nan=False)]
Text = Annotated[str, Field(min_length=1)]


@dataclass(frozen=True)
class Fault:
    """Keys that cannot stand together: where to look (relative to the section), what is wrong, what to do."""

    path: tuple[str, ...]
    message: str
    hint: str | None = None


class Section(BaseModel):
    """A frozen part of a recipe."""

    # strict: a quoted "64" is text, not a number, and `true` is no 1; inf and nan are no settings
    model_config = ConfigDict(frozen=True, extra="forbid", strict=True, allow_inf_nan=False)

    def faults(self) -> Iterator[Fault]:
        """Yield every impossible combination of this section's own keys."""
        yield from ()

    @model_validator(mode="after")
    def _refuse_faults(self) -> Self:
        faults = list(self.faults())
        if faults:
            raise PydanticCustomError(COMBINATION, "impossible combination", {"faults": faults})
        return self


def shaped(pattern: str, *, expected: str) -> AfterValidator:
    """Return a validator that admits texts of a pattern, and says in words what it expects."""

    def check(value: str) -> str:
        if re.fullmatch(pattern, value) is None:
            message = f"expected {expected}, got {value}"
            raise ValueError(message)
        return value

    return AfterValidator(check)


def split_without(word: str, *, because: str) -> AfterValidator:
    """Return a validator that refuses splits with `word` in their names."""

    def check(value: str) -> str:
        if word in value.lower():
            message = f"the split {value} is refused: {because}"
            raise ValueError(message)
        return value

    return AfterValidator(check)


def name_from(names: Mapping[str, str], *, what: str) -> AfterValidator:
    """Return a validator that admits the names of a catalogue only."""

    def check(value: str) -> str:
        if value not in names:
            raise unknown_name(value, names, what=what)
        return value

    return AfterValidator(check)


def unknown_name(value: str, names: Mapping[str, str], *, what: str) -> PydanticCustomError:
    """Return the error for a name that is not in a catalogue; it lists the valid names and carries the nearest."""
    message = "{what} {value} is unknown; known: {known}"
    return PydanticCustomError(
        UNKNOWN_NAME, message, {"what": what, "value": value, "known": ", ".join(sorted(names)), "nearest": nearest(value, names)}
    )


def as_mapping(key: str) -> BeforeValidator:
    """Return a validator that reads a plain string as the mapping `{key: string}`."""

    def expand(value: object) -> object:
        return {key: value} if isinstance(value, str) else value

    return BeforeValidator(expand)


def as_tuple(inner: Callable[[object], object] = lambda item: item) -> BeforeValidator:
    """Return a validator that reads a YAML list as a tuple, so that a frozen recipe holds nothing that can change."""

    def convert(value: object) -> object:
        return tuple(inner(item) for item in value) if isinstance(value, list) else value

    return BeforeValidator(convert)
