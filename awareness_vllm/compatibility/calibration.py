"""What this machine needs for each part of a load: measured once, kept in a file.

`awareness doctor` measures it (rehearsal.py) and `cost.load_times_s` predicts with it.
"""

from __future__ import annotations

import datetime
import os
from pathlib import Path
from typing import Literal

from pydantic import Field, ValidationError

from awareness_vllm.files import write_whole
from awareness_vllm.geometry import Strict
from awareness_vllm.home import home
from awareness_vllm.provenance import hardware, versions

FILE = "doctor.json"


class Calibration(Strict):
    """Fixed seconds, and units per second, of the parts of a load on a CPU.

    `read`: the package's bytes. `text`: tokenizing it, by token. `align`: the map, by numbers that
    it reads and gives and by floating point operations. `write`: into the KV cache, by bytes, and
    seconds for each layer. `load` is the machine's load average when it began.
    """

    format: Literal["awareness-doctor/1"] = "awareness-doctor/1"
    measured: datetime.datetime
    hardware: str
    versions: dict[str, str]
    threads: int = Field(gt=0)
    load: float = Field(ge=0)
    read_fixed_s: float = Field(ge=0)
    read_bytes_per_s: float = Field(gt=0)
    text_tokens_per_s: float = Field(gt=0)
    align_fixed_s: float = Field(ge=0)
    align_numbers_per_s: float = Field(gt=0)
    align_flop_per_s: float = Field(gt=0)
    write_layer_s: float = Field(ge=0)
    write_bytes_per_s: float = Field(gt=0)

    def read_s(self, size: int) -> float:
        return self.read_fixed_s + size / self.read_bytes_per_s

    def align_s(self, tokens: int, numbers: float, flop: float) -> float:
        """Of a whole memory: its text's tokens, and what the map does for all of them."""
        mapped = numbers / self.align_numbers_per_s + flop / self.align_flop_per_s
        return self.align_fixed_s + tokens / self.text_tokens_per_s + mapped

    def write_s(self, layers: int, size: int) -> float:
        return layers * self.write_layer_s + size / self.write_bytes_per_s

    @property
    def disturbed(self) -> bool:
        """Whether other work was running on half of the cores or more."""
        return self.load >= 0.5 * (os.cpu_count() or 1)

    @property
    def here(self) -> bool:
        """Whether it was taken on such a machine, with these libraries."""
        return (self.hardware, self.versions) == (hardware(), versions())

    def save(self, path: Path | None = None) -> Path:
        """Write it, by default to `$AWARENESS_HOME/doctor.json`; the file's path."""
        path = path or home() / FILE
        path.parent.mkdir(parents=True, exist_ok=True)
        write_whole(path, self.model_dump_json(indent=2) + "\n")
        return path


def saved(path: Path | None = None) -> Calibration | None:
    """What was measured before; None where nobody did, or another version of this program."""
    try:
        return Calibration.model_validate_json((path or home() / FILE).read_bytes())
    except (OSError, ValidationError):
        return None


def calibrated(*, again: bool = False) -> Calibration:
    """What was measured of this machine; measured now where nobody did, and kept."""
    found = saved()
    if found is None or not found.here or again:
        from awareness_vllm.compatibility.rehearsal import calibrate

        found = calibrate()
        found.save()
    return found


def line(small: tuple[float, float], large: tuple[float, float]) -> tuple[float, float]:
    """Fixed seconds, and units per second, of the line through two measurements (units, seconds).

    Neither is ever negative: on a busy machine the larger one can take less time, and then nothing
    is known but the rate of the whole.
    """
    slope = (large[1] - small[1]) / (large[0] - small[0])
    if slope <= 0 or slope * small[0] >= small[1]:
        return 0.0, large[0] / large[1]
    return small[1] - slope * small[0], 1 / slope
