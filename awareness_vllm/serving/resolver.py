"""From the memory IDs of a request to the beginning of its prompt, in the server's front end."""

from __future__ import annotations

import functools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from awareness_vllm.errors import (
    AwarenessError,
    MemoryNotFound,
    PackageCorrupt,
    QualityUnreachable,
    SignatureInvalid,
    UnsupportedRequest,
)
from awareness_vllm.models.tokens import load_tokenizer, tokenize
from awareness_vllm.packages.file import PackageIndex, read_index
from awareness_vllm.packages.listing import PackageListing
from awareness_vllm.packages.manifest import Manifest, corrupt_package
from awareness_vllm.packages.origin import Origin, is_own
from awareness_vllm.packages.store import Store, digest_in, version_of
from awareness_vllm.passages.quotes import Quoting
from awareness_vllm.passages.vectors import word_vectors
from awareness_vllm.serving.config import ServingConfig
from awareness_vllm.serving.prompt import Prompt
from awareness_vllm.serving.registry import drop_damaged
from awareness_vllm.serving.request import MemoryRequest
from awareness_vllm.serving.resolved_memory import ResolvedMemory
from awareness_vllm.serving.served_model import ServedModel
from awareness_vllm.serving.tenants import stores_of
from awareness_vllm.serving.trust import trust_of, trusted_maps
from awareness_vllm.trust.policy import TrustPolicy, signature_path
from awareness_vllm.wmatrix.registry import Registry
from awareness_vllm.wmatrix.verdict import Verdict, check_fits, verdict

NO_TRUST = TrustPolicy()
MAX_RESOLVED = 1024
"""Memories whose prompt ids are cached, so that a hot request does not tokenize them again."""


@dataclass(frozen=True)
class CheckedPackage:
    """A package of a store whose bytes were read and checked; `signed_by` is the trusted key that
    signed it. `use` says what the served model can do with it: a memory, or the error that refuses
    it."""

    path: Path
    manifest: Manifest
    origin: Origin
    signed_by: str | None
    use: ResolvedMemory | AwarenessError


class MemoryResolver:
    """Looks memories up in the tenants' stores for one served model. Reads files, never the engine.

    Args:
        stores: by tenant.
        registry: the W-Matrices at hand.
        tail: last tokens of a realigned memory that the model reads itself.
        trust: whose signatures count.
        signed: whether packages must be signed, but for those captured here.
        reread, quote: tokens of each memory that a question has re-read, or quoted, unless its
            request says how many.
    """

    def __init__(
        self,
        model: ServedModel,
        stores: Mapping[str, Store],
        registry: Registry,
        tail: int,
        trust: TrustPolicy = NO_TRUST,
        *,
        signed: bool = False,
        reread: int = 0,
        quote: int = 0,
    ) -> None:
        self.reread, self.quote = reread, quote
        self.model, self.stores, self.registry, self.tail = model, stores, registry, tail
        self.trust, self.signed = trust, signed
        # A file is read again where its version has changed.
        self._check_version = functools.lru_cache(MAX_RESOLVED)(self._check)

    @classmethod
    def from_config(cls, config: ServingConfig, model: ServedModel) -> MemoryResolver:
        """Raises BadInput, WMatrixCorrupt, SignatureInvalid: a tenants file, a trust file or a
        W-Matrix that cannot be used, or one that is not signed and must be."""
        trust = trust_of(config)
        maps, signed = trusted_maps(config, trust), config.signed == "all"
        stores = stores_of(config)
        return cls(
            model,
            stores,
            maps,
            config.tail,
            trust,
            signed=signed,
            reread=config.reread,
            quote=config.quote,
        )

    def with_model(self, model: ServedModel) -> MemoryResolver:
        """The same stores and maps for another model, or for another context window."""
        return MemoryResolver(
            model,
            self.stores,
            self.registry,
            self.tail,
            self.trust,
            signed=self.signed,
            reread=self.reread,
            quote=self.quote,
        )

    def resolve(
        self,
        request: MemoryRequest,
        tenant: str,
        caller_salt: str | None = None,
        *,
        refuse: bool = True,
    ) -> Prompt:
        """The prompt of a request's memories; everything that can be wrong with them comes up here.
        Without `refuse`, a quality target that no map keeps does not: editions may.

        Raises:
            InvalidMemoryId, MemoryNotFound, PackageCorrupt, SignatureInvalid, NoWMatrix,
            UnsupportedRequest, QualityUnreachable
        """
        memories = tuple(self.resolve_one(memory_id, tenant) for memory_id in request.ids)
        last = memories[-1]
        tail: int | None = min(self.tail, last.tokens) if last.wmatrix else 0
        budget = self.reread if request.reread == "auto" else request.reread
        quoting = Quoting(
            self.quote if request.quote == "auto" else request.quote,
            automatic=request.quote == "auto",
            # A quality target may have been reached by what is re-read.
            instead=request.reread == "auto" and request.quality_target is None,
        )
        if request.quality_target is not None:
            try:
                tail = tail_for(memories, request.quality_target, budget)
            except QualityUnreachable as error:
                fails = request.on_low_quality == "fail"
                if fails and refuse:
                    raise
                if request.on_low_quality != "use":
                    natively = Prompt(memories, None, tenant, caller_salt or "", quoting=quoting)
                    refusal = error if fails else None
                    return replace(natively.recomputed(str(error)), refusal=refusal)
        return Prompt(memories, tail, tenant, caller_salt or "", budget=budget, quoting=quoting)

    def quoted(
        self, prompt: Prompt, questions: Sequence[str], tokens: int, answer: int = 1
    ) -> Prompt:
        """A prompt with what its questions point at quoted, if that is to be. Takes milliseconds.

        Quotes never take the room of what fits without them: the longest question's `tokens`, and
        the `answer`'s, unless the engine cuts that short anyway.
        """
        tokenizer = load_tokenizer(str(self.model.folder))
        quoted = prompt.with_quotes(questions, lambda text: tokenize(tokenizer, text).ids)
        room = self.model.max_model_len - len(prompt.ids) - tokens
        kept = answer if answer <= room else 1
        return quoted if len(quoted.quote_ids) + kept <= room else prompt

    def resolve_one(self, memory_id: object, tenant: str) -> ResolvedMemory:
        """One memory of a tenant. Raises as `resolve` does."""
        use = self.check(memory_id, tenant).use
        if isinstance(use, AwarenessError):
            raise use
        return use

    def check(self, memory_id: object, tenant: str) -> CheckedPackage:
        """A package of a tenant, read and checked once for each version of its file.

        Raises:
            InvalidMemoryId, MemoryNotFound, PackageCorrupt
        """
        path = self.stores[tenant].path(memory_id)
        try:
            return self._check_version(path, version_of(path), self._signature_version(path))
        except PackageCorrupt:
            if path.parent == self.stores[tenant].pulled:
                drop_damaged(path)
            raise

    def check_listing(self, listing: PackageListing) -> Verdict:
        """How the served model can load what a registry lists; asked before it is pulled.

        Raises:
            NoWMatrix, UnsupportedRequest, UnsupportedModel, ContextTooLong
        """
        manifest, model = listing.manifest, self.model
        decision = verdict(listing.id, manifest.geometry, model.geometry, self.registry, manifest)
        if decision.exact or manifest.latent:  # of another model's tokens this one may need fewer
            decision = decision.within(listing.id, manifest.rows, model.max_model_len)
        if decision.refusal is not None:
            raise decision.refusal
        return decision

    def _signature_version(self, path: Path) -> tuple[int, ...]:
        """The version of a package's signature; empty where there is none to look at."""
        try:
            return version_of(signature_path(path, "package")) if self.trust else ()
        except MemoryNotFound:
            return ()

    def _check(
        self, path: Path, version: tuple[int, ...], signature: tuple[int, ...]
    ) -> CheckedPackage:
        index = read_index(path, digest=digest_in(path.stem), largest=self.model.largest)
        own = is_own(index.digest)
        try:
            signed_by = self.trust.signer(path, index.digest, "package")
            if self.signed and not own:
                self.trust.require(path, index.digest, "package")
        except SignatureInvalid as error:
            return CheckedPackage(path, index.manifest, "own" if own else "claimed", None, error)
        origin: Origin = "own" if own else "signed" if signed_by else "claimed"
        use = self._use(path, index, origin, signed_by)
        return CheckedPackage(path, index.manifest, origin, signed_by, use)

    def _use(
        self, path: Path, index: PackageIndex, origin: Origin, signed_by: str | None
    ) -> ResolvedMemory | AwarenessError:
        """What the served model can do with a package. Raises PackageCorrupt."""
        model = self.model
        decision = verdict(
            path.stem, index.manifest.geometry, model.geometry, self.registry, index.manifest
        )
        if decision.refusal is not None:
            return decision.refusal
        manifest = decision.entry.manifest if decision.entry else None
        sink = manifest.sink if manifest else model.prefix
        tokens = tokenize(load_tokenizer(str(model.folder)), index.text)
        ids = [*sink, *tokens.ids]
        may_reread = manifest is not None and manifest.predecessors is not None
        text = (index.text, tokens.spans) if may_reread else None
        # A latent has the served model's ids, but not its sink's.
        expected = ids if decision.entry is None else tokens.ids
        if (decision.entry is None or index.manifest.latent) and index.tokens != expected:
            raise corrupt_package(
                path,
                "token ids that are not those of its text",
                "the served model's own ids of the text",
            )
        return ResolvedMemory(
            path.stem,
            index.digest,
            origin,
            decision.entry,
            ids,
            len(sink),
            signed_by,
            text,
            word_vectors(model.folder) if text else None,
            rounded=index.manifest.rounded or model.rounds,
        )

    def append_question(self, prompt: Prompt, question: list[int]) -> list[int]:
        """The memories' ids, those of quotes, then those of the request's own prompt.

        Raises:
            UnsupportedRequest: an empty question, or memories that this model cannot move;
            ContextTooLong: it does not fit.
        """
        moved = prompt.memories if prompt.head else prompt.memories[1:]
        geometry = self.model.geometry
        if moved and geometry.additive and prompt.loads:
            raise UnsupportedRequest(
                f"memory {moved[0].id} cannot stand there",
                found=f"a memory after other tokens, and {geometry.name}'s learned positions",
                expected="a prompt that begins with one memory: its states hold where they stand",
                remedy="ask with one memory in /v1/completions",
            )
        if not question:
            raise UnsupportedRequest(
                "the prompt is empty",
                found=f"{len(prompt.ids)} tokens of memory and none of prompt",
                expected="at least one token to answer",
                remedy="put the question into the prompt",
            )
        names = " ".join(memory.id for memory in prompt.memories)
        check_fits(f"memory {names}", len(prompt.ids), len(question), self.model.max_model_len)
        return [*prompt.ids, *prompt.quote_ids, *question]


def tail_for(memories: Sequence[ResolvedMemory], quality_target: float, reread: int) -> int:
    """The native tail with which every memory reaches its target, with up to `reread` tokens of
    each re-read in place; only the last one can have any.

    Raises:
        QualityUnreachable: one of them does not.
    """
    for memory in memories[:-1]:
        memory.plan(quality_target, tails=False, reread=reread)
    plan = memories[-1].plan(quality_target, tails=True, reread=reread)
    return min(plan.tail, memories[-1].tokens) if plan else 0
