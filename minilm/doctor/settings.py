"""What a run is told about its checks (section `doctor`)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, Literal

from pydantic import Field


@dataclass(frozen=True, kw_only=True)
class DoctorConfig:
    """Section `doctor`."""

    check: Annotated[
        Literal["quick", "off"],
        Field(
            description="before the first step: the quick suite on what will train; a failure stops the run"
        ),
    ] = "quick"
    watch: Annotated[bool, Field(description="go on checking while the run trains")] = True
    watch_share: Annotated[
        float, Field(gt=0, le=1, description="of the time that watching may take at most")
    ] = 0.005
    on_failure: Annotated[
        Literal["report", "stop"], Field(description="what a failure found by the watch does to the run")
    ] = "report"
