"""Who may be in memory: one load at a time, within a budget, the least recently used out first."""

import asyncio
from collections.abc import AsyncGenerator, Awaitable, Callable, Iterable, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass
from typing import Final, Protocol

from bus.errors import Unavailable
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
    """There is no room; `held_bytes` are held by what must stay."""

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
        """
        async with self._loading:
            leaving = to_evict(list(self._tenants()), need_bytes, self.budget_bytes)
            if isinstance(leaving, Full) or (leaving and not may_evict):
                held = sum(tenant.memory_bytes for tenant in self._tenants())
                kept = ", ".join(t.label for t in self._tenants() if t.memory_bytes) or "nothing"
                raise NoRoom(
                    f"there is no room in memory for {label}: it needs about {_mb(need_bytes)}; of "
                    f"the {_mb(self.budget_bytes)} that memory_budget_mb allows, {_mb(held)} are "
                    f"held by {kept}",
                    retry_after_s=30,
                    details={"needed_bytes": need_bytes, "budget_bytes": self.budget_bytes},
                )
            for tenant in leaving:
                await self._evict(tenant)
            before = resident_bytes()
            yield lambda: max(0, resident_bytes() - before)


def _mb(size_bytes: float) -> str:
    return f"{size_bytes / 1e6:,.0f} MB"
