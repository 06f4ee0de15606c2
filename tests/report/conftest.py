"""A browser, and a report in a file, for tests of the report."""

import pytest

from tests import chromium
from tests.report.pages import make_page


@pytest.fixture(scope="module")
def browser():
    with chromium.launch() as browser:
        yield browser


@pytest.fixture(scope="module")
def path(tmp_path_factory):
    path = tmp_path_factory.mktemp("page") / "test-scann.report.html"
    path.write_text(make_page(), encoding="utf-8")
    return path
