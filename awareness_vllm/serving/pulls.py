"""Pulls: memories that a tenant's store lacks, looked up in the server's registry and pulled.

Threads talk to the registry, never the event loop. Each lookup and each pull is made once, however
many requests wait for it. A request waits no longer than its deadline, and nor does its lookup; its
pull goes on for as long again, and whoever asks next finds what is there by then.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import time
from collections import OrderedDict
from collections.abc import Callable, Iterable, Iterator, Sequence

from awareness_vllm.errors import (
    ArtefactCorrupt,
    AwarenessError,
    MemoryNotFound,
    PackageCorrupt,
    PackageTooLarge,
    RegistryError,
    RegistryTimeout,
    SignatureInvalid,
    StorageFull,
    TooManyLoads,
)
from awareness_vllm.oci.deadline import check_deadline, deadline_at
from awareness_vllm.packages.listing import PackageListing
from awareness_vllm.packages.store import Store
from awareness_vllm.serving.flights import MAX_REMEMBERED, Flight, Flights, Remembered
from awareness_vllm.serving.pull_metrics import PullMetrics
from awareness_vllm.serving.registry import Offer, RegistryMemories

logger = logging.getLogger("vllm.awareness.pulls")

MAX_LOOKUPS, MAX_PULLS = 8, 4
"""Threads that ask the registry, and that pull."""
MAX_WAITING = 64
"""Lookups, and pulls, under way; beyond, 429."""
MISSES = 60
"""Unknown IDs that a tenant may name, at once or a minute: each costs the registry a request."""
OFFER_S = 60.0
"""Seconds for which a listing is not looked up again."""
REFUSED_S: tuple[tuple[type[AwarenessError], float], ...] = (
    (RegistryTimeout, 0.0),
    (MemoryNotFound, 5.0),
    (ArtefactCorrupt, 30.0),
    (PackageCorrupt, 30.0),
    (PackageTooLarge, 30.0),
    (SignatureInvalid, 5.0),
    (StorageFull, 5.0),
    (RegistryError, 1.0),
)
"""Seconds for which the registry is not asked again about an ID, by what came of it."""


class Pulls:
    """The pulls of a front end.

    Args:
        check: raises for what the served model cannot load: it is not pulled.
        timeout: seconds that a request waits.
    """

    def __init__(
        self,
        registry: RegistryMemories,
        check: Callable[[PackageListing], object],
        timeout: float,
    ) -> None:
        self.registry, self.check, self.timeout = registry, check, timeout
        self.lookups: Flights[Offer] = Flights("registry lookups", MAX_LOOKUPS, MAX_WAITING)
        self.pulls: Flights[None] = Flights("registry pulls", MAX_PULLS, MAX_WAITING)
        self.offers: Remembered[Offer] = Remembered()
        self.refusals: Remembered[AwarenessError] = Remembered()
        self.complete: Remembered[bool] = Remembered()
        self.used: dict[str, OrderedDict[str, None]] = {}
        self.misses: dict[str, MissBudget] = {}
        self.metrics = PullMetrics.of_process()

    def deadline(self) -> float:
        """The time, by `time.monotonic`, until which a request that comes now waits."""
        return time.monotonic() + self.timeout

    async def look(self, tenant: str, memory: str, until: float) -> Offer:
        """What the registry lists of a memory.

        Raises:
            MemoryNotFound, PackageTooLarge; TooManyLoads: the tenant has named too many unknown
            IDs, or too many lookups wait; ArtefactCorrupt, RegistryError.
        """
        if (error := self.refusals.get(memory)) is not None:
            raise error.with_traceback(None)
        if (offer := self.offers.get(memory)) is None:
            misses = self.misses.setdefault(tenant, MissBudget())
            with misses.one(memory in self.lookups), self._remembering(memory):
                offer = await self.lookups.run(memory, lambda f: self._look(memory, f), until)
            self.offers.put(memory, offer, OFFER_S)
        return offer

    def _look(self, memory: str, flight: Flight[Offer]) -> Offer:
        """Look up, in a thread, as long as anybody waits: it is free then for the next lookup,
        whatever the registry does."""
        with deadline_at(lambda: flight.until):
            return self.registry.look(memory)

    async def pull(self, tenant: str, offers: Sequence[Offer], until: float) -> None:
        """Have memories that were looked up in the cache.

        Raises:
            what `check` raises; ArtefactCorrupt, PackageCorrupt, SignatureInvalid, TooManyLoads,
            RegistryError.
        """
        await asyncio.gather(*(self._pull(offer, until) for offer in offers))
        for offer in offers:
            self.offers.drop(offer.listing.id)
            self.complete.put(offer.listing.id, True, OFFER_S)
            self._note(tenant, offer.listing.id)

    async def _pull(self, offer: Offer, until: float) -> None:
        memory = offer.listing.id
        with self._remembering(memory):
            await self.pulls.run(memory, lambda flight: self._fetch(offer, flight), until)

    def _fetch(self, offer: Offer, flight: Flight[None]) -> None:
        """Pull, in a thread, as long as anybody has waited a short time ago."""
        try:
            with (
                self.metrics.pull(offer.listing.bytes),
                deadline_at(lambda: flight.until + self.timeout),
            ):
                self.registry.pull(offer, lambda _: check_deadline())
        except Exception as error:
            logger.warning("%s was not pulled: %s", offer.listing.id, error)
            raise
        logger.info("pulled %s, %d bytes", offer.listing.id, offer.listing.bytes)

    async def pull_pins(self, stores: Iterable[Store], memories: Sequence[str]) -> None:
        """Have memories in the cache that no store has. Raises as `look` and `pull` do."""
        known = [*stores]
        for memory in memories:
            if not any(store.has(memory) for store in known):
                until = self.deadline()
                offer = await self.look("", memory, until)
                self.check(offer.listing)
                await self.pull("", [offer], until)

    def is_wanting(self, memory: str) -> bool:
        """Whether a memory in the cache lacks a signature that the registry may have by now."""
        return self.registry.lacks_signature(memory) and not self.complete.get(memory)

    def note_use(self, tenant: str, memory: str) -> None:
        """A tenant uses a memory in the cache."""
        self.registry.used(memory)
        self._note(tenant, memory)

    def _note(self, tenant: str, memory: str) -> None:
        used = self.used.setdefault(tenant, OrderedDict())
        used[memory] = None
        used.move_to_end(memory)
        while len(used) > MAX_REMEMBERED:
            used.popitem(last=False)

    def used_by(self, tenant: str) -> list[str]:
        """The registry's memories that a tenant has used since the start."""
        return list(self.used.get(tenant, ()))

    @contextlib.contextmanager
    def _remembering(self, memory: str) -> Iterator[None]:
        """What is wrong with a memory is said again for a while without asking the registry."""
        try:
            yield
        except AwarenessError as error:
            seconds = next((s for kind, s in REFUSED_S if isinstance(error, kind)), 0.0)
            if seconds:
                self.refusals.put(memory, error, seconds)
            self.offers.drop(memory)
            raise


class MissBudget:
    """How many unknown IDs a tenant may still name: MISSES, which come back within a minute."""

    def __init__(self) -> None:
        self.left, self.at = float(MISSES), time.monotonic()

    @contextlib.contextmanager
    def one(self, is_free: bool) -> Iterator[None]:
        """Within, an ID is looked up, which costs one if it is unknown, unless it `is_free`: looked
        up for others already. Raises TooManyLoads where none is left."""
        if is_free:
            yield
            return
        self._take()
        try:
            yield
        except MemoryNotFound:
            raise
        except BaseException:
            self._give_back()
            raise
        self._give_back()

    def _take(self) -> None:
        now = time.monotonic()
        self.left = min(MISSES, self.left + (now - self.at) * MISSES / 60)
        self.at = now
        if self.left < 1:
            raise TooManyLoads(
                "too many unknown memories were asked for",
                found=f"{MISSES} within the last minute that the registry does not have",
                remedy="send the request again soon, with an ID that exists",
            )
        self.left -= 1

    def _give_back(self) -> None:
        self.left = min(MISSES, self.left + 1)
