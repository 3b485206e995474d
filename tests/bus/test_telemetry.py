"""What is measured: within the limits of the control group, and told where others look."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from bus.instance import join
from bus.subjects import BROKER_TELEMETRY, HOST_TELEMETRY, TELEMETRY
from bus.tasks import beside
from bus.telemetry import (
    Cgroup,
    HostSampler,
    Sampler,
    publish_broker,
    publish_host,
    read_cgroup,
    report_host,
)
from bus.testing import until

GIB = 1024**3
REPOSITORY = Path(__file__).parents[2]


@pytest.fixture
def cgroup(tmp_path):
    """Write files as a kernel shows them, and read them."""

    def made(own: str, files: dict[str, str]) -> Cgroup:
        (tmp_path / "own").write_text(own)
        for name, text in files.items():
            path = tmp_path / "fs" / name
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(text)
        return read_cgroup(tmp_path / "fs", tmp_path / "own")

    return made


def test_v2_in_a_container_the_mount_is_the_own_group(cgroup):
    found = cgroup(
        "0::/\n",
        {
            "cgroup.controllers": "cpu memory",
            "cpu.max": "150000 100000\n",
            "cpu.stat": "usage_usec 2500000\nuser_usec 1\n",
            "memory.max": f"{GIB}\n",
            "memory.current": "500000000\n",
            "memory.stat": "anon 1\ninactive_file 100000000\n",
        },
    )
    assert found == Cgroup(1.5, 2.5, GIB, 400_000_000)


def test_v2_on_a_host_the_least_limit_on_the_way_up_counts(cgroup):
    found = cgroup(
        "0::/system.slice/bkg.service\n",
        {
            "cgroup.controllers": "cpu memory",
            "system.slice/cpu.max": "200000 100000",
            "system.slice/cpu.stat": "usage_usec 7000000",
            "system.slice/memory.max": str(2 * GIB),
            "system.slice/bkg.service/cpu.max": "max 100000",
            "system.slice/bkg.service/cpu.stat": "usage_usec 1000000",
            "system.slice/bkg.service/memory.max": str(GIB),
            "system.slice/bkg.service/memory.current": "1000",
        },
    )
    assert found == Cgroup(2.0, 7.0, GIB, 1000)


def test_v2_a_path_that_only_the_host_has_is_passed_over(cgroup):
    found = cgroup(
        "0::/docker/0123\n",
        {"cgroup.controllers": "", "cpu.max": "50000 100000", "memory.max": "max"},
    )
    assert found == Cgroup(0.5)


def test_v1_has_its_limits_by_controller(cgroup):
    found = cgroup(
        "4:memory:/docker/0123\n3:cpu,cpuacct:/docker/0123\n1:name=systemd:/x\n",
        {
            "cpu,cpuacct/docker/0123/cpu.cfs_quota_us": "300000",
            "cpu,cpuacct/docker/0123/cpu.cfs_period_us": "100000",
            "cpu,cpuacct/docker/0123/cpuacct.usage": "4000000000",
            "cpu,cpuacct/cpu.cfs_quota_us": "-1",
            "cpu,cpuacct/cpu.cfs_period_us": "100000",
            "memory/docker/0123/memory.limit_in_bytes": str(GIB),
            "memory/docker/0123/memory.usage_in_bytes": "300",
            "memory/docker/0123/memory.stat": "total_inactive_file 100",
            "memory/memory.limit_in_bytes": "9223372036854771712",
        },
    )
    assert found == Cgroup(3.0, 4.0, GIB, 200)


@pytest.mark.parametrize(
    ("own", "files"),
    [
        ("", {}),
        ("nonsense", {"cgroup.controllers": "", "cpu.max": "", "memory.max": "much"}),
        ("0::/../../etc\n", {"cgroup.controllers": "", "cpu.max": "x y", "memory.stat": "a"}),
        ("1:cpu:/\n", {"cpu/cpu.cfs_quota_us": "0", "cpu/cpu.cfs_period_us": "0"}),
    ],
)
def test_what_cannot_be_read_is_no_limit(cgroup, own, files):
    found = cgroup(own, files)
    assert (found.processors, found.mem_limit_bytes) == (None, None)


def test_no_control_groups_at_all_is_no_limit(tmp_path):
    assert read_cgroup(tmp_path / "absent", tmp_path / "absent") == Cgroup()


def test_a_host_is_what_its_control_group_may_use(tmp_path, cgroup):
    cgroup(
        "0::/\n",
        {
            "cgroup.controllers": "",
            "cpu.max": "50000 100000",
            "cpu.stat": "usage_usec 0",
            "memory.max": str(64 * 1024**2),
            "memory.current": str(16 * 1024**2),
        },
    )
    sampler = HostSampler(
        "h", tmp_path / "not" / "there", root=tmp_path / "fs", own=tmp_path / "own"
    )
    # All that was possible since, and more.
    (tmp_path / "fs" / "cpu.stat").write_text("usage_usec 999999999")
    found = sampler.sample()
    assert (found.host, found.processors, found.cpu) == ("h", 0.5, 100.0)
    assert found.mem_total_bytes == 64 * 1024**2
    assert found.mem_available_bytes == 48 * 1024**2
    assert 0 < found.disk_free_bytes <= found.disk_total_bytes
    assert len(found.load) == 3


def test_processors_that_a_process_is_kept_from_are_not_its_own():
    script = (
        "import os; from bus.telemetry import allowed;"
        "os.sched_setaffinity(0, {min(os.sched_getaffinity(0))});"
        "print(allowed()[0])"
    )
    run = [sys.executable, "-c", script]
    said = subprocess.run(run, check=True, capture_output=True, text=True, cwd=REPOSITORY)
    # Less where the control group of this run allows less.
    assert 0 < float(said.stdout) <= 1


def test_a_process_is_measured_with_names_that_stay():
    found = Sampler().sample()
    assert found.mem_bytes > 1_000_000
    assert set(found.gauges) == {"cpu_host_percent", "mem_host_percent", "threads", "open_files"}
    assert found.gauges["threads"] >= 1
    before = found.open_files
    read, write = os.pipe()
    try:
        assert Sampler().sample().open_files == before + 2
    finally:
        os.close(read)
        os.close(write)


async def test_an_instance_tells_its_gauges_beside_the_plugins_own(client, settings):
    async with (
        client.follow(TELEMETRY, plugin="candle") as told,
        join(client, settings, plugin="candle", description="a test", telemetry_s=0.1) as candle,
    ):
        candle.gauges["queue"] = 7
        async for received in told:
            if "queue" in received.payload.gauges:
                break
    assert received.payload.gauges["queue"] == 7
    assert set(received.payload.gauges) >= {
        "cpu_host_percent", "mem_host_percent", "threads", "open_files", "loop_lag_ms",
        "in_flight", "requests", "errors",
    }  # fmt: skip


async def test_host_and_broker_are_told_and_kept(client, tmp_path):
    host = await publish_host(client, HostSampler("h.1", tmp_path))
    measured = await publish_broker(client, "h.1")
    assert measured.stored_bytes >= 0
    assert measured.streams >= 5
    assert measured.round_trip_ms > 0

    async def kept():
        store = client.store
        return (
            await store.newest(HOST_TELEMETRY, host="h.1") == host
            and await store.newest(BROKER_TELEMETRY) == measured
        )

    await until(kept)
    assert await client.store.newest(HOST_TELEMETRY, host="other") is None


async def test_a_host_is_reported_until_it_ends(client, tmp_path):
    async with (
        client.follow(HOST_TELEMETRY) as hosts,
        client.follow(BROKER_TELEMETRY) as brokers,
        beside(report_host(client, HostSampler("h", tmp_path), period_s=0.05)),
    ):
        first, second = await anext(hosts), await anext(hosts)
        assert first.tokens == {"host": "h"}
        assert first.payload.timestamp < second.payload.timestamp
        assert (await anext(brokers)).payload.host == "h"
