"""Editions: in idle time the model reads used memories through to the end, and their exact states
are kept from then on."""

from __future__ import annotations

import asyncio
import secrets
import time
from collections import OrderedDict
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

import torch
from vllm.logger import init_logger

from awareness_vllm.errors import AwarenessError
from awareness_vllm.models.geometry import Geometry
from awareness_vllm.packages.manifest import id_of
from awareness_vllm.serving.api.engine_client import MemoryEngineClient
from awareness_vllm.serving.connector.scheduler import MIN_COMPUTED
from awareness_vllm.serving.connector.worker_extension import (
    DROP_EDITION,
    EXTEND_EDITION,
    FINISH_EDITION,
    HAVE_EDITIONS,
    HOLD_EDITION,
)
from awareness_vllm.serving.params import DRAFT, Key, LoadParams, draft_params, is_of
from awareness_vllm.serving.prompt import Prompt

if TYPE_CHECKING:
    from vllm.config import VllmConfig

    from awareness_vllm.serving.config import ServingConfig
    from awareness_vllm.serving.served_model import ServedModel

logger = init_logger("vllm.awareness.editions")

MAX_KNOWN = 4096
"""Editions of which the front end knows whether they are kept; beyond, it asks again."""
MAX_WANTED = 256
"""Editions that wait to be made; beyond, the one that waits longest is forgotten."""
CHUNK = 128
"""Tokens that the model reads at once, rounded up to whole blocks: so long a request may wait."""
QUIET_S = 0.05
"""The server counts as idle when its last request ended so long ago: who asks one question after
another has no chunk between them."""
ASK_AGAIN_S = 5.0
"""The workers are asked again whether they keep an edition that is used, so often at most."""
RETRY_S, MAX_RETRY_S = 10.0, 600.0
"""An edition that failed is tried again after so long, and ever more seldom."""


class Activity:
    """The users' requests that this front end is answering."""

    def __init__(self) -> None:
        self.requests = self.total = 0
        self.ended = 0.0
        self.quiet = asyncio.Event()
        self.quiet.set()

    @contextmanager
    def request(self) -> Iterator[None]:
        """Within, a request is being answered."""
        self.requests += 1
        self.total += 1
        self.quiet.clear()
        try:
            yield
        finally:
            self.requests -= 1
            if not self.requests:
                self.ended = time.monotonic()
                self.quiet.set()

    async def idle(self) -> None:
        """Return when no request is being answered, and none has been for QUIET_S."""
        while True:
            await self.quiet.wait()
            rest = self.ended + QUIET_S - time.monotonic()
            if rest <= 0:
                return
            await asyncio.sleep(rest)


@dataclass
class Known:
    """An edition, whether the workers keep it, since when that is known, and how often its memory
    was used without."""

    kept: bool = False
    uses: int = 0
    asked: float = 0.0


@dataclass
class Wanted:
    """An edition to be made: its ids, for a tenant, of which `read` are read, as the workers' draft
    of this name, and the plan that loads what the prefix cache may have lost of them. It is not
    tried before the time `after`."""

    key: Key
    ids: list[int]
    tenant: str
    draft: str = ""
    read: int = 0
    plan: LoadParams | None = None
    after: float = 0.0
    failures: int = 0
    given_up: bool = False


class Editions:
    """The editions that a front end knows, and those that it has the engine make.

    Args:
        policy: when they are made.
        uses: of a memory after which its edition is made.
        limit: bytes of one edition; a larger one is not made.
        geometry: of the model that reads them.
        chunk: tokens that are read at once.
        cached: whether the engine has a prefix cache.
    """

    def __init__(
        self,
        engine_client: MemoryEngineClient,
        *,
        policy: Literal["never", "idle", "always"] = "never",
        uses: int = 1,
        limit: int = 2**30,
        geometry: Geometry | None = None,
        chunk: int = CHUNK,
        cached: bool = True,
    ) -> None:
        self.engine_client, self.geometry = engine_client, geometry
        self.policy, self.uses, self.limit = policy, uses, limit
        self.chunk, self.cached = chunk, cached
        self.activity = Activity()
        self.known: OrderedDict[Key, Known] = OrderedDict()
        self.wanted: OrderedDict[Key, Wanted] = OrderedDict()
        self.new = asyncio.Event()
        self.worker: asyncio.Task[None] | None = None
        self.checks: set[asyncio.Task[None]] = set()

    @classmethod
    def from_config(
        cls,
        config: ServingConfig,
        vllm_config: VllmConfig,
        model: ServedModel,
        engine_client: MemoryEngineClient,
    ) -> Editions:
        cache = vllm_config.cache_config
        return cls(
            engine_client,
            policy=config.editions,
            uses=config.edition_after,
            limit=int(config.edition_gib * 2**30),
            geometry=model.geometry,
            chunk=-(-CHUNK // cache.block_size) * cache.block_size,
            cached=bool(cache.enable_prefix_caching),
        )

    def has(self, memory: str) -> bool:
        """Whether an edition of a memory is kept, as far as this front end knows."""
        return any(known.kept and is_of(key, memory) for key, known in [*self.known.items()])

    async def use(self, prompt: Prompt, *, count: bool = True) -> Prompt:
        """The same prompt, with the editions of its memories that are kept; and a use of the
        others, if it is to `count`. Nothing that is wrong with editions reaches a request.

        Where passages cannot be read back, or may be read by another engine than the one that
        answers, editions cannot either."""
        if self.policy == "never" or self.engine_client.passages.disabled:
            return prompt
        try:
            keys = [prompt.edition_key(i) for i in range(len(prompt.memories))]
            await self._ask([key for key in keys if key is not None and key not in self.known])
            used = prompt.with_editions([self._is_kept(key) for key in keys])
            self._check_again([key for i, key in enumerate(keys) if key and used.is_edition(i)])
            for i, key in enumerate(keys):
                if count and key is not None and not used.is_edition(i):
                    self._count(key, prompt, i)
        except Exception:
            logger.exception("editions are left out of a request")
            return prompt
        return used

    def _is_kept(self, key: Key | None) -> bool:
        return key is not None and key in self.known and self.known[key].kept

    async def _ask(self, keys: Sequence[Key]) -> None:
        """Learn which of these editions all workers keep."""
        if not keys:
            return
        answers = await self.engine_client.call(HAVE_EDITIONS, [list(key) for key in keys])
        for key, *kept in zip(keys, *answers, strict=True):
            known = self._known(key)
            known.kept, known.asked = all(kept), time.monotonic()

    def _check_again(self, keys: Sequence[Key]) -> None:
        """Ask about editions whose last answer is old, beside the request: workers drop those that
        were used longest ago, and a request that finds its edition gone reads the text itself."""
        before = time.monotonic() - ASK_AGAIN_S
        if old := [key for key in keys if self._known(key).asked < before]:
            for key in old:
                self._known(key).asked = time.monotonic()
            task = asyncio.create_task(self._ask(old))
            self.checks.add(task)
            task.add_done_callback(self._checked)

    def _checked(self, task: asyncio.Task[None]) -> None:
        self.checks.discard(task)
        if not task.cancelled() and (error := task.exception()) is not None:
            logger.warning("the workers were not asked about editions: %s", error)

    def _known(self, key: Key) -> Known:
        known = self.known.setdefault(key, Known())
        self.known.move_to_end(key)
        while len(self.known) > MAX_KNOWN:
            self.known.popitem(last=False)
        return known

    def _count(self, key: Key, prompt: Prompt, i: int) -> None:
        """Count a use of a memory without its edition, which is wanted after so many."""
        known = self._known(key)
        known.uses += 1
        if known.kept or known.uses < self.uses or key in self.wanted:
            return
        ids = prompt.edition_ids(i)
        if self.geometry and (size := edition_bytes(self.geometry, len(ids))) > self.limit:
            logger.warning(
                "no edition of %s: %.3f GiB, of %.3f GiB for all (--edition-gib)",
                prompt.memories[i].id,
                size / 2**30,
                self.limit / 2**30,
            )
            known.uses = -MAX_KNOWN  # it is said again when that has been used up
            return
        self.wanted[key] = Wanted(key, ids, prompt.tenant)
        while len(self.wanted) > MAX_WANTED:
            self.wanted.popitem(last=False)[1].given_up = True
        self.start()

    def lost(self, prompt: Prompt) -> None:
        """A prompt's editions did not load: the workers are asked again before the next use."""
        for i in range(len(prompt.memories)):
            if prompt.is_edition(i) and (key := prompt.edition_key(i)) is not None:
                self.known.pop(key, None)

    def forget(self, memory: str) -> None:
        """A memory was given up: its editions are neither used nor made, until it is used again."""
        for key in [key for key in self.known if is_of(key, memory)]:
            del self.known[key]
        for key in [key for key in self.wanted if is_of(key, memory)]:
            self.wanted.pop(key).given_up = True

    def start(self) -> None:
        """Have a task make what is wanted, as long as there is something."""
        self.new.set()
        if self.worker is None or self.worker.done():
            self.worker = asyncio.create_task(self._work())

    async def _work(self) -> None:
        """Make one edition after another. What fails is tried again later, unless the server is
        shutting down or its engine is gone."""
        task = asyncio.current_task()
        while self.wanted:
            wanted = min(self.wanted.values(), key=lambda one: one.after)
            self.new.clear()
            if (wait := wanted.after - time.monotonic()) > 0:
                # Another one may be wanted meanwhile.
                await _any_of(self.new, wait)
                continue
            try:
                await self._make(wanted)
            except Exception as error:
                # A cancelled request may end in another error, of an engine that is gone already.
                if (task and task.cancelling()) or self.engine_client.is_gone:
                    logger.info("no more editions are made: %s", error)
                    return
                await self._failed(wanted, error)
            else:
                self._done(wanted)

    def _done(self, wanted: Wanted) -> None:
        if self.wanted.get(wanted.key) is wanted:
            del self.wanted[wanted.key]

    async def _failed(self, wanted: Wanted, error: Exception) -> None:
        """Begin an edition anew, later."""
        draft, wanted.draft, wanted.read, wanted.plan = wanted.draft, "", 0, None
        wait = min(MAX_RETRY_S, RETRY_S * 2**wanted.failures)
        wanted.failures += 1
        wanted.after = time.monotonic() + wait
        log = logger.warning if isinstance(error, AwarenessError) else logger.exception
        log("an edition of mem_%s failed, again in %.0f s: %s", wanted.key[0][:32], wait, error)
        try:
            await self.engine_client.call(DROP_EDITION, draft, True)
        except Exception as later:  # an engine that is gone
            logger.warning("a draft of an edition is not dropped: %s", later)

    async def _read_chunk(self, wanted: Wanted) -> None:
        """Have the model read on. A rest of few tokens goes with the chunk before: so few are
        computed in another way, with other rounding."""
        client, tokens, begin = self.engine_client, len(wanted.ids), wanted.read
        end = begin + self.chunk
        if tokens - end < MIN_COMPUTED:
            end = tokens
        salt = f"awareness-edition-{wanted.draft}"
        capture = await client.read(wanted.ids[:end], begin=begin, salt=salt, plan=wanted.plan)
        check(await client.call(EXTEND_EDITION, wanted.draft, capture, begin))
        wanted.read = end

    async def _make(self, wanted: Wanted) -> None:
        """Have the model read a memory to its end, chunk by chunk.

        Raises:
            AwarenessError: its states were not read back.
        """
        client, started = self.engine_client, time.monotonic()
        await self._ask([wanted.key])
        if self._is_kept(wanted.key):
            return  # another front end was faster
        wanted.draft = DRAFT + secrets.token_hex(16)
        tokens, seen = len(wanted.ids), self.activity.total
        while wanted.read < tokens:
            if self.policy == "idle":
                await self.activity.idle()
            if wanted.given_up:
                await client.call(DROP_EDITION, wanted.draft, False)
                return
            if wanted.read and (self.activity.total > seen or not self.cached):
                # The prefix cache may have lost what is read: then it is loaded.
                held = wanted.ids[: wanted.read]
                check(await client.call(HOLD_EDITION, wanted.draft, held))
                wanted.plan, seen = draft_params(wanted.draft, wanted.read), self.activity.total
            await self._read_chunk(wanted)
        check(
            await client.call(
                FINISH_EDITION, wanted.draft, list(wanted.key), wanted.ids, wanted.tenant
            )
        )
        if wanted.given_up:
            await client.evict(id_of(wanted.key[0]), wanted.tenant)
            return
        known = self._known(wanted.key)
        known.kept, known.asked = True, time.monotonic()
        logger.info(
            "mem_%s is exact from now on: %d tokens read in %.2f s",
            wanted.key[0][:32],
            tokens,
            time.monotonic() - started,
        )


def edition_bytes(geometry: Geometry, tokens: int) -> int:
    """Bytes of an edition of so many tokens, about: of a window only what later tokens can see."""
    rows = (min(tokens, (layer.window or tokens) + CHUNK) for layer in geometry.layers)
    counts = zip(rows, geometry.layers, strict=True)
    itemsize = getattr(torch, geometry.dtype).itemsize
    return 2 * itemsize * sum(n * layer.heads * layer.head_dim for n, layer in counts)


def check(answers: Sequence[str]) -> None:
    """Raises AwarenessError: a worker could not do what it was called for."""
    if errors := [answer for answer in answers if answer]:
        raise AwarenessError("a chunk of an edition is lost", found=errors[0])


async def _any_of(event: asyncio.Event, seconds: float) -> None:
    """Wait for an event, for so long at most."""
    try:
        async with asyncio.timeout(seconds):
            await event.wait()
    except TimeoutError:
        return
