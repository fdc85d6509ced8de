"""What settings are made of: a frozen section, and numbers with their bounds."""

from typing import Annotated

from pydantic import BaseModel, ConfigDict, Field

Positive = Annotated[int, Field(ge=1)]
NonNegative = Annotated[int, Field(ge=0)]
Rate = Annotated[float, Field(ge=0.0)]
Share = Annotated[float, Field(ge=0.0, le=1.0)]
Duration = Annotated[float, Field(gt=0.0)]


class Section(BaseModel):
    """A frozen part of the configuration; every field documents itself below its line."""

    model_config = ConfigDict(frozen=True, extra="forbid", use_attribute_docstrings=True)
