"""A headless browser for the tests of pages."""

import contextlib
import os
import shutil

import pytest

VARIABLE = "VIXML_JAX_BROWSER"  # Where set, a missing browser is a failure.
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
    """Yields a browser; without one, the test is skipped, or fails where there has to be one."""
    wanted = os.environ.get(VARIABLE)
    path = wanted or shutil.which("chromium") or shutil.which("google-chrome")
    if wanted and not os.path.exists(wanted):
        pytest.fail(f"{VARIABLE}={wanted}: not found")
    if path is None:
        pytest.skip(f"no chromium on the path, and no {VARIABLE}")
    try:
        from playwright import sync_api
    except ImportError:
        if wanted:
            raise
        pytest.skip("no playwright: pip install '.[test]'")
    with sync_api.sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=path, args=list(_ARGUMENTS))
        try:
            yield browser
        finally:
            browser.close()
