"""What every section of the configuration is made of: the frozen model, strict number types, `Auto`, and error text.

JSON has one number type and Python's truth values are integers, so the types here say exactly what is taken: an
integral float such as 5e8 is a whole number, a bool never is, a string never is, NaN and infinity are refused.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Annotated, Any, TypeVar

from annotated_types import Ge, Gt, Le, Lt
from pydantic import (
    AfterValidator,
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    GetCoreSchemaHandler,
    GetJsonSchemaHandler,
    StrictBool,
    StrictStr,
)
from pydantic.json_schema import JsonSchemaValue
from pydantic_core import CoreSchema, PydanticCustomError, core_schema

from trilith.errors import Violation

T = TypeVar("T")

AUTO = "auto"
LARGEST_INT = 2**63 - 1
LONGEST_SHOWN = 100


class ConfigModel(BaseModel):
    """A section: frozen, with no other keys than its fields."""

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)


def key(default: Any, meaning: str, unit: str = "") -> Any:
    """A field with `default` (`...` if it must be given), its meaning and its unit; returns what pydantic expects."""
    return Field(default=default, description=f"{meaning} Unit: {unit}." if unit else meaning)


@dataclass(frozen=True)
class Door:
    """Lets one value that is not of the marked type through: `passes`, also when null is written for it."""

    passes: str | None

    def __get_pydantic_core_schema__(self, source: Any, handler: GetCoreSchemaHandler) -> CoreSchema:
        """The marked type's schema behind the door."""

        def enter(value: Any, inner: Callable[[Any], Any]) -> Any:
            return self.passes if value is None or (self.passes and value == self.passes) else inner(value)

        as_it_is = core_schema.plain_serializer_function_ser_schema(_as_it_is)
        return core_schema.no_info_wrap_validator_function(enter, handler(source), serialization=as_it_is)

    def __get_pydantic_json_schema__(self, schema: CoreSchema, handler: GetJsonSchemaHandler) -> JsonSchemaValue:
        """What passes, null, or what the marked type takes."""
        return {"anyOf": [{"enum": [self.passes, None]}, handler(schema)]} if self.passes else handler(schema)


def _as_it_is(value: Any) -> Any:
    return value


def _whole_number(value: Any) -> Any:
    """An integral float as int; refuses bools, which Python takes for integers."""
    if isinstance(value, float) and value.is_integer():
        value = int(value)
    if isinstance(value, bool) or not isinstance(value, int):
        raise PydanticCustomError("whole_number", "must be a whole number")
    if abs(value) > LARGEST_INT:
        raise PydanticCustomError("whole_number", "must fit into 64 bits")
    return value


def _real_number(value: Any) -> Any:
    """A finite number that is no bool and no string."""
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        raise PydanticCustomError("real_number", "must be a number")
    if isinstance(value, int) and abs(value) > LARGEST_INT:
        raise PydanticCustomError("real_number", "must fit into 64 bits")
    return float(value)


def _not_blank(value: str) -> str:
    if not value.strip() or "\0" in value:
        raise PydanticCustomError("not_blank", "must not be blank")
    return value


# A type checker sees T; at run time the value may be "auto" until `resolve` has replaced it.
Auto = Annotated[T, Door(AUTO)]
# Likewise: None where the section is absent, which only `resolve(needs="engine")` lets through.
OrAbsent = Annotated[T, Door(None)]
# The bounds come before the validator that looks at the JSON value first, so that they end up in the schema.
WholeNumber = BeforeValidator(_whole_number)
RealNumber = BeforeValidator(_real_number)
Bool = StrictBool
Str = StrictStr
Text = Annotated[StrictStr, AfterValidator(_not_blank)]
Int = Annotated[int, WholeNumber]
Count = Annotated[int, Ge(1), WholeNumber]
CountOrZero = Annotated[int, Ge(0), WholeNumber]
# Up to float32's exponent range: a loss scale beyond it overflows before the first backward.
Power = Annotated[int, Ge(0), Le(126), WholeNumber]
Float = Annotated[float, RealNumber]
Positive = Annotated[float, Gt(0.0), RealNumber]
NotNegative = Annotated[float, Ge(0.0), RealNumber]
Fraction = Annotated[float, Ge(0.0), Le(1.0), RealNumber]
BelowOne = Annotated[float, Ge(0.0), Lt(1.0), RealNumber]


@dataclass(frozen=True)
class NotGiven:
    """Stands for the value of a key that is missing."""

    def __repr__(self) -> str:
        return "(not given)"


@dataclass(frozen=True)
class Excerpt:
    """The beginning of a value too long to show."""

    text: str

    def __repr__(self) -> str:
        return self.text


@dataclass(frozen=True)
class LocatedViolation(Violation):
    """A violation that knows where its key stands: `where` is "file:line" or "--set"."""

    where: str = ""

    def __str__(self) -> str:
        text = super().__str__()
        return f"{self.where}: {text}" if self.where else text


def shown(value: Any) -> Any:
    """`value` itself, or an excerpt where its text would drown the message."""
    try:
        text = repr(value)
    except (ValueError, RecursionError):  # an integer of more digits than Python prints, a list nested too deep
        return Excerpt(f"({type(value).__name__} too long to show)")
    return value if len(text) <= LONGEST_SHOWN else Excerpt(text[: LONGEST_SHOWN - 3] + "...")


def dotted(path: tuple[str | int, ...]) -> str:
    """`("optimizer", "param_groups", 0, "pattern")` as `optimizer.param_groups[0].pattern`."""
    text = ""
    for part in path:
        name = part or '""'
        text += f"[{part}]" if isinstance(part, int) else f".{name}" if text else str(name)
    return text
