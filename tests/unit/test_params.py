"""Load plans: only the server can sign one, and its salt tells apart all that differs."""

from __future__ import annotations

import string

import pytest
from connector_stubs import plan_with
from hypothesis import example, given, settings
from hypothesis import strategies as st
from vllm.entrypoints.generate.base.protocol import validate_cache_salt

from awareness_vllm.serving.config import PARAMS_KEY
from awareness_vllm.serving.params import LoadParams, Part, kv_transfer_params, passage_params

pytestmark = pytest.mark.unit

json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5),
    lambda inner: (
        st.lists(inner, max_size=3)
        | st.dictionaries(
            st.sampled_from(["parts", "memory", "tokens", "tail", "caller_salt", PARAMS_KEY, "x"]),
            inner,
        )
    ),
    max_leaves=8,
)


@settings(max_examples=300)
@given(params=json_values, salt=st.none() | st.text(max_size=10))
def test_params_that_a_client_makes_up_are_ignored(params: object, salt: str | None) -> None:
    assert LoadParams.of(params, salt) is None
    assert LoadParams.of({PARAMS_KEY: params}, salt) is None


@given(
    memory=st.text(max_size=5),
    wmatrix=st.text(max_size=5),
    tokens=st.integers(1),
    salt=st.text(),
)
def test_params_count_only_with_the_salt_that_belongs_to_them(
    memory: str, wmatrix: str, tokens: int, salt: str
) -> None:
    params = plan_with(memory, wmatrix, tokens=tokens, salt=salt)
    carried = kv_transfer_params(params, {"other": 1})
    assert carried["other"] == 1
    assert LoadParams.of(carried, params.cache_salt) == params
    for other in (None, "", salt, params.cache_salt[:-1], params.cache_salt + "0"):
        assert LoadParams.of(carried, other) is None
    part = carried[PARAMS_KEY]["parts"][0]
    forged = {PARAMS_KEY: carried[PARAMS_KEY] | {"parts": [part | {"memory": memory + "x"}]}}
    assert LoadParams.of(forged, params.cache_salt) is None
    for wrong in ({"unknown": 1}, {"parts": []}, {"parts": [part | {"tokens": 0}]}):
        changed = {PARAMS_KEY: carried[PARAMS_KEY] | wrong}
        assert LoadParams.of(changed, params.cache_salt) is None


@example([("a", "b", ""), ("ab", "", ""), ("a", "", "b"), ("", "a", "b"), ('a", "b', "", "")])
@given(
    st.lists(
        st.tuples(*[st.text(st.sampled_from('a",\\[] @/\0'), max_size=4)] * 3),
        min_size=2,
        max_size=6,
        unique=True,
    )
)
def test_the_salt_tells_memory_map_and_caller_apart(parts: list[tuple[str, str, str]]) -> None:
    salts = {plan_with(m, w, salt=s).cache_salt for m, w, s in parts}
    assert len(salts) == len(parts)
    for salt in salts:
        validate_cache_salt(salt)
        assert len(salt) <= 128
        assert set(salt) <= set(string.ascii_lowercase + string.digits + "-")


def test_the_salt_tells_how_much_was_read_natively() -> None:
    assert len({plan_with(tail=n).cache_salt for n in (0, 1)}) == 2


def test_the_salt_tells_order_tenant_and_skipped_tokens() -> None:
    first, second = (Part(memory=name, digest=name, tokens=1) for name in ("a", "b"))
    skipped = second.model_copy(update={"skip": 1})
    salts = {
        LoadParams(parts=parts, tenant=tenant).cache_salt
        for parts in ((first, second), (second, first), (first, skipped), (first,))
        for tenant in ("", "acme")
    }
    assert len(salts) == 8


def test_the_salt_names_what_is_laid_over() -> None:
    (part,) = plan_with(tokens=40).parts
    salts = {
        LoadParams(parts=(part.model_copy(update={"rereads": spans}),)).cache_salt
        for spans in ((), ((5, 9),), ((5, 10),), ((5, 9), (12, 20)))
    }
    assert len(salts) == 4


def test_a_passages_request_shares_its_blocks_with_no_other() -> None:
    (part,) = plan_with(tokens=40, wmatrix="map").parts
    part = part.model_copy(update={"skip": 2, "rereads": ((5, 9),)})
    plans = [passage_params(part, span, "acme") for span in ((20, 30), (21, 30), (20, 31))]
    assert len({plan.cache_salt for plan in plans}) == 3
    for plan, span in zip(plans, ((20, 30), (21, 30), (20, 31)), strict=True):
        assert LoadParams.of(kv_transfer_params(plan), plan.cache_salt) == plan
        assert plan.passage_name == (part.key, span)
        # The memory's own first ids, of which those before the passage are loaded.
        assert (plan.parts[0].skip, plan.tokens, plan.tokens - plan.tail) == (0, span[1], span[0])
        assert plan.parts[0].rereads == ()
        users = plan.model_copy(update={"passage": False})
        assert users.cache_salt != plan.cache_salt
        assert users.passage_name is None
