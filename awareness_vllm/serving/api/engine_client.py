"""Requests of the front end to the engine: memories to keep warm, states to capture."""

from __future__ import annotations

import asyncio
import functools
import secrets
from collections import OrderedDict
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from torch import Tensor
from vllm import SamplingParams
from vllm.inputs.engine import tokens_input
from vllm.logger import init_logger

from awareness_vllm.errors import AwarenessError
from awareness_vllm.packages.file import read_states
from awareness_vllm.packages.store import memory_not_found
from awareness_vllm.serving.api.passages import Passages
from awareness_vllm.serving.api.prefetch import POLL_S, Prefetches
from awareness_vllm.serving.api.scratch import ScratchFolder
from awareness_vllm.serving.connector.capture_queue import NOT_WRITTEN, PENDING
from awareness_vllm.serving.connector.kv_reader import CAPTURE_KEY
from awareness_vllm.serving.connector.worker_extension import (
    ANNOUNCE,
    CALL,
    CHECK_READ_BACK,
    EVICT,
    FORGET,
    KEEP_HEAD,
    LOADED,
    STATE,
    signed,
)
from awareness_vllm.serving.params import LoadParams, kv_transfer_params
from awareness_vllm.serving.prompt import Prompt, head_name
from awareness_vllm.serving.request import MemoryRequest
from awareness_vllm.serving.resolver import MemoryResolver
from awareness_vllm.serving.storage import not_written

if TYPE_CHECKING:
    from vllm.engine.protocol import EngineClient

logger = init_logger("vllm.awareness.engine_client")

MAX_HEADS = 32
"""Heads that the workers are known to have: half as many as they keep, so that none is dropped
there first."""
HEAD_RETRY_S = 60.0
"""A head that could not be kept is tried again after so long: until then each of its chats would
compute it twice."""
WRITE_TIMEOUT_S = 120.0
"""A file of states that takes longer is given up."""


class MemoryEngineClient:
    """Calls the workers of an engine through the worker extension."""

    def __init__(self, engine: EngineClient, passages: Passages | None = None) -> None:
        self.engine = engine
        self.passages = passages or Passages(engine)
        self.heads: OrderedDict[str, asyncio.Task[str]] = OrderedDict()
        self.prefetches = Prefetches(self.call)
        self.scratch = ScratchFolder()

    @property
    def is_gone(self) -> bool:
        """Whether the engine has died, and answers nothing any more."""
        return self.engine.errored

    def tokenize(self, text: str) -> list[int]:
        """The model's ids of a rendered template, its special tokens among them."""
        return self.engine.renderer.get_tokenizer().encode(text, add_special_tokens=False)

    def detokenize(self, ids: Sequence[int]) -> str:
        """The text of some ids, without special tokens."""
        return self.engine.renderer.get_tokenizer().decode(ids, skip_special_tokens=True)

    async def call(self, name: str, *args: Any) -> list[Any]:
        """The workers' answers to a call of theirs, by name."""
        return await self.engine.collective_rpc(CALL, args=signed(name, *args))

    async def poll(self, name: str, *args: Any) -> list[Any]:
        """The workers' answers, once none of them is PENDING."""
        while PENDING in (answers := await self.call(name, *args)):
            await asyncio.sleep(POLL_S)
        return answers

    async def check_read_back(self) -> None:
        """Re-read no passages where a worker cannot read its cache back."""
        reasons = await self.call(CHECK_READ_BACK)
        self.passages.disabled = next(filter(None, reasons), "")
        if self.passages.disabled:
            logger.warning("passages are not re-read: %s", self.passages.disabled)

    async def loaded(self, memories: Sequence[str]) -> set[str]:
        """Those of these memories that all workers have loaded."""
        return set.intersection(*map(set, await self.call(LOADED, list(memories))))

    async def evict(self, memory: str, tenant: str) -> bool:
        """Give up a tenant's use of a memory; whether that dropped it from the warm tier."""
        self.passages.forget(memory)
        return any(await self.call(EVICT, memory, tenant))

    async def pin(self, resolver: MemoryResolver, ids: Sequence[str]) -> None:
        """Load memories at start, from any tenant's store that has them.

        Raises:
            AwarenessError: no store has one, or it cannot be loaded: better at start than later.
        """
        for memory in ids:
            owners = [tenant for tenant, store in resolver.stores.items() if store.has(memory)]
            if not owners:
                raise memory_not_found(memory)
            request = MemoryRequest(ids=(memory,))
            prompt = await asyncio.to_thread(resolver.resolve, request, owners[0])
            assert prompt.params is not None  # only a quality target can ask for native reading
            await self.prefetches.run(prompt.params, pin=True)
            logger.info("pinned %s", memory)

    async def ensure_passages(self, prompt: Prompt, question: str) -> Prompt:
        """The prompt with what its question points at re-read in place, as far as it is there in
        time."""
        return await self.passages.ensure(prompt, question)

    async def ensure_head(self, ids: tuple[int, ...]) -> str:
        """Have the workers keep the states of a prompt's first tokens, computed once by a request
        of their own, however many chats ask for them; no chat waits for another one's head.

        Returns:
            "", or why they are not kept: the prompt is then read natively.
        """
        if not ids:
            return ""
        name = head_name(ids)
        if name not in self.heads:
            self.heads[name] = task = asyncio.create_task(self._compute_head(name, list(ids)))
            task.add_done_callback(functools.partial(self._head_ended, name))
            while len(self.heads) > MAX_HEADS:
                self.heads.popitem(last=False)
        self.heads.move_to_end(name)
        # A chat that is given up does not take the head from the others.
        return await asyncio.shield(self.heads[name])

    def forget_head(self, ids: tuple[int, ...]) -> None:
        """Have a prompt's head computed again for the next chat: a load after it has failed, for
        the workers may have dropped it for those of other API servers."""
        if ids:
            self.heads.pop(head_name(ids), None)

    def _head_ended(self, name: str, task: asyncio.Task[str]) -> None:
        """Forget a head that is not kept: at once where its request failed, else after a while."""
        if task.cancelled() or task.exception() is not None:
            self._forget_head(name, task)
        elif task.result():
            logger.warning("a chat's head is not kept: %s", task.result())
            task.get_loop().call_later(HEAD_RETRY_S, self._forget_head, name, task)

    def _forget_head(self, name: str, task: asyncio.Task[str]) -> None:
        if self.heads.get(name) is task:
            del self.heads[name]

    async def _compute_head(self, name: str, ids: list[int]) -> str:
        capture = await self.read(ids)
        errors = await self.call(KEEP_HEAD, capture, name, ids)
        return next(filter(None, errors), "")

    async def read(
        self,
        ids: Sequence[int],
        *,
        begin: int = 0,
        salt: str = "",
        plan: LoadParams | None = None,
        to_file: bool = False,
    ) -> str:
        """Have the model read some ids, the first of which a `plan` may load; the key of the
        capture of their states from position `begin` on. The blocks are found only by reads with
        the same plan or `salt`, by none without either: those of others may lack what a window has
        given back."""
        capture = await self.announce(to_file=to_file)
        asked: dict[str, Any] = {CAPTURE_KEY: {"name": capture, "begin": begin}}
        salt = salt or f"awareness-read-{capture}"
        if plan is not None:
            asked, salt = kv_transfer_params(plan, asked), plan.cache_salt
        params = SamplingParams(max_tokens=1, extra_args={"kv_transfer_params": asked})
        prompt = tokens_input(list(ids), cache_salt=salt)
        try:
            async for _ in self.engine.generate(prompt, params, f"awareness-{capture}"):
                pass  # the answer does not matter, the states do
        except BaseException:
            await self.discard(capture)
            raise
        return capture

    async def announce(self, *, to_file: bool = False) -> str:
        """Have the workers expect a capture; its key, which goes into a request."""
        key = secrets.token_hex(16)
        path = str(self._path(key)) if to_file else ""
        await self.call(ANNOUNCE, key, path)
        return key

    def _path(self, key: str) -> Path:
        return self.scratch.path / f"{key}.safetensors"

    async def discard(self, key: str) -> None:
        """Have the workers forget a capture, and remove its file."""
        try:
            await self.call(FORGET, key)
        finally:
            self._path(key).unlink(missing_ok=True)

    async def captured_states(self, key: str) -> dict[str, Tensor]:
        """The states of a capture from its file, which is removed.

        Raises:
            StorageFull: the disk did not take them.
            AwarenessError: they were not read back, or not written in time; discard it.
        """
        try:
            async with asyncio.timeout(WRITE_TIMEOUT_S):
                answers = await self.poll(STATE, key)
        except TimeoutError as error:
            raise AwarenessError(
                "the prompt was not captured", found=f"nothing after {WRITE_TIMEOUT_S:.0f} s"
            ) from error
        for answer in answers:
            if answer.startswith(NOT_WRITTEN):
                raise not_written(answer.removeprefix(NOT_WRITTEN))
        if errors := [answer for answer in answers if answer]:
            raise AwarenessError("the prompt was not captured", found=errors[0])
        path = self._path(key)
        try:
            return await asyncio.to_thread(read_states, path)
        finally:
            path.unlink(missing_ok=True)
