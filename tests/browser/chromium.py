"""Debian's Chromium, driven by Playwright; and where its screenshots go."""

import shutil
from contextlib import contextmanager

import pytest
from conftest import ROOT

sync_api = pytest.importorskip("playwright.sync_api")
sync_api.expect.set_options(timeout=30_000)  # a busy computer is slow
NAMES = ["chromium", "chromium-browser", "google-chrome"]
PROGRAM = next(filter(None, map(shutil.which, NAMES)), None)
PICTURES = ROOT / "notebooks" / "outputs" / "browser"
LAPTOP, PHONE = {"width": 1280, "height": 900}, {"width": 390, "height": 844}
marks = [
    pytest.mark.browser,
    pytest.mark.skipif(not PROGRAM, reason="no Chromium here: apt-get install chromium"),
]


@contextmanager
def started():
    """A browser without a window, as root too."""
    PICTURES.mkdir(parents=True, exist_ok=True)
    with sync_api.sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=PROGRAM, args=["--no-sandbox"])
        yield browser
        browser.close()
