"""vLLM's `--worker-extension-cls`: the front end's calls to a worker's connector.

All of them go by `collective_rpc` to one method, which takes only calls that this server signed: a
server in vLLM's development mode offers `collective_rpc` to everybody.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from awareness_vllm.errors import Unauthorized
from awareness_vllm.serving.params import LoadParams, Part, is_signed, signature

if TYPE_CHECKING:
    from awareness_vllm.serving.connector.worker import ConnectorWorker

CALL = "awareness_call"
"""The method of a worker."""
BIND = "bind_model"
PREFETCH = "prefetch"
POLL = "poll_prefetches"
CANCEL = "cancel_prefetches"
LOADED = "loaded"
EVICT = "evict"
ANNOUNCE = "announce"
STATE = "capture_state"
KEEP_HEAD = "keep_head"
FORGET = "forget"
CHECK_READ_BACK = "check_read_back"
HAVE_EDITIONS = "have_editions"
EXTEND_EDITION = "extend_edition"
HOLD_EDITION = "hold_edition"
FINISH_EDITION = "finish_edition"
DROP_EDITION = "drop_edition"
CHECK_MEMORY = "check_memory"
CHECK_SINK = "check_sink"


def signed(name: str, *args: Any) -> tuple[str, list[Any], str]:
    """The arguments of CALL for a call by name; its own arguments are JSON values."""
    return name, list(args), signature(name, *args)


class AwarenessWorkerExtension:
    """Mixed into vLLM's worker."""

    model_runner: Any

    def awareness_call(self, name: str, args: Sequence[Any], signed_by: str) -> Any:
        """Raises Unauthorized: a call that this server has not signed."""
        if not is_signed(signed_by, name, *args):
            raise Unauthorized(
                "the memories' workers take calls from their own server only",
                found="a call without its signature",
                expected="the routes of docs/serving.md",
                remedy="over several machines, give AWARENESS_SECRET one value on all of them",
            )
        from vllm.distributed.kv_transfer import get_kv_transfer_group

        worker = get_kv_transfer_group().worker  # type: ignore[attr-defined]
        return getattr(WorkerCalls(worker, self.model_runner), name)(*args)


class WorkerCalls:
    """The calls, by the names above."""

    def __init__(self, worker: ConnectorWorker, model_runner: Any) -> None:
        self.worker, self.model_runner = worker, model_runner

    def bind_model(self) -> None:
        """Lend the running model's embedding to the connector, which is given layers only."""
        self.worker.bind_model(self.model_runner.get_model())

    def prefetch(self, ticket: str, params: str, pin: bool) -> str:
        plan = LoadParams.model_validate_json(params)
        return self.worker.prefetcher.begin(ticket, plan, pin)

    def poll_prefetches(self, tickets: list[str]) -> tuple[bool, list[str]]:
        return self.worker.prefetcher.poll(tickets)

    def cancel_prefetches(self, tickets: list[str]) -> None:
        self.worker.prefetcher.cancel(tickets)

    def loaded(self, memories: list[str]) -> list[str]:
        return self.worker.loader.loaded(memories)

    def evict(self, memory: str, tenant: str) -> bool:
        return self.worker.loader.evict(memory, tenant)

    def announce(self, name: str, path: str) -> None:
        self.worker.captures.announce(name, path)

    def capture_state(self, name: str) -> str:
        return self.worker.captures.status(name)

    def keep_head(self, capture: str, name: str, ids: list[int]) -> str:
        return self.worker.keep_head(capture, name, ids)

    def check_read_back(self) -> str:
        return self.worker.check_read_back()

    def forget(self, name: str) -> None:
        self.worker.captures.discard(name)

    def have_editions(self, keys: list[list[str]]) -> list[bool]:
        return self.worker.editions.have([(package, name) for package, name in keys])

    def extend_edition(self, draft: str, capture: str, begin: int) -> str:
        return self.worker.editions.extend(draft, capture, begin)

    def hold_edition(self, draft: str, ids: list[int]) -> str:
        return self.worker.editions.hold(draft, ids)

    def finish_edition(self, draft: str, key: list[str], ids: list[int], tenant: str) -> str:
        package, name = key
        return self.worker.editions.finish(draft, (package, name), ids, tenant)

    def drop_edition(self, draft: str, failed: bool) -> None:
        self.worker.editions.drop(draft, failed=failed)

    def check_memory(self, capture: str, part: str, tenant: str) -> str | list[str]:
        return self.worker.canary.check_memory(capture, Part.model_validate_json(part), tenant)

    def check_sink(self, capture: str, wmatrix: str) -> str:
        return self.worker.canary.check_sink(capture, wmatrix)
