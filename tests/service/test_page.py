"""The page of the service in a browser: it answers, explains, and asks no other host."""

import pytest

from tests import chromium
from tests.service.test_app import png


@pytest.fixture(scope="module")
def browser():
    with chromium.launch() as browser:
        yield browser


@pytest.fixture
def page(browser, service):
    client, _, _ = service
    context = browser.new_context(viewport={"width": 390, "height": 800})
    page = context.new_page()
    page.requested, page.problems = [], []
    page.on("request", lambda request: page.requested.append(request.url))
    page.on("console", lambda line: page.problems.append(line.text))
    page.on("pageerror", lambda error: page.problems.append(str(error)))
    page.goto(client.address)
    page.get_by_text("20 labels").wait_for()
    yield page
    assert not [url for url in page.requested if not url.startswith((client.address, "blob:"))]
    context.close()


def test_a_query_by_keyboard(page, service):
    page.keyboard.type("a3 b4")
    page.keyboard.press("Enter")
    page.locator("#parts li").nth(1).wait_for()
    expected = service[2](["a3 b4"])[0]
    names = page.locator("#labels li span").all_inner_texts()
    assert [name.split("\n")[0] for name in names] == [label.text for label in expected]
    assert all("prototype" in name for name in names)
    assert page.locator("#near li").count() == 5
    scores = page.locator("#labels li output").all_inner_texts()
    assert scores == [f"{label.score:.4f}" for label in expected]
    assert page.locator("#parts li span").all_inner_texts() == ["a3", "b4"]
    rest = [
        next((x.score for x in found if x.id == expected[0].id), 0.0)
        for found in service[2](["b4", "a3"], k=100)
    ]
    falls = [float(x) for x in page.locator("#parts li output").all_inner_texts()]
    assert falls == pytest.approx([expected[0].score - score for score in rest], abs=1e-4)
    assert page.evaluate("document.documentElement.scrollWidth <= innerWidth")
    assert page.problems == []


def test_an_image_and_an_error(page):
    files = [{"name": "x.png", "mimeType": "image/png", "buffer": png(1)}]
    page.set_input_files("#image", files)
    page.fill("#text", "a1")
    page.get_by_role("button", name="Find labels").click()
    page.locator("#parts li", has_text="images").wait_for()
    page.set_input_files("#image", [])
    page.fill("#text", " ")
    page.get_by_role("button", name="Find labels").click()
    page.locator("#error", has_text="neither text nor image").wait_for()


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_text_can_be_read_in_light_and_dark(page, scheme):
    page.emulate_media(color_scheme=scheme)
    colors = page.evaluate("""() => {
      const style = getComputedStyle(document.body);
      return [style.color, style.backgroundColor].map((c) => c.match(/\\d+/g).map(Number));
    }""")
    ink, ground = (sum(color[:3]) / 765 for color in colors)
    assert abs(ink - ground) > 0.7
    assert (ground < 0.5) == (scheme == "dark")
