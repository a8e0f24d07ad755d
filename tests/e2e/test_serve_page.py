"""The server as its users start it, and its page in a headless browser: type, generate, see the picture, edit it, chat.

Needs playwright and a Chromium (`pip install playwright`, and `apt-get install chromium` or `playwright install
chromium`); without them it is skipped.
"""

import re
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
playwright = pytest.importorskip("playwright.sync_api", reason="playwright is not installed: pip install playwright")
PATIENCE = 300_000  # ms


@pytest.fixture(scope="module")
def address():
    command = [sys.executable, "tools/serve.py", "--model", "tests/golden/public-basic/ckpt", "--name", "tiny"]
    command += ["--port", "0", "--num-timesteps", "4"]
    process = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, text=True)
    try:
        line = next((line for line in process.stdout if "is served at" in line), "")
        assert line, "the server did not start"
        yield re.search(r"http://\S+", line)[0]
        process.send_signal(signal.SIGINT)
        assert process.wait(60) == 0
    finally:
        process.kill()


@pytest.fixture(scope="module")
def page(address):
    if CHROMIUM is None:
        pytest.skip("no chromium on PATH: apt-get install chromium")
    with playwright.sync_playwright() as driver:
        browser = driver.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        page = browser.new_page(viewport={"width": 390, "height": 844})
        page.set_default_timeout(PATIENCE)
        faults: list[str] = []
        page.on("console", lambda message: faults.append(message.text) if message.type == "error" else None)
        page.on("pageerror", lambda error: faults.append(str(error)))
        page.goto(address)
        page.get_by_text("Ready: tiny").wait_for()
        yield page
        assert [fault for fault in faults if "status of 400" not in fault] == []  # the refusal that was asked for
        browser.close()


def seen(page, picture) -> bool:
    """Whether the browser could decode it."""
    return page.evaluate("image => image.complete && image.naturalWidth > 0", picture.element_handle())


def test_draw_edit_and_chat(page, tmp_path):
    page.get_by_text("Draw", exact=True).click()
    page.get_by_label("Your message").fill("A blue house")
    page.get_by_role("button", name="Send").click()
    drawn = page.get_by_role("log").get_by_role("img", name="A blue house")
    drawn.wait_for()
    assert seen(page, drawn)

    page.get_by_role("button", name="Edit this").click()
    page.get_by_label("Your message").fill("Make it red")
    page.get_by_role("button", name="Send").click()
    edited = page.get_by_role("log").get_by_role("img", name="Make it red")
    edited.wait_for()
    assert seen(page, edited)

    page.get_by_text("Chat", exact=True).click()
    page.get_by_text("Settings").click()
    page.get_by_label("Tokens of an answer").fill("5")
    page.get_by_label("Your message").fill("What is it?")
    page.get_by_label("Your message").press("Enter")
    page.get_by_text("Ready.", exact=True).wait_for()
    assert page.locator(".turn").last.locator(".words").inner_text().strip()

    assert page.evaluate("document.documentElement.scrollWidth <= window.innerWidth")  # nothing beside a phone's screen
    page.screenshot(path=tmp_path / "page.png")


def test_a_refusal_is_shown(page):
    page.get_by_label("Tokens of an answer").fill("5000")
    page.get_by_label("Your message").fill("Too much")
    page.evaluate("document.getElementById('tokens').removeAttribute('max')")
    page.get_by_role("button", name="Send").click()
    page.get_by_text("this server allows at most 2048").first.wait_for()
    assert page.locator(".turn").nth(-2).locator(".who").inner_text() == "You"  # no empty answer is left
