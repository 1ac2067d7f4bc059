"""Base class and shared types of the settings. Imports no torch."""

from __future__ import annotations

import inspect
from typing import Annotated, Any, Literal, TypeVar

from pydantic import BaseModel, ConfigDict, Field

T = TypeVar("T")

Positive = Annotated[int, Field(ge=1)]
Share = Annotated[float, Field(ge=0.0, le=1.0)]
Decay = Annotated[float, Field(ge=0.0, lt=1.0)]

OnResume = Literal["identity", "rounding", "free", "later"]
"""What changing a setting does to a run that is resumed."""

Identity = Annotated[T, Field(json_schema_extra={"on_resume": "identity"})]
"""Another value is another run: refused."""
Rounding = Annotated[T, Field(json_schema_extra={"on_resume": "rounding"})]
"""The result is the same within rounding: other shapes or kernels, so sums are added in another order."""
Free = Annotated[T, Field(json_schema_extra={"on_resume": "free"})]
"""The result is the same, bit for bit."""
Later = Annotated[T, Field(json_schema_extra={"on_resume": "later"})]
"""Accepted, but steps after the resume differ from those of a run that kept the old value."""


class Settings(BaseModel):
    """Base of all sections: frozen; unknown keys are errors; the string under a field is its description.

    Every setting says what changing it on resume does: :data:`Identity`, :data:`Rounding`, :data:`Free` or
    :data:`Later`.
    """

    model_config = ConfigDict(
        frozen=True, extra="forbid", allow_inf_nan=False, use_attribute_docstrings=True, protected_namespaces=()
    )

    @classmethod
    def __pydantic_init_subclass__(cls, **kwargs: Any) -> None:
        for name, field in cls.model_fields.items():
            is_section = inspect.isclass(field.annotation) and issubclass(field.annotation, Settings)
            extra = field.json_schema_extra
            if not is_section and not (isinstance(extra, dict) and "on_resume" in extra):
                raise TypeError(
                    f"{cls.__name__}.{name} does not say what changing it on resume does: declare its type as "
                    "Identity[...], Rounding[...], Free[...] or Later[...] (config/base.py)."
                )
