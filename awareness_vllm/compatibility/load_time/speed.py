"""The rates of this machine for each part of a load: measured once, stored in a file.

`awareness doctor` measures it (rehearsal.py) and `cost.load_times_s` predicts with it.
"""

from __future__ import annotations

import datetime
import os
from pathlib import Path
from typing import Literal

from pydantic import Field, ValidationError

from awareness_vllm.files import atomic_write, home
from awareness_vllm.provenance import hardware, versions
from awareness_vllm.schema import FrozenModel

FILE = "doctor.json"


class Calibration(FrozenModel):
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
        with atomic_write(path) as draft:
            draft.write_text(self.model_dump_json(indent=2) + "\n")
        return path


def saved(path: Path | None = None) -> Calibration | None:
    """The stored measurement; None without one that this version reads."""
    try:
        return Calibration.model_validate_json((path or home() / FILE).read_bytes())
    except (OSError, ValidationError):
        return None


REFERENCE = Calibration(
    measured=datetime.datetime(2026, 11, 26, 11, 3, 47, tzinfo=datetime.UTC),
    hardware="2 × AMD EPYC",
    versions={"torch": "2.13.0+cpu", "transformers": "5.19.0"},
    threads=2,
    load=2.08,
    read_fixed_s=0.00201,
    read_bytes_per_s=1.766e9,
    text_tokens_per_s=2.812e5,
    align_fixed_s=0.00342,
    align_numbers_per_s=4.791e8,
    align_flop_per_s=3.915e11,
    write_layer_s=4.14e-5,
    write_bytes_per_s=4.215e9,
)
"""The rates of one machine, for an estimate where `awareness doctor` did not measure this one."""
