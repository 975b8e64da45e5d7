"""The tenants file, and the headers of its tenants: whose key opens which store."""

from __future__ import annotations

import hmac
import json
import re
import traceback
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from awareness_vllm.errors import BadInput, Unauthorized
from awareness_vllm.serving.tenants import Tenants, store_folders

pytestmark = pytest.mark.unit

ACME = {"api_keys": ["sk-acme-1", "sk-acme-2"], "store": "stores/acme"}
UMBRELLA = {"api_keys": ["sk-umbrella"], "store": "/srv/umbrella"}
OWNERS = {"sk-acme-1": "acme", "sk-acme-2": "acme", "sk-umbrella": "umbrella"}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("tenants")


def written(folder: Path, content: object) -> Path:
    """A tenants file: text as it is, anything else as JSON."""
    path = folder / "tenants.json"
    path.write_text(content if isinstance(content, str) else json.dumps(content))
    return path


@pytest.fixture(scope="module")
def tenants(folder: Path) -> Tenants:
    return Tenants.read(written(folder, {"acme": ACME, "umbrella": UMBRELLA}))


def refused(path: Path) -> str:
    """The message with which a file is refused, which tells everything but keys."""
    with pytest.raises(BadInput) as error:
        Tenants.read(path)
    printed = "".join(traceback.format_exception(error.value))
    assert "sk-" not in printed
    for part in (str(path), "Found: ", "Expected: ", "Remedy: "):
        assert part in str(error.value)
    return str(error.value)


def test_each_tenant_has_a_store_of_its_own(folder: Path) -> None:
    path = written(folder, {"acme": ACME, "umbrella": UMBRELLA})
    assert store_folders(path, folder / "default") == {
        "acme": folder.resolve() / "stores/acme",
        "umbrella": Path("/srv/umbrella"),
    }


def test_a_store_may_be_in_the_users_home(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(folder))
    path = written(folder, {"acme": {**ACME, "store": "~/own"}})
    assert store_folders(path, Path("/d")) == {"acme": folder.resolve() / "own"}


@given(header=st.none() | st.text())
def test_without_a_file_everybody_is_the_one_tenant(header: str | None) -> None:
    assert Tenants.read(None).authenticate(header) == ""
    assert store_folders(None, Path("/default")) == {"": Path("/default")}


# Headers

headers = st.one_of(
    st.none(),
    st.text(),
    st.builds(
        "{}{}{}{}".format,
        st.sampled_from(["Bearer", "bearer", "BEARER", "Basic", "Bear", "", "Bearer:", " Bearer"]),
        st.sampled_from([" ", "  ", "", "\t", "\n", "\u00a0"]),
        st.sampled_from(
            [*OWNERS, "", "sk-acme", "SK-ACME-1", "sk-acme-1,sk-acme-2", "é", "\udcff"]
        ),
        st.sampled_from(["", "", "", " ", "\n", "x", "\u0301", " sk-acme-2"]),
    ),
)


@settings(max_examples=150)
@given(header=headers)
def test_a_header_is_its_keys_tenants_or_nobodys(tenants: Tenants, header: str | None) -> None:
    scheme, _, key = (header or "").partition(" ")
    owner = OWNERS.get(key.lstrip(" ")) if scheme.lower() == "bearer" else None
    if owner is not None:
        assert tenants.authenticate(header) == owner
        return
    with pytest.raises(Unauthorized) as error:
        tenants.authenticate(header)
    assert error.value.status == 401
    assert "sk-" not in str(error.value)


@pytest.mark.parametrize("header", [None, "", "Basic x", "Bearer", "Bearer ", "Bearer ключ"])
def test_a_header_without_a_key_is_refused(tenants: Tenants, header: str | None) -> None:
    with pytest.raises(Unauthorized, match="Found: no API key"):
        tenants.authenticate(header)


@pytest.mark.parametrize("key", [*OWNERS, "sk-unknown"])
def test_every_key_is_compared_whichever_it_is(
    tenants: Tenants, monkeypatch: pytest.MonkeyPatch, key: str
) -> None:
    compared = []
    original = hmac.compare_digest

    def compare(one: bytes, other: bytes) -> bool:
        compared.append((len(one), len(other)))
        return original(one, other)

    monkeypatch.setattr(hmac, "compare_digest", compare)
    if key in OWNERS:
        assert tenants.authenticate(f"Bearer {key}") == OWNERS[key]
    else:
        with pytest.raises(Unauthorized):
            tenants.authenticate(f"Bearer {key}")
    assert compared == [(32, 32)] * len(OWNERS)


def test_keys_are_not_kept(tenants: Tenants) -> None:
    text = repr(vars(tenants)) + repr(tenants)
    assert all(key not in text for key in OWNERS)


# Files


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("{", "is not JSON"),
        ("", "is not JSON"),
        ("[" * 100_000, "is not JSON"),
        ("[]", "names no tenants. Found: list"),
        ("null", "names no tenants. Found: NoneType"),
        ({}, "names no tenants. Found: an empty"),
        ({"acme": "sk-acme-1"}, r"wrong entry \(1\). Found: not an object"),
        ({"sk-acme-1": "acme"}, r"wrong entry \(1\). Found: not an object"),
        ({"acme": {"sk-acme-1": "stores"}}, "an unknown field: Extra inputs"),
        (
            {"acme": ACME, "b": {"store": "b"}},
            r"wrong entry \(2\). Found: api_keys: Field required",
        ),
        ({"acme": {"api_keys": ["sk-1"]}}, "store: Field required"),
        ({"acme": {**ACME, "api_keys": "sk-acme-1"}}, "api_keys: Input should be a valid tuple"),
        ({"acme": {**ACME, "api_keys": ["sk-1", 7]}}, "api_keys: Input should be a valid string"),
        ({"acme": {**ACME, "api_keys": []}}, "api_keys: Tuple should have at least 1 item"),
        ({"acme": {**ACME, "store": ""}}, "store: String should have at least 1 character"),
        ({"acme": {**ACME, "store": None}}, "store: Input should be a valid string"),
        ({"acme": {**ACME, "store": "a\0b"}}, "a store that cannot be a folder"),
        ({"acme": {**ACME, "store": "~nobody-here/x"}}, "a store that cannot be a folder"),
        ({"acme": {**ACME, "api_keys": ["sk-1", ""]}}, "unusable API key. Found: an empty one"),
        ({"acme": {**ACME, "api_keys": ["sk-1 "]}}, "unusable API key. Found: one of acme"),
        ({"acme": {**ACME, "api_keys": ["sk-ключ"]}}, "unusable API key. Found: one of acme"),
        ({"": ACME}, "without a usable name. Found: no name in entry 1"),
        ({"acme": ACME, "a/b": UMBRELLA}, "without a usable name. Found: .* entry 2"),
        (
            {"acme": ACME, "b": {"api_keys": ["sk-2", "sk-acme-2"], "store": "b"}},
            "gives an API key to two tenants. Found: acme and b",
        ),
        (
            {"acme": ACME, "b": {"api_keys": ["sk-2"], "store": "./b/../stores//acme"}},
            "gives a store to two tenants. Found: acme and b with ",
        ),
        (
            '{"acme": {"api_keys": ["sk-1"], "store": "a"},'
            ' "acme": {"api_keys": ["sk-2"], "store": "b"}}',
            "names a tenant twice. Found: acme",
        ),
        ('{"acme": {"api_keys": ["sk-1"], "store": "a", "store": "b"}}', "a field twice"),
    ],
)
def test_a_file_that_is_not_clear_is_refused(tmp_path: Path, content: object, message: str) -> None:
    assert re.search(message, refused(written(tmp_path, content)))


def test_a_missing_file_and_a_folder_are_refused(tmp_path: Path) -> None:
    assert "No such file" in refused(tmp_path / "gone.json")
    assert "cannot be read" in refused(tmp_path)


def test_stores_that_are_one_folder_by_a_link_are_refused(tmp_path: Path) -> None:
    (tmp_path / "real").mkdir()
    (tmp_path / "link").symlink_to("real")
    content = {"acme": {**ACME, "store": "real"}, "b": {**UMBRELLA, "store": "link"}}
    assert "gives a store to two tenants" in refused(written(tmp_path, content))


@given(content=st.binary(max_size=40))
def test_any_bytes_are_refused_by_name(folder: Path, content: bytes) -> None:
    path = folder / "bytes.json"
    path.write_bytes(content)
    refused(path)


def json_of(*names: str) -> st.SearchStrategy[object]:
    """Any JSON whose objects have some of these fields."""
    return st.recursive(
        st.none() | st.booleans() | st.integers() | st.floats() | st.sampled_from(["", "sk-1"]),
        lambda inner: (
            st.lists(inner, max_size=3) | st.dictionaries(st.sampled_from(names), inner, max_size=3)
        ),
        max_leaves=6,
    )


keys = st.sampled_from(["sk-1", "sk-2", "sk-3", "sk-4", "sk-5", "sk-6"])
entries = st.fixed_dictionaries(
    {
        "api_keys": st.lists(keys, min_size=1, max_size=2)
        | st.lists(keys | st.sampled_from(["", "sk-ü", "sk- 1"]), max_size=2),
        "store": st.sampled_from(["a", "b", "c", "./a", "d/../b"]),
    }
)


@st.composite
def files(draw: st.DrawFn) -> dict[str, Any]:
    """Files that are nearly right, and often right."""
    names = draw(st.lists(st.sampled_from(["acme", "b", "c.d_e-f"]), max_size=3, unique=True))
    content: dict[str, Any] = {name: draw(entries) for name in names}
    if draw(st.integers(0, 4)) == 0:
        content[draw(st.sampled_from(["", "g", "a b", "ä", "-x"]))] = draw(
            entries | json_of("api_keys", "store", "sk-2", "")
        )
    return content


def clear(content: dict[str, Any]) -> bool:
    """Whether a file says whose key opens which store, in other words than the code's."""
    seen: dict[str, str] = {}
    places: set[str] = set()
    for name, entry in content.items():
        if name in ("", "a b", "ä", "-x") or not isinstance(entry, dict):
            return False
        if set(entry) != {"api_keys", "store"} or not isinstance(entry["api_keys"], list):
            return False
        for key in entry["api_keys"]:
            if key not in ("sk-1", "sk-2", "sk-3", "sk-4", "sk-5", "sk-6"):
                return False
            if seen.setdefault(key, name) != name:
                return False
        if not entry["api_keys"] or not isinstance(entry["store"], str) or not entry["store"]:
            return False
        place = entry["store"].removeprefix("./").removeprefix("d/../")
        if place in places:
            return False
        places.add(place)
    return bool(content)


@settings(max_examples=150)
@given(content=files())
def test_a_file_is_clear_or_refused(folder: Path, content: dict[str, Any]) -> None:
    path = written(folder, content)
    if not clear(content):
        refused(path)
        return
    tenants = Tenants.read(path)
    assert list(store_folders(path, Path("/d"))) == list(content)
    for name, entry in content.items():
        for key in entry["api_keys"]:
            assert tenants.authenticate(f"Bearer {key}") == name


@given(content=json_of("api_keys", "sk-2", ""))
def test_other_json_is_refused(folder: Path, content: object) -> None:
    refused(written(folder, content))
