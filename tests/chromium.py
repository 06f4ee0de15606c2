"""A headless browser for tests of pages."""

import contextlib
import os
import shutil

import pytest

VARIABLE = "VIXML_JAX_BROWSER"  # Path of a browser; if set, a missing one fails the test.
_ARGUMENTS = (
    "--no-sandbox",
    "--disable-gpu",
    "--disable-quic",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
)


@contextlib.contextmanager
def launch():
    """Yields a browser. Without one the test is skipped, or fails if VARIABLE is set."""
    required = os.environ.get(VARIABLE)
    path = required or shutil.which("chromium") or shutil.which("google-chrome")
    if required and not os.path.exists(required):
        pytest.fail(f"{VARIABLE}={required}: not found")
    if path is None:
        pytest.skip(f"no chromium in PATH, and no {VARIABLE}")
    try:
        from playwright import sync_api
    except ImportError:
        if required:
            raise
        pytest.skip("no playwright: pip install '.[test]'")
    with sync_api.sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=path, args=list(_ARGUMENTS))
        try:
            yield browser
        finally:
            browser.close()
