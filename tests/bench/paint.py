"""Measures how soon the browser editor can be used on a slow computer: Chromium with its CPU slowed down.

Each round is a new browser profile that has nothing cached and opens a file by its address: the first paint
with content, the file's text, and the first typed letter on the screen, from which on the page counts as
interactive. Times count from the navigation. The gateway is a `local` one, which needs no Incus. The editor
has to be built (`deploy/build-web`). Times alone fail nothing.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import statistics
import sys
import tempfile
from pathlib import Path
from typing import Any, Final

from playwright.async_api import Browser, async_playwright

from gateway.api.editor import STATIC
from gateway.auth import tokens
from tests.live import LiveGateway, local_gateway

TENANT: Final = "shop"
SOURCE: Final = Path(__file__).parents[2] / "deploy/templates/vite-react/src/app.tsx"
CHROMIUM: Final = "/usr/bin/chromium-headless-shell"
LETTER: Final = "ÿ"  # stands nowhere in the file

PATIENCE: Final = 120  # seconds

# Promises of the times at which the text is there and the letter is, each at the picture after it. The page's
# policy lets nobody wait for an expression.
_WATCH: Final = """
([text, letter]) => {
  const shown = (wanted) => new Promise((resolve) => {
    const look = () => {
      const content = document.querySelector(".editor .cm-content")?.textContent ?? "";
      requestAnimationFrame(content.includes(wanted) ? () => resolve(performance.now()) : look);
    };
    look();
  });
  window.seen = { text: shown(text), typed: shown(letter) };
}
"""
_PAINT: Final = "performance.getEntriesByName('first-contentful-paint')[0]?.startTime ?? 0"


async def opened(browser: Browser, gateway: LiveGateway, rate: float) -> dict[str, float]:
    """Open a file once; return milliseconds until each step, and the longest time without a free moment."""
    context = await browser.new_context(viewport={"width": 1440, "height": 900})
    try:
        cookie: Any = {"name": tokens.COOKIE, "value": gateway.token(TENANT), "url": gateway.url}
        cookie |= {"httpOnly": True, "sameSite": "Strict"}
        await context.add_cookies([cookie])
        page = await context.new_page()
        devtools = await context.new_cdp_session(page)
        await devtools.send("Emulation.setCPUThrottlingRate", {"rate": rate})
        words = json.dumps(["lucide-react", LETTER])
        await page.add_init_script(f"({_WATCH.strip()})({words})")
        async with asyncio.timeout(PATIENCE):
            await page.goto(f"{gateway.url}/#{TENANT}/app.tsx")
            text = float(await page.evaluate("window.seen.text"))
            await page.locator(".editor .cm-content").click()
            await page.keyboard.insert_text(LETTER)
            typed = float(await page.evaluate("window.seen.typed"))
            return {"paint": float(await page.evaluate(_PAINT)), "text": text, "typed": typed}
    finally:
        await context.close()


async def run(rounds: int, rate: float) -> dict[str, dict[str, float]]:
    with tempfile.TemporaryDirectory(prefix="gateway-bench-") as folder:
        gateway = await local_gateway(Path(folder), TENANT)
        await gateway.start()
        try:
            async with gateway.http(TENANT) as session:
                await session.put(f"/v1/tenants/{TENANT}/files/app.tsx", data=SOURCE.read_bytes())
            async with async_playwright() as playwright:
                flags = ["--no-sandbox", "--disable-gpu"]
                browser = await playwright.chromium.launch(executable_path=CHROMIUM, args=flags)
                times = [await opened(browser, gateway, rate) for _ in range(rounds)]
                await browser.close()
        finally:
            await gateway.stop()
    return {
        step: {"median": statistics.median(found), "worst": max(found)}
        for step in ("paint", "text", "typed")
        if (found := [one[step] for one in times])
    }


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--slow", type=float, default=4.0, help="how many times slower the CPU is")
    parser.add_argument("--json", action="store_true")
    words = parser.parse_args()
    if not (STATIC / "index.html").is_file():
        print("the editor is not built: deploy/build-web", file=sys.stderr)
        return 1
    results = asyncio.run(run(words.rounds, words.slow))
    if words.json:
        print(json.dumps(results, indent=2))
        return 0
    names = {
        "paint": "first paint",
        "text": "the file's text",
        "typed": "interactive: the first letter shows",
    }
    print(f"{words.rounds} rounds, a CPU {words.slow:g} times slower, in milliseconds: median, worst")
    for step, found in results.items():
        print(f"{names[step]:38} {found['median']:8.0f} {found['worst']:8.0f}")
    return 0
