"""A worker on CUDA's path on a CPU: vLLM's own KV cache and driver of a connector, of Model Runner
V2, around a model whose states are numbers that say what they are of.

Stubbed are the model and FlashAttention's write into its pages.
"""

from __future__ import annotations

import contextlib
import itertools
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import cache
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor
from v2_model import Served
from vllm.distributed.kv_transfer import kv_transfer_state
from vllm.distributed.kv_transfer.kv_connector.factory import KVConnectorFactory
from vllm.distributed.kv_transfer.kv_connector.v1.base import KVConnectorRole
from vllm.forward_context import is_forward_context_available, set_forward_context
from vllm.v1.core.sched.output import SchedulerOutput
from vllm.v1.outputs import ModelRunnerOutput
from vllm.v1.worker.gpu.kv_connector import ActiveKVConnector, get_kv_connector
from vllm.v1.worker.utils import allocate_kv_cache

from awareness_vllm.align.device_writer import DeviceKVWriter
from awareness_vllm.align.paged import PagedMap
from awareness_vllm.models.rope import rerotate

SAMPLED = 9
"""The token that the model always answers."""


def runs(sight: str) -> str:
    """Letters in a row as their number and the letter: "...mm" is "3. 2m"."""
    return " ".join(f"{len(list(same))}{letter}" for letter, same in itertools.groupby(sight))


def numbers(layer: int, tokens: Sequence[int], begin: int, heads: slice) -> tuple[Tensor, Tensor]:
    """The model's own keys and values [T, H, D] of tokens from position `begin` on: small integers,
    which bfloat16 holds exactly."""
    ids, at = torch.tensor(tokens), torch.arange(begin, begin + len(tokens))
    row = (ids * 31 + at * 7 + layer * 11) % 251
    key, value = table()
    return key[row, heads], value[row, heads]


@cache
def table() -> tuple[Tensor, Tensor]:
    """All states that the model can have [251, H, D]."""
    row = torch.arange(251)[:, None, None]
    head, element = torch.arange(Served.HEADS)[:, None], torch.arange(Served.HEAD_DIM)
    key, value = ((row + head * 3 + element * 5 + part) % 251 - 125 for part in (0, 13))
    return key.bfloat16(), value.bfloat16()


def agreement(
    cached: tuple[Tensor, Tensor], states: tuple[Tensor, Tensor], count: int, *, exact: bool
) -> list[int]:
    """Which of the first `count` rows have these states; but for `exact` ones, which were mapped or
    moved in another order, up to a few roundings to bfloat16."""
    same = torch.ones(count, dtype=torch.bool)
    for rows, expected in zip(cached, states, strict=True):
        if exact:
            same &= (rows[:count] == expected[:count]).flatten(1).all(1)
        else:
            error = (rows[:count].float() - expected[:count].float()).abs().flatten(1).amax(1)
            size = expected[:count].float().abs().flatten(1).amax(1)
            same &= error <= 2**-6 * size
    return same.nonzero().flatten().tolist()


class FlashPages:
    """FlashAttention's pages [B, H, N, K|V], whatever their order in memory, and its write."""

    def __init__(self, head_size: int) -> None:
        self.head_size = head_size

    def split(self, cache: Tensor) -> tuple[Tensor, Tensor]:
        """Keys and values [B, N, H, D]."""
        keys, values = cache.transpose(1, 2).split(self.head_size, dim=-1)
        return keys, values

    def do_kv_cache_update(
        self, layer: Any, key: Tensor, value: Tensor, kv_cache: Tensor, slot_mapping: Tensor
    ) -> None:
        size = kv_cache.shape[2]
        # Block 0 is the null block, shared by all; a cache of one block is somebody's scratch.
        assert len(kv_cache) == 1 or ((slot_mapping < 0) | (slot_mapping >= size)).all()
        real = slot_mapping >= 0
        at = (slot_mapping[real] // size, slot_mapping[real] % size)
        for pages, states in zip(self.split(kv_cache), (key, value), strict=True):
            pages[at] = states[real].to(pages.dtype)


@dataclass
class Row:
    """A request in a worker's batch: all its tokens so far, and its blocks by KV cache group."""

    tokens: list[int]
    blocks: tuple[list[int], ...]
    computed: int


@dataclass
class Rank:
    """One worker: its connector, its pages, and a model that looks at all it can see.

    Attributes:
        seen: by request, for each of its forward passes by layer: what the layer could see of the
            positions before, a letter each. `n`: the model's own states; `m`: the memory's; `.`:
            outside the layer's window. Anything else fails the pass.
        events: what the driver and the model did, in order.
        moved: a memory's keys in a layer, from a position on.
    """

    served: Served
    rank: int = 0
    graphs: bool = False
    rows: dict[str, Row] = field(default_factory=dict)
    seen: dict[str, list[list[str]]] = field(default_factory=dict)
    events: list[str] = field(default_factory=list)
    moved: dict[tuple[str, int, int], Tensor] = field(default_factory=dict)

    def __post_init__(self) -> None:
        config, cache = self.served.config, self.served.kv_cache_config
        heads = cache.kv_cache_groups[0].kv_cache_spec.num_kv_heads
        self.heads = slice(self.rank * heads, (self.rank + 1) * heads)
        layout = config.cache_config.get_resolved_kv_cache_layout()
        self.pages = allocate_kv_cache(cache, torch.device("cpu"), layout)
        self.groups = {n: g for g, one in enumerate(cache.kv_cache_groups) for n in one.layer_names}
        self.layers = {name: self.layer(self.pages[name]) for name in sorted(self.groups)}
        config.compilation_config.static_forward_context = self.layers
        connector: Any = KVConnectorFactory.create_connector(config, KVConnectorRole.WORKER, cache)
        self.connector = connector
        self.use_device()
        with self.agent():
            driver = get_kv_connector(config, self.pages)
        assert isinstance(driver, ActiveKVConnector)
        self.driver = driver
        for name in ("start_load_kv", "wait_for_save", "get_transfer_results"):
            setattr(connector, name, self.noted(name, getattr(connector, name)))

    def use_device(self) -> None:
        """What a worker does on CUDA; its writers work on a CPU's tensors as well."""
        worker, loader = self.worker, self.worker.loader
        workspace = loader.workspace_on(torch.device("cpu"))
        worker.writer, worker.own_writer = (
            DeviceKVWriter.of(writer, worker.layout.pages, workspace)
            for writer in (worker.writer, worker.own_writer)
        )
        loader.embed = self.served.embed
        for digest, wmatrix in self.served.maps.items():
            loader.wmatrices[digest] = wmatrix
            loader.paged[digest] = PagedMap(wmatrix, worker.writer.heads, workspace)

    def layer(self, cache: Tensor) -> Any:
        return SimpleNamespace(
            impl=FlashPages(Served.HEAD_DIM),
            kv_cache=cache,
            kv_cache_dtype="auto",
            num_kv_heads=cache.shape[1],
            head_size=Served.HEAD_DIM,
            _k_scale=torch.ones(()),
            _v_scale=torch.ones(()),
            _k_scale_float=1.0,
            _v_scale_float=1.0,
        )

    def noted(self, name: str, method: Callable[..., Any]) -> Callable[..., Any]:
        """A method of the connector that is written down before it is called."""

        def call(*args: Any, **kwargs: Any) -> Any:
            self.events.append(name)
            return method(*args, **kwargs)

        return call

    @contextlib.contextmanager
    def agent(self) -> Iterator[None]:
        """vLLM's own handle of this process's connector, while this rank is the process."""
        before, kv_transfer_state._KV_CONNECTOR_AGENT = (
            kv_transfer_state._KV_CONNECTOR_AGENT,
            self.connector,
        )
        try:
            yield
        finally:
            kv_transfer_state._KV_CONNECTOR_AGENT = before

    def first_sight(self, name: str) -> tuple[str, str]:
        """What the first pass of a request could see: a layer with a window, and one without. The
        others of their kind saw the same."""
        windowed, full, *others = map(runs, self.seen[name][0])
        assert others == [windowed, full] * (len(others) // 2)
        return windowed, full

    @property
    def worker(self) -> Any:
        return self.connector.worker

    def step(self, output: SchedulerOutput) -> ModelRunnerOutput:
        """`execute_model` and `sample_tokens` of vLLM's V2 runner, as far as a connector goes."""
        self.update(output)
        assert self.connector._connector_metadata is None  # the last step's was cleared
        with self.agent():
            if output.total_num_scheduled_tokens == 0:
                return self.driver.no_forward(output)
            names = list(output.num_scheduled_tokens)
            # Each request's row in the batch, as the runner lends it to connectors.
            batch: Any = SimpleNamespace(
                req_ids=names,
                idx_mapping=torch.arange(len(names)),
                num_tokens=output.total_num_scheduled_tokens,
            )
            attention = dict.fromkeys(self.layers, SimpleNamespace())
            if self.graphs:
                assert not is_forward_context_available()
                self.driver.pre_forward(output, batch, attn_metadata=attention)
                self.forward(output)
            else:
                with set_forward_context(attention, self.served.config):
                    self.driver.pre_forward(output, batch)
                    self.forward(output)
            self.driver.finish_forward()
            sampled = self.sample(output)
            connector_output = self.driver.post_forward(output.finished_req_ids)
        return ModelRunnerOutput(
            req_ids=names,
            req_id_to_index={name: i for i, name in enumerate(names)},
            sampled_token_ids=sampled,
            kv_connector_output=connector_output,
        )

    def update(self, output: SchedulerOutput) -> None:
        """Take up the batch's changes; a request that was preempted comes back as a new one."""
        for name in output.finished_req_ids | (output.preempted_req_ids or set()):
            self.rows.pop(name, None)
        for new in output.scheduled_new_reqs:
            blocks = tuple(list(group) for group in new.block_ids)
            assert new.prefill_token_ids is not None
            self.rows[new.req_id] = Row(
                list(new.prefill_token_ids), blocks, new.num_computed_tokens
            )
        later = output.scheduled_cached_reqs
        assert not later.resumed_req_ids
        for name, blocks_, computed in zip(
            later.req_ids, later.new_block_ids, later.num_computed_tokens, strict=True
        ):
            row = self.rows[name]
            for group, more in zip(row.blocks, blocks_ or (), strict=False):
                group.extend(more)
            row.computed = computed

    def forward(self, output: SchedulerOutput) -> None:
        self.events.append("forward")
        for name, count in output.num_scheduled_tokens.items():
            row = self.rows[name]
            self.seen.setdefault(name, []).append([self.sight(layer, row) for layer in self.layers])
            begin, end = row.computed, row.computed + count
            for i, (layer_name, layer) in enumerate(self.layers.items()):
                states = numbers(i, row.tokens[begin:end], begin, self.heads)
                slots = torch.tensor([self.slot(layer_name, row, at) for at in range(begin, end)])
                layer.impl.do_kv_cache_update(layer, *states, layer.kv_cache, slots)

    def slot(self, layer_name: str, row: Row, position: int) -> int:
        size = self.layers[layer_name].kv_cache.shape[2]
        return row.blocks[self.groups[layer_name]][position // size] * size + position % size

    def states(self, layer_name: str, blocks: Sequence[int]) -> tuple[Tensor, Tensor]:
        """Keys and values [T, H, D] in some blocks, as attention reads them."""
        layer = self.layers[layer_name]
        keys, values = layer.impl.split(layer.kv_cache)
        return keys[list(blocks)].flatten(0, 1), values[list(blocks)].flatten(0, 1)

    def sight(self, layer_name: str, row: Row) -> str:
        """What a layer can see of a request's positions before those of this pass."""
        i, window = list(self.layers).index(layer_name), self.served.window(layer_name)
        first = max(0, row.computed - window + 1) if window else 0
        if first == row.computed:
            return "." * first
        cached = self.states(layer_name, row.blocks[self.groups[layer_name]])
        own = numbers(i, row.tokens[: row.computed], 0, self.heads)
        letters = ["?"] * row.computed
        for letter, states in {"n": own, "m": self.memories(i, row.tokens)}.items():
            count = min(row.computed, len(states[0]))
            for at in agreement(cached, states, count, exact=letter == "n"):
                letters[at] = letter
        sight = "." * first + "".join(letters[first:])
        assert "?" not in sight, f"{layer_name}: {sight} of {row}: somebody else's states"
        return sight

    def memories(self, i: int, tokens: Sequence[int]) -> tuple[Tensor, Tensor]:
        """A layer's states of the memories that a prompt begins with, each moved to its place; the
        last one may be cut."""
        positions, at = self.served.geometry.layers[i].positions, 0
        shape = 0, Served.HEADS, Served.HEAD_DIM
        keys, values = [torch.empty(shape)], [torch.empty(shape)]
        while at < len(tokens):
            here = [m for m in self.served.memories if m.begins(tokens[at:])]
            if not here:
                break
            moved = here[0].part.memory, i, at
            if moved not in self.moved:
                self.moved[moved] = rerotate(here[0].keys[i], at, positions).float()
            keys.append(self.moved[moved])
            values.append(here[0].values[i].float())
            at += len(here[0].ids)
        return torch.cat(keys)[:, self.heads], torch.cat(values)[:, self.heads]

    def sample(self, output: SchedulerOutput) -> list[list[int]]:
        sampled: list[list[int]] = []
        for name, count in output.num_scheduled_tokens.items():
            row = self.rows[name]
            row.computed += count
            done = row.computed >= len(row.tokens)
            row.tokens += [SAMPLED] * done
            sampled.append([SAMPLED] * done)
        return sampled
