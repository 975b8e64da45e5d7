"""Licenses as listings and cards name them."""

from __future__ import annotations

from packaging.licenses import InvalidLicenseExpression, canonicalize_license_expression

from awareness_vllm.errors import BadInput, similar_names

HUB = frozenset(
    [
        "apache-2.0",
        "mit",
        "openrail",
        "openrail++",
        "bigscience-openrail-m",
        "creativeml-openrail-m",
        "bigscience-bloom-rail-1.0",
        "bigcode-openrail-m",
        "afl-3.0",
        "artistic-2.0",
        "bsl-1.0",
        "bsd",
        "bsd-2-clause",
        "bsd-3-clause",
        "bsd-3-clause-clear",
        "c-uda",
        "cc",
        "cc0-1.0",
        "cc-by-2.0",
        "cc-by-2.5",
        "cc-by-3.0",
        "cc-by-4.0",
        "cc-by-sa-3.0",
        "cc-by-sa-4.0",
        "cc-by-nc-2.0",
        "cc-by-nc-3.0",
        "cc-by-nc-4.0",
        "cc-by-nd-4.0",
        "cc-by-nc-nd-3.0",
        "cc-by-nc-nd-4.0",
        "cc-by-nc-sa-2.0",
        "cc-by-nc-sa-3.0",
        "cc-by-nc-sa-4.0",
        "cdla-sharing-1.0",
        "cdla-permissive-1.0",
        "cdla-permissive-2.0",
        "wtfpl",
        "ecl-2.0",
        "epl-1.0",
        "epl-2.0",
        "etalab-2.0",
        "eupl-1.1",
        "eupl-1.2",
        "agpl-3.0",
        "gfdl",
        "gpl",
        "gpl-2.0",
        "gpl-3.0",
        "lgpl",
        "lgpl-2.1",
        "lgpl-3.0",
        "lgpl-lr",
        "isc",
        "lppl-1.3c",
        "ms-pl",
        "mpl-2.0",
        "odc-by",
        "odbl",
        "osl-3.0",
        "pddl",
        "postgresql",
        "ofl-1.1",
        "ncsa",
        "unlicense",
        "zlib",
        "deepfloyd-if-license",
        "llama2",
        "llama3",
        "llama3.1",
        "llama3.2",
        "llama3.3",
        "llama4",
        "gemma",
        "apple-ascl",
        "apple-amlr",
        "h-research",
        "intel-research",
        "unknown",
        "other",
    ]
)
"""The names of licenses on the Hugging Face hub, with which model cards come: most are those of
SPDX in small letters, and some, such as `gemma`, SPDX does not have."""


def canonical_license(license: str) -> str:
    """A license as a listing has it: an SPDX expression in its canonical form, which takes the
    hub's names along, or a name that the hub alone has, as it is there.

    Raises:
        BadInput: neither.
    """
    text = str(license)
    try:
        return canonicalize_license_expression(text)
    except InvalidLicenseExpression as error:
        if text.casefold() in HUB:
            return text.casefold()
        similar = " or ".join(similar_names(text, HUB)[:3])
        raise BadInput(
            "the license cannot be used",
            found=ascii(text)[:80],
            expected="an SPDX expression such as CC-BY-4.0 or Apache-2.0 OR MIT, or a name of the "
            "Hugging Face hub such as gemma",
            remedy=f"{similar and f'{similar}, if that is meant; '}LicenseRef-NAME for a license "
            "that neither has",
        ) from error
