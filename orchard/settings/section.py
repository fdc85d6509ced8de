"""What settings are made of: a frozen section, and a number with its bounds."""

from typing import Annotated

from pydantic import BaseModel, ConfigDict, Field

Fraction = Annotated[float, Field(ge=0.0, le=1.0)]


class Section(BaseModel):
    """A frozen part of the configuration; every field documents itself below its line."""

    model_config = ConfigDict(frozen=True, extra="forbid", use_attribute_docstrings=True)
