"""Who may be in memory: one load at a time, within a budget, the least recently used out first."""

import asyncio
from collections.abc import AsyncGenerator, Awaitable, Callable, Iterable, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass
from typing import Final, Protocol

from bus.errors import Unavailable, Unprocessable
from bus.telemetry import resident_bytes

# An artefact takes about this much more in memory, until it has been measured.
FACTOR: Final = 1.3


class NoRoom(Unavailable):
    """Others hold the memory, and must keep it."""


class Tenant(Protocol):
    """What takes memory."""

    @property
    def label(self) -> str:
        """What it is called in errors."""

    @property
    def memory_bytes(self) -> int:
        """What it takes; 0 when it is not in memory."""

    @property
    def pinned(self) -> bool:
        """Whether it must stay."""

    @property
    def busy(self) -> bool:
        """Whether it is being asked just now."""

    @property
    def used_at(self) -> float:
        """When it was last asked, in monotonic seconds."""


@dataclass(frozen=True)
class Full:
    """There can be no room; `held_bytes` are held by what must stay."""

    held_bytes: int


def to_evict(tenants: Sequence[Tenant], need_bytes: int, budget_bytes: int) -> list[Tenant] | Full:
    """Return who has to leave so that `need_bytes` more fit, the least recently used first.

    Pinned ones never leave. One that is being asked leaves only after all that are not.
    """
    used = sum(tenant.memory_bytes for tenant in tenants)
    leaving: list[Tenant] = []
    free = sorted(
        (tenant for tenant in tenants if tenant.memory_bytes and not tenant.pinned),
        key=lambda tenant: (tenant.busy, tenant.used_at),
    )
    for tenant in free:
        if used + need_bytes <= budget_bytes:
            break
        leaving.append(tenant)
        used -= tenant.memory_bytes
    return leaving if used + need_bytes <= budget_bytes else Full(used)


class Memory:
    """The memory of one worker, as far as models take it.

    Args:
        budget_bytes: What they may take together; can be changed at any time.
        tenants: Who takes memory just now.
        evict: Puts one out, and returns when its memory is free.
    """

    def __init__(
        self,
        budget_bytes: int,
        tenants: Callable[[], Iterable[Tenant]],
        evict: Callable[[Tenant], Awaitable[None]],
    ) -> None:
        self.budget_bytes = budget_bytes
        self._tenants = tenants
        self._evict = evict
        self._loading = asyncio.Lock()

    @asynccontextmanager
    async def loading(
        self, label: str, need_bytes: int, *, may_evict: bool = True
    ) -> AsyncGenerator[Callable[[], int]]:
        """Be the only one that loads while inside, with room for `need_bytes`.

        Gives a function that tells by how much this process has grown meanwhile.

        Args:
            label: What is loaded.
            need_bytes: How much it is likely to take.
            may_evict: Whether others may be put out for it.

        Raises:
            NoRoom: There is none; says who holds it, and which setting to turn.
            Unprocessable: There is none, whoever leaves; says which setting to turn.
        """
        async with self._loading:
            leaving = to_evict(list(self._tenants()), need_bytes, self.budget_bytes)
            if isinstance(leaving, Full):
                raise self._never(label, need_bytes)
            if leaving and not may_evict:
                raise self._not_now(label, need_bytes)
            for tenant in leaving:
                await self._evict(tenant)
            before = resident_bytes()
            yield lambda: max(0, resident_bytes() - before)

    def _not_now(self, label: str, need_bytes: int) -> NoRoom:
        held = [tenant for tenant in self._tenants() if tenant.memory_bytes]
        return NoRoom(
            f"there is no room in memory for {label}: it needs about {_mb(need_bytes)}; of "
            f"the {_mb(self.budget_bytes)} that memory_budget_mb allows, {_held(held)}",
            retry_after_s=30,
            details=self._figures(need_bytes),
        )

    def _never(self, label: str, need_bytes: int) -> Unprocessable:
        pinned = [tenant for tenant in self._tenants() if tenant.memory_bytes and tenant.pinned]
        of_which = f", of which {_held(pinned)}, which must stay" if pinned else ""
        return Unprocessable(
            f"there is no room in memory for {label}, whatever else leaves: it needs about "
            f"{_mb(need_bytes)}, and memory_budget_mb allows {_mb(self.budget_bytes)}{of_which}; "
            "raise memory_budget_mb",
            details=self._figures(need_bytes),
        )

    def _figures(self, need_bytes: int) -> dict[str, int]:
        return {"needed_bytes": need_bytes, "budget_bytes": self.budget_bytes}


def _held(tenants: Sequence[Tenant]) -> str:
    held_bytes = sum(tenant.memory_bytes for tenant in tenants)
    return f"{_mb(held_bytes)} are held by {', '.join(tenant.label for tenant in tenants)}"


def _mb(size_bytes: float) -> str:
    size_mb = size_bytes / 1e6
    return f"{size_mb:,.0f} MB" if size_mb >= 10 else f"{size_mb:.2g} MB"
