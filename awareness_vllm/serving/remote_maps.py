"""Maps from a registry, pulled before vLLM starts: its workers load maps as they start."""

from __future__ import annotations

import logging
from pathlib import Path

from awareness_vllm.errors import BadInput
from awareness_vllm.files import home
from awareness_vllm.marketplace.files import pull
from awareness_vllm.oci.connect import open_repository
from awareness_vllm.oci.reference import SCHEME, Reference
from awareness_vllm.oci.repository import Repository
from awareness_vllm.oci.transfer import look
from awareness_vllm.trust.policy import TrustPolicy
from awareness_vllm.wmatrix.listing import listing_of

logger = logging.getLogger(__name__)


def local_map(wmatrix: str | Path, trust: TrustPolicy) -> Path:
    """The file of a map by its path, or by an `oci://` reference, which is pulled.

    Raises:
        BadInput: no such file, or not a reference with a tag or a digest.
        ArtefactNotFound, ArtefactCorrupt, WMatrixCorrupt, SignatureInvalid, RegistryError
    """
    if str(wmatrix).startswith(SCHEME):
        reference = Reference.parse(wmatrix)
        if reference.name is None:
            raise BadInput(
                "a map's reference names one artefact",
                found=wmatrix,
                expected=f"{SCHEME}HOST/REPOSITORY:TAG",
            )
        return pull_map(open_repository(reference), reference.name, trust)
    path = Path(wmatrix)
    if not path.is_file():
        raise BadInput(
            "no such W-Matrix",
            found=str(path),
            expected="a .wmatrix file",
            remedy="`awareness fit`",
        )
    return path


def pull_map(repository: Repository, name: str, trust: TrustPolicy) -> Path:
    """The file of a map in a repository, pulled unless it is there, its signatures beside it.

    Raises:
        ArtefactNotFound, ArtefactCorrupt, WMatrixCorrupt, SignatureInvalid, RegistryError
    """
    found = look(repository, name)
    listing_of(found)  # no memory, that is
    # Not among those that the operator keeps, which other commands use unasked.
    return pull(repository, found, home() / "cache" / "wmatrices", trust=trust).path
