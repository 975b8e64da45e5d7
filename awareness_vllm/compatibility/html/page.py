"""A report, a matrix, a map's heads or a catalogue as one HTML page: no request, all escaped, no
script but the catalogue's, whose digest the page's policy names."""

from __future__ import annotations

import base64
import functools
import hashlib
from typing import TYPE_CHECKING, Any

from jinja2 import Environment, PackageLoader, StrictUndefined

from awareness_vllm.compatibility.html import charts, figures
from awareness_vllm.compatibility.report import LEVELS, REMAINDER, CompatibilityReport, Matrix
from awareness_vllm.wmatrix.certificate import Interval

if TYPE_CHECKING:
    from awareness_vllm.compatibility.catalogue import Catalogue
    from awareness_vllm.wmatrix.heads import HeadShares


def page(
    *,
    report: CompatibilityReport | None = None,
    matrix: Matrix | None = None,
    heads: HeadShares | None = None,
    catalogue: Catalogue | None = None,
) -> str:
    """One self-contained HTML document with a section for each part that is known.

    Args:
        report: what a memory would be on a target.
        matrix: all pairs; measured cells and priors differ at a glance.
        heads: which source heads the W-Matrix listens to.
        catalogue: memories and maps to search in; its matrix is shown above them.
    """
    matrix = catalogue.matrix if catalogue else matrix
    template = environment().get_template("page.html.j2")
    return template.render(report=report, matrix=matrix, heads=heads, catalogue=catalogue)


@functools.cache
def environment() -> Environment:
    """The templates beside this file. Names of models and memories are anybody's text: everything
    is escaped, and no template marks anything as safe."""
    made = Environment(
        loader=PackageLoader(__package__, ""),
        autoescape=True,
        undefined=StrictUndefined,
        finalize=shortened,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    made.tests["prior"] = figures.is_prior
    made.filters.update(plan=figures.plan, metric=figures.metric)
    made.globals.update(charts=charts, figures=figures, Interval=Interval)
    made.globals.update(LEVELS=LEVELS, REMAINDER=REMAINDER, script_digest=script_digest)
    made.policies["json.dumps_kwargs"] = {"separators": (",", ":")}
    return made


def script_digest() -> str:
    """The digest of the catalogue's script, as a Content-Security-Policy names it."""
    script = environment().get_template("catalogue.js").render()
    return f"sha256-{base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()}"


def shortened(value: Any) -> Any:
    """A value as templates print it: six digits of a coordinate."""
    return f"{value:.6g}" if isinstance(value, float) else value
