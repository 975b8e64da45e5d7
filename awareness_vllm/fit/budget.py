"""What of a fit, its calibration and its certification goes into a budget of time."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from typing import Any

from awareness_vllm.errors import BadInput

LEAST_STEPS = 30
"""Calibration steps below which a map is not worth its regression."""
LEAST_JUDGED, MOST_JUDGED = 6, 48
"""Texts, and cases, of a certification: fewer say nothing, more are for `awareness certify`."""
JUDGED_SHARE = 0.15
"""Share of a budget for the certification, where the least takes less."""
ROWS_OF_FEATURES = (1, 2)
"""Anchor tokens as multiples of the features: the least, and those before any calibration counts
more."""
ANCHORS_SHARE = 0.3
MOST_TOKENS = 150_000
"""Share of what is left beside the fixed phases for anchors, the rest is calibration's
(docs/fidelity-log.md: it is worth more than any choice in the regression); and their most."""
CASE, METRICS = 0.7, 1.5
"""What a case, and the alignment metrics of the few texts that they take, cost beside a text: upper
bounds of what was measured on several pairs."""
RESERVE = 0.2
"""What is kept for the phases after the calibration beyond their estimates, as a share of them: the
calibration ends by the clock, they end by their counts."""


@dataclass(frozen=True)
class Speeds:
    """What this machine takes for a pair of models, in seconds.

    `row` is an anchor token, read by both and added to the sums; `weighing` the target states'
    importance and the choice of the ridge; `solving` the regression; `step` one of the calibration;
    `scoring` R² and files; `loading` both models anew, to certify with them; `text` one in all of
    its arms; `probe` all of this measuring, with what came before it.
    """

    row: float
    weighing: float
    solving: float
    step: float
    scoring: float
    loading: float
    text: float
    probe: float

    @property
    def case(self) -> float:
        """Seconds of a case in all of its arms."""
        return CASE * self.text

    @property
    def metrics(self) -> float:
        """Seconds of the alignment metrics."""
        return METRICS * self.text

    def judging(self, count: int) -> float:
        """Seconds of a certification on so many texts and as many cases."""
        return self.loading + self.metrics + count * (self.text + self.case)

    def after(self, count: int) -> float:
        """Seconds that are kept for all that follows the calibration."""
        return (1 + RESERVE) * (self.scoring + self.judging(count))

    def before(self, tokens: int) -> float:
        """Seconds of all that comes before the calibration."""
        return self.probe + tokens * self.row + self.weighing + self.solving


@dataclass(frozen=True)
class Plan:
    """A fit within a budget: anchor `tokens`, calibration `steps` that should fit (it ends by the
    clock), and how many texts and cases are `judged`."""

    tokens: int
    steps: int
    judged: int
    speeds: Speeds

    @property
    def phases(self) -> dict[str, float]:
        """Seconds that each phase should take, by name, in order."""
        speeds = self.speeds
        return {
            "measure this machine": speeds.probe,
            "read anchors": self.tokens * speeds.row,
            "weigh and solve": speeds.weighing + speeds.solving,
            "calibrate": self.steps * speeds.step,
            "score and save": speeds.scoring,
            "certify": speeds.judging(self.judged),
        }

    @property
    def overrun(self) -> float:
        """Seconds by which the budget can be exceeded while the machine is as fast as measured: a
        calibration step, or two texts or cases, that were begun before the time was up."""
        return max(self.speeds.step, 2 * self.speeds.text, 2 * self.speeds.case)

    def lines(self, budget: float) -> list[str]:
        """The plan as lines to print."""
        what = {
            "read anchors": f"{self.tokens:,} tokens at {1 / self.speeds.row:,.0f} a second",
            "calibrate": f"about {self.steps} steps of {self.speeds.step:.1f} s",
            "certify": f"{self.judged} texts and {self.judged} cases",
        }
        rows = [
            f"  {n:22}{clock(s):>8}  {what.get(n, '')}".rstrip() for n, s in self.phases.items()
        ]
        total = sum(self.phases.values())
        return [
            f"within {clock(budget)}, by what was measured here:",
            *rows,
            f"  {'in all':22}{clock(total):>8}  overrun at most {self.overrun:.0f} s at this speed",
        ]

    def as_json(self) -> dict[str, Any]:
        return asdict(self)

    @classmethod
    def restored(cls, document: Mapping[str, Any]) -> Plan:
        """The plan of `as_json`. Raises KeyError, TypeError for any other document."""
        speeds = Speeds(**{f.name: float(document["speeds"][f.name]) for f in fields(Speeds)})
        counts = {name: int(document[name]) for name in ("tokens", "steps", "judged")}
        return cls(speeds=speeds, **counts)


def least_seconds(speeds: Speeds, tokens: int) -> float:
    """Seconds of the least fit that is worth having, of so many anchor tokens."""
    return speeds.before(tokens) + LEAST_STEPS * speeds.step + speeds.after(LEAST_JUDGED)


def plan_fit(speeds: Speeds, budget: float, features: int, least: int) -> Plan:
    """What fits into a budget of so many seconds, the probe included.

    Args:
        features: F, by which anchor tokens are counted.
        least: the fewest anchor tokens.

    Raises:
        BadInput: not even the least fit; the error says what it takes.
    """
    least = max(least, ROWS_OF_FEATURES[0] * features)
    if budget < (needed := least_seconds(speeds, least)):
        raise BadInput(
            "the budget is too small for any map that is worth having",
            found=f"{clock(budget)}, of which measuring this machine took {clock(speeds.probe)}",
            expected=f"at least {clock(needed)}: {least:,} anchor tokens, {LEAST_STEPS} steps of "
            f"calibration, {LEAST_JUDGED} texts and as many cases to certify it by",
            remedy=f"give --budget {-(-int(needed) // 60)}m, or more",
        )
    share = JUDGED_SHARE * budget - speeds.judging(0)
    judged = min(MOST_JUDGED, max(LEAST_JUDGED, int(share / (speeds.text + speeds.case))))
    left = budget - speeds.before(0) - speeds.after(judged)
    enough = ROWS_OF_FEATURES[1] * features
    # Never so many that the least calibration has no room.
    most = int((left - LEAST_STEPS * speeds.step) / speeds.row)
    tokens = max(int(ANCHORS_SHARE * left / speeds.row), min(enough, most // 2))
    tokens = max(least, min(tokens, most, MOST_TOKENS))
    steps = max(LEAST_STEPS, int((left - tokens * speeds.row) / speeds.step))
    return Plan(tokens=tokens, steps=steps, judged=judged, speeds=speeds)


def clock(seconds: float) -> str:
    """Seconds as minutes and seconds: 3:05."""
    minutes, rest = divmod(round(seconds), 60)
    return f"{minutes}:{rest:02d}"
