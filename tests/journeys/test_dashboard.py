"""The dashboard as its user has it: a real browser, the real platform, nothing but clicks."""

import os
import re
from collections.abc import AsyncGenerator, Awaitable, Callable
from importlib.resources import files

import psutil
import pytest
import pytest_asyncio
from playwright.async_api import Browser, Page, async_playwright, expect

from tests.browser import find
from tests.journeys.conftest import Platform, ask

AXE = files("axe_playwright_python").joinpath("axe.min.js").read_text()
VIEWS = ("/", "/plugins/candle", "/plugins/nobody")
# What a gateway that is gone makes the browser say by itself.
EXPECTED_WITHOUT_GATEWAY = re.compile(r"WebSocket connection to|Failed to load resource")

NewPage = Callable[..., Awaitable[Page]]


@pytest_asyncio.fixture
async def browser() -> AsyncGenerator[Browser]:
    """The Chromium that `make test` names; otherwise one that is installed."""
    found = find()
    assert found, "no browser was found: run `make test`, which brings one"
    # Chromium's own sandbox does not work for root.
    options = ["--no-sandbox"] if os.geteuid() == 0 else []
    async with async_playwright() as playwright:
        running = await playwright.chromium.launch(executable_path=found, args=options)
        yield running
        await running.close()


@pytest_asyncio.fixture
async def complaints() -> AsyncGenerator[list[str]]:
    """What the browser complained of; a test that does not expect it fails by it."""
    said: list[str] = []
    yield said
    assert said == []


@pytest.fixture
def new_page(browser: Browser, platform: Platform, complaints: list[str]) -> NewPage:
    """Open a page of a browser that has never been here."""

    async def opened(path: str = "/", *, signed_in: bool = True, **more: object) -> Page:
        context = await browser.new_context(
            **{"locale": "en-GB", "base_url": platform.url, **more}  # type: ignore[arg-type]
        )
        page = await context.new_page()
        page.on("console", lambda said: said.type == "error" and complaints.append(said.text))
        page.on("pageerror", lambda error: complaints.append(str(error)))
        if signed_in:
            # As the link that `bkg up` prints.
            await page.goto(f"/?key={platform.key}")
            await expect(page.locator("[data-link-state=live]")).to_be_visible()
        if path != "/" or not signed_in:
            await page.goto(path)
        return page

    return opened


async def test_the_printed_link_signs_in_and_leaves_no_key_in_the_address(new_page, platform):
    page = await new_page()
    assert page.url == f"{platform.url}/"
    await page.reload()
    await expect(page.locator("[data-plugin=candle]")).to_be_visible()


async def test_every_plugin_shows_its_status_cpu_and_memory(new_page):
    page = await new_page()
    await expect(page).to_have_title("Overview – bkg")
    for plugin in ("candle", "rustyface"):
        card = page.locator(f"article[data-plugin={plugin}]")
        await expect(card).to_have_attribute("data-status", "running")
        await expect(card.locator("[data-chip]")).to_have_text("Running")
        await expect(card).to_contain_text(re.compile(r"CPU\s*[\d.]+ %"))
        await expect(card).to_contain_text(re.compile(r"Memory\s*[\d.]+ MiB"))
    await expect(page.locator("[data-plugin=candle]")).to_contain_text("candle.model.run")
    await expect(page.locator("[data-plugin=candle]")).to_contain_text(re.compile(r"Models\s*0"))


async def test_a_plugin_is_stopped_started_and_restarted_by_clicks(new_page, platform):
    page = await new_page("/plugins/candle")
    plugin, dialog = page.locator(".plugin[data-plugin=candle]"), page.locator("[data-dialog]")
    await expect(page.locator("[data-action=start]")).to_have_attribute("aria-disabled", "true")

    await page.locator("[data-action=stop]").click()
    await dialog.locator("[data-answer=no]").click()
    await expect(plugin).to_have_attribute("data-status", "running")
    await page.locator("[data-action=stop]").click()
    await dialog.locator("[data-answer=yes]").click()
    await expect(plugin).to_have_attribute("data-status", "stopped", timeout=15_000)
    assert (await state_of(platform, "candle"))["status"] == "stopped"

    await page.locator("[data-action=start]").click()
    await expect(plugin).to_have_attribute("data-status", "running", timeout=15_000)
    before = await state_of(platform, "candle")
    assert before["status"] == "running"

    await page.locator("[data-action=restart]").click()
    await expect(page.locator("[data-fact=generation]")).to_contain_text(
        str(before["generation"] + 1), timeout=15_000
    )
    # It runs all the time: another instance is ready before this one leaves.
    await expect(page.locator("[data-fact=pid]")).not_to_contain_text(
        str(before["pid"]), timeout=15_000
    )
    await expect(plugin).to_have_attribute("data-status", "running")


async def test_what_others_do_shows_without_a_reload(new_page, platform):
    page = await new_page()
    card = page.locator("article[data-plugin=candle]")
    await expect(card).to_have_attribute("data-status", "running")
    async with platform.session() as session:
        for verb, status in (("stop", "stopped"), ("start", "running")):
            async with session.post(f"/api/plugins/candle/{verb}") as answer:
                assert answer.status == 200
            await expect(card).to_have_attribute("data-status", status)


async def test_the_log_comes_live_and_can_be_searched(new_page, platform):
    page = await new_page("/plugins/candle")
    rows = page.locator("[data-log-row]")
    await expect(rows.filter(has_text="instance.ready").first).to_be_visible()
    async with platform.session() as session:
        await ask(session, "candle.model.load", id="seen-live", path="linear-demo.json")
    loaded = rows.filter(has_text="model=seen-live")
    await expect(loaded).to_have_count(1)

    await page.locator("[data-log-search]").fill("SEEN-LIVE")
    await expect(rows).to_have_count(1)
    await loaded.click()
    await expect(page.locator("[data-log-detail]")).to_contain_text("linear-demo.json")
    # The address carries the search: whoever gets the link sees the same.
    await page.reload()
    await expect(rows).to_have_count(1)
    await page.locator("#log-level").select_option("error")
    await expect(rows).to_have_count(0)


async def test_a_wrong_key_is_told_and_the_right_one_leads_in(new_page, platform, complaints):
    page = await new_page("/", signed_in=False)
    await page.locator("#key").fill("wrong")
    await page.keyboard.press("Enter")
    await expect(page.locator("[data-wrong]")).to_have_text("This key is wrong.")
    await page.locator("#key").fill(platform.key)
    await page.keyboard.press("Enter")
    await expect(page.locator("article[data-plugin=candle]")).to_be_visible()
    await page.locator("[data-sign-out]").click()
    await expect(page.locator("#key")).to_be_visible()
    # The browser itself tells of each 401: who looked first, the wrong key.
    assert {one.partition(":")[0] for one in complaints} == {"Failed to load resource"}
    complaints.clear()


async def test_a_lost_gateway_is_seen_and_found_again(new_page, platform, complaints):
    page = await new_page()
    await expect(page.locator("article[data-plugin=candle]")).to_be_visible()
    [gateway] = [
        process
        for process in psutil.Process(platform.pid).children()
        if "services.gateway" in process.cmdline()
    ]
    gateway.suspend()
    await page.evaluate("() => dispatchEvent(new Event('online'))")
    gateway.kill()
    await expect(page.locator("html")).to_have_attribute("data-link", "lost")
    await expect(page.locator("[data-action=stop]").first).to_have_attribute(
        "aria-disabled", "true"
    )
    # `bkg up` starts another one, which asks for the key anew.
    await expect(page.locator("#key")).to_be_visible(timeout=30_000)
    await page.locator("#key").fill(platform.key)
    await page.keyboard.press("Enter")
    await expect(page.locator("[data-link-state=live]")).to_be_visible()
    await expect(page.locator("article[data-plugin=candle]")).to_have_attribute(
        "data-status", "running"
    )
    assert all(EXPECTED_WITHOUT_GATEWAY.match(one) for one in complaints), complaints
    complaints.clear()


@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize(("locale", "width"), [("en-GB", 1440), ("de-DE", 390)])
async def test_no_page_has_a_barrier(new_page, scheme, locale, width):
    """What axe finds: contrast, names, roles, order."""
    page = await new_page(
        locale=locale, color_scheme=scheme, viewport={"width": width, "height": 900}
    )
    for path in VIEWS:
        await page.goto(path)
        await expect(page.locator("[data-link-state=live]")).to_be_visible()
        await expect(page.locator("h1")).to_be_visible()
        assert await barriers(page) == []
        assert not await page.evaluate(
            "() => document.documentElement.scrollWidth > document.documentElement.clientWidth"
        )


@pytest.mark.parametrize("scheme", ["light", "dark"])
async def test_nor_has_the_way_in(new_page, complaints, scheme):
    page = await new_page("/", signed_in=False, color_scheme=scheme)
    await expect(page.locator("#key")).to_be_visible()
    assert await barriers(page) == []
    # Who looks first is told by a 401, and the browser tells of it.
    assert [one.partition(":")[0] for one in complaints] == ["Failed to load resource"]
    complaints.clear()


async def barriers(page: Page) -> list[str]:
    await page.evaluate(AXE)
    found = await page.evaluate("async () => (await axe.run()).violations")
    return [f"{one['id']}: {one['nodes'][0]['html']}" for one in found]


async def state_of(platform: Platform, plugin: str) -> dict[str, object]:
    async with platform.session() as session, session.get(f"/api/plugins/{plugin}") as answer:
        state: dict[str, object] = await answer.json()
        return state
