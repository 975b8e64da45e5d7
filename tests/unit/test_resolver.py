"""Resolved memories: a copy, or a map whose last tokens are left to the target."""

from __future__ import annotations

import json
import os
import shutil
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from families import TRAINED, save

from awareness_vllm.compatibility.memory_checker import MemoryCompatibilityChecker
from awareness_vllm.errors import (
    ContextTooLong,
    MemoryNotFound,
    NoWMatrix,
    PackageCorrupt,
    QualityUnreachable,
    UnsupportedRequest,
)
from awareness_vllm.models.geometry import Geometry
from awareness_vllm.packages.capture import capture
from awareness_vllm.packages.file import build, publish, read_index
from awareness_vllm.packages.store import Store
from awareness_vllm.serving.config import ServingConfig
from awareness_vllm.serving.offline import OfflineMemories
from awareness_vllm.serving.params import LoadParams
from awareness_vllm.serving.prompt import head_name
from awareness_vllm.serving.request import MemoryRequest
from awareness_vllm.serving.resolver import MemoryResolver
from awareness_vllm.serving.served_model import ServedModel
from awareness_vllm.wmatrix.certificate import Certificate, Interval, Plan
from awareness_vllm.wmatrix.file import WMatrix
from awareness_vllm.wmatrix.plans import basis_of, plans_for
from awareness_vllm.wmatrix.registry import Registry, WMatrixEntry

pytestmark = pytest.mark.unit

TEXT = "some words or others, and a few more of them"
OTHER = "quite other words"


@pytest.fixture(scope="module")
def wmatrix_file(fitted: WMatrix, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("map") / "pair.wmatrix"
    fitted.save(path)
    return path


@pytest.fixture(scope="module")
def mapped(tiny_models: tuple[Path, Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A store with two memories of the source model."""
    store = tmp_path_factory.mktemp("mapped")
    for text in (TEXT, OTHER):
        publish(capture(tiny_models[0], text), store)
    return store


@pytest.fixture(scope="module")
def learned(tmp_path_factory: pytest.TempPathFactory) -> MemoryResolver:
    """The resolver of a model with learned positions, and two memories of its own."""
    folder, store = tmp_path_factory.mktemp("gpt2"), tmp_path_factory.mktemp("of gpt2")
    save("gpt2", folder)
    for text in (TEXT, OTHER):
        publish(capture(folder, text), store)
    return copies_of(folder, store, 4096)


def copies_of(model: Path, store: Path, window: int = 1000) -> MemoryResolver:
    """The resolver of a server without W-Matrices."""
    return MemoryResolver(ServedModel.read(model, window), {"": Store(store)}, Registry(), 5)


def test_a_memory_that_cannot_be_moved_only_begins_a_prompt(learned: MemoryResolver) -> None:
    first, second = ids_in(Path(learned.stores[""].folder))
    alone = learned.resolve(MemoryRequest(ids=(first,)), "")
    assert learned.append_question(alone, [7])[-1] == 7
    both = learned.resolve(MemoryRequest(ids=(first, second)), "")
    for prompt, moved in ((both, second), (alone.with_head([5]), first)):
        with pytest.raises(UnsupportedRequest, match=f"{moved} cannot stand there"):
            learned.append_question(prompt, [7])
        assert learned.append_question(prompt.recomputed(), [7])[-1] == 7


def test_the_same_model_saved_again_is_told_apart_by_its_tokenizer_alone(
    tiny_models: tuple[Path, Path], wmatrix_file: Path, mapped: Path, tmp_path: Path
) -> None:
    def again(model: Path) -> Path:
        copy = Path(shutil.copytree(model, tmp_path / model.name))
        document = json.loads((copy / "tokenizer.json").read_text())
        (copy / "tokenizer.json").write_text(json.dumps(document, indent=3))
        return copy

    (memory, _) = ids_in(mapped)
    own = copies_of(again(tiny_models[0]), mapped)
    with pytest.raises(NoWMatrix, match=r"weights .* agree, only tokenizer\.json"):
        own.resolve_one(memory, "")
    target = ServedModel.read(again(tiny_models[1]), 1000)
    through = MemoryResolver(target, {"": Store(mapped)}, Registry.read([wmatrix_file]), 0)
    with pytest.raises(NoWMatrix, match=r"weights .* agree, only tokenizer\.json"):
        through.resolve_one(memory, "")
    listing = SimpleNamespace(id="m", source_model=str(tiny_models[0]), token_count=9)
    report = MemoryCompatibilityChecker([wmatrix_file]).check(listing, str(target.folder))
    assert "only tokenizer.json differs" in str(report.refusal)


def test_longrope_memories_need_a_server_of_their_kind(tmp_path: Path) -> None:
    folder, store = save("phi3, longrope", tmp_path / "model"), tmp_path / "store"
    publish(capture(folder, TEXT), store)
    (memory,) = ids_in(store)
    assert copies_of(folder, store, TRAINED).resolve_one(memory, "").wmatrix is None
    with pytest.raises(NoWMatrix, match=r"other positions.*max-model-len"):
        copies_of(folder, store, TRAINED + 1).resolve_one(memory, "")


def ids_in(store: Path) -> tuple[str, ...]:
    return tuple(sorted(path.stem for path in store.glob("mem_*")))


def certified(entry: WMatrixEntry) -> WMatrixEntry:
    """As if it had been measured: 0.8 alone and 0.9 with a tail of 4, at 100 tokens; at 1000
    tokens 0.7 and 0.85."""
    figures = ((100, 0, 0.8), (100, 4, 0.9), (1000, 0, 0.7), (1000, 4, 0.85))
    plans = tuple(measured_plan(context, tail, kept) for context, tail, kept in figures)
    measured = replace(entry)
    measured.__dict__["certificate"] = Certificate.model_construct(
        plans=plans, retention=plans[0].retention
    )
    return measured


def measured_plan(context: int, tail: int, kept: float) -> Plan:
    interval = Interval(mean=kept, ci_low=0, ci_high=1)
    return Plan(
        context=context,
        tail=tail,
        cost=0.1 + tail / 100,
        retention=interval,
        kinds={},
        top1=0,
        tokens_only=interval,
    )


def target_of(
    models: tuple[Path, Path], store: Path, wmatrix: Path, *, tail: int = 5, measured: bool = False
) -> MemoryResolver:
    """The resolver of a server of the target model, with a map that may be certified."""
    registry = Registry.read([wmatrix])
    if measured:
        registry = Registry(tuple(map(certified, registry)))
    return MemoryResolver(ServedModel.read(models[1], 1000), {"": Store(store)}, registry, tail)


@pytest.mark.parametrize("tail", [0, 5, 1000])
def test_the_tail_is_the_servers_but_the_sink_is_always_loaded(
    tiny_models: tuple[Path, Path], wmatrix_file: Path, mapped: Path, tail: int
) -> None:
    resolver = target_of(tiny_models, mapped, wmatrix_file, tail=tail)
    prompt = resolver.resolve(MemoryRequest(ids=ids_in(mapped)[:1]), "")
    assert prompt.params is not None
    assert prompt.params.tokens == len(prompt.ids)
    assert prompt.params.tail == min(tail, len(prompt.ids) - 1)
    assert prompt.report()["retention"] == [1.0 if tail >= len(prompt.ids) - 1 else None]


def test_a_copy_leaves_nothing_to_the_target_and_keeps_all_where_it_was_made(
    tiny_models: tuple[Path, Path], mapped: Path
) -> None:
    resolver = copies_of(tiny_models[0], mapped)
    prompt = resolver.resolve(MemoryRequest(ids=ids_in(mapped), quality_target=1.0), "")
    assert prompt.params is not None
    assert prompt.params.tail == 0
    assert prompt.retention == [1.0, None]
    assert prompt.with_head([1]).retention == [None, None]
    assert prompt.recomputed().retention == [1.0, 1.0]


def test_memories_follow_each_other_under_one_sink(
    tiny_models: tuple[Path, Path], wmatrix_file: Path, mapped: Path
) -> None:
    resolver = target_of(tiny_models, mapped, wmatrix_file)
    first, second = ids_in(mapped)
    alone = [resolver.resolve(MemoryRequest(ids=(one,)), "").ids for one in (first, second)]
    both, swapped = (
        resolver.resolve(MemoryRequest(ids=ids), "") for ids in ((first, second), (second, first))
    )
    assert both.ids == alone[0] + alone[1][1:]
    assert swapped.ids == alone[1] + alone[0][1:]
    assert both.params is not None
    assert swapped.params is not None
    assert [(part.memory, part.skip) for part in both.params.parts] == [(first, 0), (second, 1)]
    assert both.params.tokens == len(both.ids)
    assert both.params.cache_salt != swapped.params.cache_salt


def test_after_a_chats_head_no_memory_brings_its_own_beginning(
    tiny_models: tuple[Path, Path], wmatrix_file: Path, mapped: Path
) -> None:
    resolver = target_of(tiny_models, mapped, wmatrix_file)
    prompt = resolver.resolve(MemoryRequest(ids=ids_in(mapped)), "").with_head([2, 9, 9])
    assert prompt.params is not None
    parts = prompt.params.parts
    assert [part.skip for part in parts] == [0, 1, 1]
    assert (parts[0].memory, parts[0].tokens) == (head_name([2, 9, 9]), 3)
    assert prompt.ids[:3] == [2, 9, 9]
    assert prompt.params.tokens == len(prompt.ids)
    natively = prompt.recomputed()
    assert (natively.ids, natively.params) == (prompt.ids, None)
    assert (natively.loads, prompt.loads) == (False, True)
    assert prompt.params is prompt.params


@pytest.mark.parametrize(
    ("count", "target", "tail"), [(1, 0.75, 0), (1, 0.85, 4), (2, 0.75, 0), (1, 0.95, None)]
)
def test_a_quality_target_takes_the_cheapest_plan_or_reads_natively(
    tiny_models: tuple[Path, Path],
    wmatrix_file: Path,
    mapped: Path,
    count: int,
    target: float,
    tail: int | None,
) -> None:
    resolver = target_of(tiny_models, mapped, wmatrix_file, measured=True)
    ids = ids_in(mapped)[:count]
    prompt = resolver.resolve(MemoryRequest(ids=ids, quality_target=target), "")
    assert prompt.tail == tail
    assert prompt.report()["plan"] == ("recompute" if tail is None else "load")
    assert all(kept is not None and kept >= target for kept in prompt.retention)


def test_only_the_last_memory_has_a_tail_so_the_others_must_do_without(
    tiny_models: tuple[Path, Path], wmatrix_file: Path, mapped: Path
) -> None:
    resolver = target_of(tiny_models, mapped, wmatrix_file, measured=True)
    request = MemoryRequest(ids=ids_in(mapped), quality_target=0.85)
    assert resolver.resolve(request, "").tail is None
    use = request.model_copy(update={"on_low_quality": "use"})
    assert resolver.resolve(use, "").tail == 5
    assert resolver.resolve(use, "").retention == [0.8, 0.9]
    with pytest.raises(QualityUnreachable, match=r"at best 0\.800"):
        resolver.resolve(request.model_copy(update={"on_low_quality": "fail"}), "")


def test_without_a_certificate_no_target_is_kept(
    tiny_models: tuple[Path, Path], wmatrix_file: Path, mapped: Path
) -> None:
    resolver = target_of(tiny_models, mapped, wmatrix_file)
    request = MemoryRequest(ids=ids_in(mapped)[:1], quality_target=0.1, on_low_quality="fail")
    with pytest.raises(QualityUnreachable, match="not certified"):
        resolver.resolve(request, "")


def test_a_longer_memory_than_any_measured_is_promised_less() -> None:
    certificate = Certificate.model_construct(
        plans=tuple(measured_plan(c, 0, k) for c, k in ((100, 0.9), (1000, 0.7)))
    )
    for context, kept in ((1, 0.9), (100, 0.9), (101, 0.7), (1000, 0.7), (10_000, 0.5)):
        (plan,) = plans_for(certificate, context)
        assert plan.retention.mean == pytest.approx(kept)
        assert basis_of(certificate, context) == ("measured" if kept > 0.5 else "extrapolated")


def test_a_tenant_has_its_own_memories_only(
    tiny_models: tuple[Path, Path], mapped: Path, tmp_path: Path
) -> None:
    file = tmp_path / "tenants.json"
    entries = {
        "a": {"api_keys": ["k1"], "store": str(mapped)},
        "b": {"api_keys": ["k2"], "store": "b"},
    }
    file.write_text(json.dumps(entries))
    config = ServingConfig(store="unused", tenants=str(file))
    resolver = MemoryResolver.from_config(config, ServedModel.read(tiny_models[0], 1000))
    request = MemoryRequest(ids=ids_in(mapped)[:1])
    prompt = resolver.resolve(request, "a", "salt")
    assert prompt.params is not None
    assert (prompt.params.tenant, prompt.params.caller_salt) == ("a", "salt")
    with pytest.raises(MemoryNotFound):
        resolver.resolve(request, "b")


def test_an_offline_prompt_is_a_servers(
    tiny_models: tuple[Path, Path], wmatrix_file: Path, mapped: Path
) -> None:
    offline = OfflineMemories(tiny_models[1], mapped, [wmatrix_file], tail=3)
    offline.set_window(1000)
    ids = ids_in(mapped)
    prompt, extra_args = offline.prompt(" words", ids)
    served = target_of(tiny_models, mapped, wmatrix_file, tail=3).resolve(
        MemoryRequest(ids=ids), ""
    )
    params = LoadParams.of(extra_args["kv_transfer_params"], prompt["cache_salt"])
    assert params == served.params
    assert prompt["prompt_token_ids"][: len(served.ids)] == served.ids
    assert len(prompt["prompt_token_ids"]) > len(served.ids)
    assert offline.prompt(prompt["prompt_token_ids"][len(served.ids) :], ids)[0] == prompt
    natively, nothing = offline.prompt(" words", ids, quality_target=0.5)
    assert (natively, nothing) == ({"prompt_token_ids": prompt["prompt_token_ids"]}, {})
    offline.set_window(len(served.ids))
    with pytest.raises(ContextTooLong):
        offline.prompt(" words", ids)
    with pytest.raises(UnsupportedRequest, match="empty"):
        offline.prompt("", ids)


def test_a_copy_from_elsewhere_promises_nothing(
    tiny_models: tuple[Path, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    package = capture(tiny_models[0], "words of a stranger")
    with monkeypatch.context() as patch:
        patch.setenv("AWARENESS_HOME", str(tmp_path / "elsewhere"))
        memory = publish(package, tmp_path / "store").stem
    resolver = copies_of(tiny_models[0], tmp_path / "store")
    prompt = resolver.resolve(MemoryRequest(ids=(memory,)), "")
    assert prompt.report()["origin"] == ["claimed"]
    assert prompt.retention == [None]
    assert prompt.recomputed().retention == [1.0]
    wanted = MemoryRequest(ids=(memory,), quality_target=0.1)
    assert resolver.resolve(wanted, "").tail is None
    with pytest.raises(QualityUnreachable, match="vouches"):
        resolver.resolve(wanted.model_copy(update={"on_low_quality": "fail"}), "")
    # Captured here, the same bytes are the server's own.
    publish(package, tmp_path / "store")
    own = copies_of(tiny_models[0], tmp_path / "store").resolve(MemoryRequest(ids=(memory,)), "")
    assert (own.report()["origin"], own.retention) == (["own"], [1.0])


def test_ids_that_are_not_those_of_the_text_are_refused(
    tiny_models: tuple[Path, Path], tmp_path: Path
) -> None:
    package = capture(tiny_models[0], TEXT)
    parts = {name: getattr(package, name) for name in ("geometry", "text", "spans")}
    states = {name: getattr(package, name) for name in ("keys", "values")}
    for place in (0, 1, len(package.tokens) - 1):
        ids = list(package.tokens)
        ids[place] += 1
        forged = build(**parts, **states, tokens=ids, engine="vllm", versions={})
        memory = publish(forged, tmp_path / "store").stem
        with pytest.raises(PackageCorrupt, match="ids"):
            copies_of(tiny_models[0], tmp_path / "store").resolve_one(memory, "")


def test_a_file_is_read_again_only_where_it_changed(
    tiny_models: tuple[Path, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = publish(capture(tiny_models[0], TEXT), tmp_path)
    resolver, reads = copies_of(tiny_models[0], tmp_path), []

    def counted(*args: Any, **kwargs: Any) -> Any:
        reads.append(args)
        return read_index(*args, **kwargs)

    monkeypatch.setattr("awareness_vllm.serving.resolver.read_index", counted)
    first = resolver.resolve_one(path.stem, "")
    assert resolver.resolve_one(path.stem, "") is first
    assert len(reads) == 1
    facts, raw = path.stat(), bytearray(path.read_bytes())
    raw[-1] ^= 1
    path.write_bytes(raw)
    os.utime(path, ns=(facts.st_atime_ns, facts.st_mtime_ns))
    for _ in range(2):
        with pytest.raises(PackageCorrupt, match="sha256"):
            resolver.resolve_one(path.stem, "")


@pytest.mark.parametrize(
    ("prefix", "ids", "question"),
    [
        ((2,), [2, 7], [7]),
        ((2,), [2, 2, 7, 2], [7, 2]),  # the text spells the BOS that the tokenizer adds
        ((2, 3), [2, 3, 2, 3, 2, 7], [2, 7]),
        ((2,), [7], [7]),
        ((2,), [2, 2], []),
        ((), [2, 7], [2, 7]),
    ],
)
def test_a_question_brings_no_prefix(
    geometry: Geometry, prefix: tuple[int, ...], ids: list[int], question: list[int]
) -> None:
    assert ServedModel(Path("none"), 9, geometry, prefix).without_prefix(ids) == question
