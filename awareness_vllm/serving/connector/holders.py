"""Who has loaded which memory: tenants share aligned states, and none drops another one's."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterable

from awareness_vllm.serving.params import Key

MAX_HELD = 4096
"""Memories whose holders are known; beyond, those of the one loaded longest ago are forgotten."""


class Holders:
    """The tenants that have loaded each memory since it was last aligned."""

    def __init__(self) -> None:
        self.tenants: OrderedDict[Key, set[str]] = OrderedDict()

    def add(self, key: Key, tenants: Iterable[str]) -> None:
        self.tenants.setdefault(key, set()).update(tenants)
        self.tenants.move_to_end(key)
        while len(self.tenants) > MAX_HELD:
            self.tenants.popitem(last=False)

    def replace(self, key: Key, tenants: Iterable[str]) -> None:
        """The holders of a memory that was aligned anew: whoever held it before has lost it."""
        self.tenants.pop(key, None)
        self.add(key, tenants)

    def remove(self, key: Key, tenant: str) -> bool:
        """Take one tenant's reference away; whether others are left."""
        tenants = self.tenants.get(key, set())
        tenants.discard(tenant)
        if not tenants:
            self.tenants.pop(key, None)
        return bool(tenants)
