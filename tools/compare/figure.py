"""A measured figure with its target, as a JSON line."""

import json
import os
import platform
from dataclasses import dataclass, field, fields
from functools import cache
from pathlib import Path
from typing import Any, Literal


@cache
def describe_core() -> str:
    """Return the GPU, or the CPU with its vector instructions and number of cores, in words."""
    import torch

    if torch.cuda.is_available():
        return torch.cuda.get_device_name()
    info = Path("/proc/cpuinfo")
    lines = info.read_text(encoding="utf-8").splitlines() if info.exists() else []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    name = names[0] if names else platform.processor() or platform.machine()
    capability = torch.backends.cpu.get_cpu_capability()
    return f"{name}, {capability}, {os.cpu_count()} cores"


@dataclass(frozen=True, kw_only=True, slots=True)
class Figure:
    """One measured number."""

    figure: str
    """Name, such as `stream.synthetic.warm`."""
    value: float
    unit: str
    target: float | None = None
    """None: the figure has no target."""
    sense: Literal["at most", "at least"] = "at most"
    """Side of the target on which a good value lies."""
    details: dict[str, Any] = field(default_factory=dict)
    """Further measurements, plain JSON values."""
    core: str = field(default_factory=describe_core)
    """Processor that ran it."""

    def __post_init__(self) -> None:
        """Refuse details that would overwrite a field in the JSON line."""
        names = {"met", *(item.name for item in fields(self))}
        if taken := sorted(names & self.details.keys()):
            raise ValueError(f"{self.figure}: expected other names for the details {taken}")

    @property
    def met(self) -> bool | None:
        """Whether the value reaches the target; None without one."""
        if self.target is None:
            return None
        return self.value <= self.target if self.sense == "at most" else self.value >= self.target

    def to_dict(self) -> dict[str, Any]:
        """Return plain JSON values, the details beside the fields."""
        return {
            "figure": self.figure,
            "value": _rounded(self.value),
            "target": self.target,
            "sense": self.sense,
            "unit": self.unit,
            "met": self.met,
            "core": self.core,
            **{name: _rounded(value) for name, value in self.details.items()},
        }


def print_json(figure: Figure) -> None:
    """Print one JSON line to stdout and flush it, for a run that is killed later."""
    print(json.dumps(figure.to_dict()), flush=True)


def _rounded(value: Any) -> Any:  # noqa: ANN401 -- any JSON value
    if isinstance(value, float):
        return float(f"{value:.6g}")
    if isinstance(value, dict):
        return {name: _rounded(item) for name, item in value.items()}
    if isinstance(value, list):
        return [_rounded(item) for item in value]
    return value
