"""What the front end has the engine do for it: keep states warm, capture them, compute a head."""

from __future__ import annotations

import asyncio
import secrets
import tempfile
from collections import OrderedDict
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from safetensors.torch import load_file
from torch import Tensor
from vllm import SamplingParams
from vllm.inputs.engine import tokens_input
from vllm.logger import init_logger

from awareness_vllm.errors import AwarenessError, PackageCorrupt
from awareness_vllm.packages.store import memory_not_found
from awareness_vllm.serving.connector.capture_queue import PENDING
from awareness_vllm.serving.connector.kv_reader import CAPTURE_KEY
from awareness_vllm.serving.connector.worker_extension import (
    ANNOUNCE,
    EVICT,
    FORGET,
    KEEP_HEAD,
    PREFETCH,
    STATE,
)
from awareness_vllm.serving.params import LoadParams
from awareness_vllm.serving.request import MemoryRequest
from awareness_vllm.serving.resolver import Memories, head_name

if TYPE_CHECKING:
    from vllm.engine.protocol import EngineClient

logger = init_logger("vllm.awareness.backstage")

HEADS = 32
"""Heads that are known to be kept: half as many as a worker keeps, so that it drops none first."""
POLL_SECONDS = 0.02
WRITE_SECONDS = 120.0
"""A file of states that takes longer is given up."""


class MemoryEngineClient:
    """Asks the engine; its workers answer through the extension."""

    def __init__(self, engine: EngineClient) -> None:
        self.engine = engine
        self.heads: OrderedDict[str, bool] = OrderedDict()
        self.lock = asyncio.Lock()
        self.folder = Path(tempfile.mkdtemp(prefix="awareness-captures-"))

    def tokens(self, text: str) -> list[int]:
        """The model's ids of a rendered template, its special tokens among them."""
        return self.engine.renderer.get_tokenizer().encode(text, add_special_tokens=False)

    async def prefetch(self, params: LoadParams, *, pin: bool = False) -> str:
        """Align memories ahead of their first request; "cold", or "warm" where they were already.
        With `pin` they stay in the warm tier.

        Raises:
            PackageCorrupt: a worker cannot.
        """
        args = (secrets.token_hex(16), params.model_dump_json(), pin)
        while PENDING in (found := await self.engine.collective_rpc(PREFETCH, args=args)):
            await asyncio.sleep(POLL_SECONDS)
        if wrong := [answer for answer in found if answer not in ("cold", "warm")]:
            raise PackageCorrupt("the memory cannot be loaded", found=wrong[0])
        return "cold" if "cold" in found else "warm"

    async def evict(self, memory: str) -> bool:
        """Drop a memory from the warm tier; whether it was there."""
        return any(await self.engine.collective_rpc(EVICT, args=(memory,)))

    async def pin(self, memories: Memories, ids: Sequence[str]) -> None:
        """Load memories at start, from any tenant's store that has them.

        Raises:
            AwarenessError: nobody has one, or it cannot be loaded: better known now than later.
        """
        for memory in ids:
            owners = [tenant for tenant, store in memories.stores.items() if store.has(memory)]
            if not owners:
                raise memory_not_found(memory)
            prompt = await asyncio.to_thread(
                memories.resolve, MemoryRequest(ids=(memory,)), owners[0]
            )
            assert prompt.params is not None  # only a quality target can ask for native reading
            await self.prefetch(prompt.params, pin=True)
            logger.info("pinned %s", memory)

    async def keeps_head(self, ids: tuple[int, ...]) -> bool:
        """Whether the workers have these first tokens' states; computed once, by a request of their
        own. False where they cannot be read back: the prompt is then read natively."""
        name = head_name(ids)
        async with self.lock:  # two chats at once ask for one head
            if name not in self.heads:
                self.heads[name] = await self._compute_head(name, list(ids))
                while len(self.heads) > HEADS:
                    self.heads.popitem(last=False)
            self.heads.move_to_end(name)
            return self.heads[name]

    async def _compute_head(self, name: str, ids: list[int]) -> bool:
        capture = await self.announce()
        params = SamplingParams(
            max_tokens=1, extra_args={"kv_transfer_params": {CAPTURE_KEY: capture}}
        )
        async for _ in self.engine.generate(tokens_input(ids), params, f"awareness-{capture}"):
            pass  # the answer does not matter, the states do
        wrong = await self.engine.collective_rpc(KEEP_HEAD, args=(capture, name, ids))
        if any(wrong):
            logger.warning("the chat template's head is not kept: %s", wrong)
        return not any(wrong)

    async def announce(self, *, to_file: bool = False) -> str:
        """Have the workers expect a capture; its name, which goes into a request."""
        name = secrets.token_hex(16)
        path = str(self._path(name)) if to_file else ""
        await self.engine.collective_rpc(ANNOUNCE, args=(name, path))
        return name

    def _path(self, name: str) -> Path:
        return self.folder / f"{name}.safetensors"

    async def forget(self, name: str) -> None:
        await self.engine.collective_rpc(FORGET, args=(name,))

    async def states(self, name: str) -> dict[str, Tensor]:
        """The states that were captured into a file, which is removed.

        Raises:
            AwarenessError: they were not read back, or not written in time.
        """
        try:
            async with asyncio.timeout(WRITE_SECONDS):
                while PENDING in (found := await self.engine.collective_rpc(STATE, args=(name,))):
                    await asyncio.sleep(POLL_SECONDS)
        except TimeoutError as error:
            await self.forget(name)
            raise AwarenessError(
                "the prompt was not captured", found=f"nothing after {WRITE_SECONDS:.0f} s"
            ) from error
        if any(found):
            raise AwarenessError("the prompt was not captured", found=found[0])
        path = self._path(name)
        try:
            return await asyncio.to_thread(load_file, path)
        finally:
            path.unlink(missing_ok=True)
