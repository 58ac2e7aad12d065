"""The chat page and the API's documentation, in a real browser on a real server."""

import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

from edgekd.export.checkpoint import open_checkpoint
from edgekd.runtime.server import ServeOptions
from tests.conftest import make_gguf, save_tiny_model
from tests.runtime.browser import chromium, opened
from tests.runtime.serving import CHAT, Serving, serving

if TYPE_CHECKING:
    from playwright.sync_api import Browser, Page, Route

ANY = re.compile(r"\S")
LONG = {"ignore_eos": True, "max_tokens": 3000}
HOSTILE = "<img src=x onerror=document.title=1><script>document.title=2</script>**x**"


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Serving]:
    """A model so deep, and with so much context, that it can be stopped midway."""
    folder = tmp_path_factory.mktemp("deep")
    save_tiny_model(folder / "deep", n_layers=40, max_position_embeddings=4096)
    path = make_gguf(open_checkpoint(folder / "deep"), "f32", folder)
    with serving(path, context_tokens=4096, n_slots=1) as found:
        yield found


@pytest.fixture(scope="module")
def browser() -> Iterator["Browser"]:
    with chromium() as found:
        yield found


@pytest.fixture
def page(server: Serving, browser: "Browser") -> Iterator["Page"]:
    with opened(browser, server.url) as found:
        found.wait_for_selector("#send:enabled")
        yield found


def add_to_requests(page: "Page", **fields: Any) -> list[Any]:
    """Let the browser's chat requests have ``fields`` too; return the bodies as the page made."""
    bodies: list[Any] = []

    def pass_on(route: "Route") -> None:
        bodies.append(route.request.post_data_json)
        route.continue_(post_data=json.dumps(bodies[-1] | fields))

    page.route("**" + CHAT, pass_on)
    return bodies


def wait_for(page: "Page", selector: str, pattern: re.Pattern[str] = ANY) -> str:
    """Return the text of the element, once it has what ``pattern`` looks for."""
    found = page.locator(selector).last
    found.filter(has_text=pattern).wait_for()
    return found.inner_text()


def test_an_answer_streams_in_and_is_counted(page: "Page") -> None:
    add_to_requests(page, **LONG, seed=4)
    page.fill("#prompt", "The quick brown")
    page.click("#send")
    early = wait_for(page, ".assistant .body")
    assert "tokens/s" in wait_for(page, "#speed")
    page.click("#stop")
    assert re.search(r"\d tokens · [\d.]+ tokens/s", wait_for(page, ".assistant .note"))
    assert len(page.inner_text(".assistant .body")) > len(early)
    assert page.inner_text("#model") == "tiny"
    wait_for(page, "#kv-text", re.compile(r"^[1-9][\d,]* of 4,096 tokens$"))
    wait_for(page, "#memory", re.compile(r"^\d+ MiB$"))


def test_escape_stops_the_engine_and_not_only_the_text(page: "Page", server: Serving) -> None:
    add_to_requests(page, **LONG)
    page.fill("#prompt", "The")
    page.press("#prompt", "Enter")
    wait_for(page, ".assistant .body")
    page.keyboard.press("Escape")
    assert "Stopped" in wait_for(page, ".assistant .note")
    stopped = page.inner_text(".assistant .body")
    assert server.engine.wait_idle(2)
    page.wait_for_timeout(200)
    assert page.inner_text(".assistant .body") == stopped
    assert 'outcome="cancelled"' in server.get("/metrics").text
    made = int(wait_for(page, ".assistant .note").split(" tokens")[0].replace(",", ""))
    assert 0 < made < LONG["max_tokens"]


def test_the_next_question_carries_the_conversation_and_the_settings(page: "Page") -> None:
    bodies = add_to_requests(page)
    page.click("#open-settings")
    for name, value in {
        "system": "Be brief.",
        "temperature": "0.5",
        "top_p": "0.9",
        "max_tokens": "5",
        "seed": "7",
    }.items():
        page.fill(f"[name={name}]", value)
    for question in ("One", "Two"):
        page.fill("#prompt", question)
        page.press("#prompt", "Enter")
        page.wait_for_selector("#send:enabled:visible")
    first, second = bodies
    system = {"role": "system", "content": "Be brief."}
    assert first["messages"] == [system, {"role": "user", "content": "One"}]
    roles = [message["role"] for message in second["messages"]]
    assert roles == ["system", "user", "assistant", "user"]
    drawn = {name: second[name] for name in ("temperature", "top_p", "max_tokens", "seed")}
    assert drawn == {"temperature": 0.5, "top_p": 0.9, "max_tokens": 5, "seed": 7}
    page.reload()
    assert page.input_value("[name=temperature]") == "0.5"


def test_a_setting_out_of_range_is_shown_and_not_sent(page: "Page") -> None:
    bodies = add_to_requests(page)
    page.fill("#prompt", "Hello")
    page.click("#open-settings")
    page.fill("[name=temperature]", "9")
    page.press("#prompt", "Enter")
    assert page.locator("[name=temperature]:focus:invalid").count() == 1
    assert bodies == [] and page.input_value("#prompt") == "Hello"


@pytest.mark.parametrize("fence", ["", "```html\\n"])
def test_html_in_an_answer_is_shown_and_never_run(page: "Page", fence: str) -> None:
    add_to_requests(page, grammar=f'root ::= "{fence}{HOSTILE}"')
    page.fill("#prompt", "Hack me")
    page.press("#prompt", "Enter")
    wait_for(page, ".assistant .note")
    said = page.inner_text(".assistant .body")
    assert (HOSTILE if fence else HOSTILE.replace("**", "")) in said
    assert page.locator(".assistant .body :is(img, script)").count() == 0
    assert page.locator(".assistant .body pre").count() == bool(fence)
    assert page.title() == "tiny · edgekd"


def test_the_policy_stops_a_script_that_got_into_the_page(
    server: Serving, browser: "Browser"
) -> None:
    inject = """() => {
        const script = document.createElement("script");
        script.textContent = "document.title = 'hacked'";
        document.body.append(script);
        const image = document.createElement("img");
        image.setAttribute("onerror", "document.title = 'hacked'");
        image.src = "nothing";
        document.body.append(image);
    }"""
    context = browser.new_context()
    page = context.new_page()
    page.goto(server.url)
    refusals: list[str] = []
    page.on("console", lambda said: refusals.append(said.text))
    page.evaluate(inject)
    page.wait_for_timeout(300)
    assert page.title() != "hacked"
    assert any("script-src" in each for each in refusals)
    context.close()


def test_everything_can_be_done_with_the_keyboard(page: "Page") -> None:
    add_to_requests(page, max_tokens=4)
    page.wait_for_selector("#prompt:focus")
    page.keyboard.type("One")
    page.keyboard.press("Shift+Enter")
    page.keyboard.type("Two")
    page.keyboard.press("Enter")
    wait_for(page, ".assistant .note")
    assert page.inner_text(".user .body") == "One\nTwo"
    order = []
    page.evaluate("() => { document.activeElement.blur(); scrollTo(0, 0); }")
    page.locator(".skip").focus()
    for _ in range(7):
        page.keyboard.press("Tab")
        order.append(page.evaluate("() => document.activeElement.id"))
        outline = page.evaluate(
            "() => { const found = getComputedStyle(document.activeElement);"
            " return found.outlineStyle + getComputedStyle("
            "document.getElementById('composer')).boxShadow; }"
        )
        assert "solid" in outline or order[-1] == "prompt"
    assert order[:3] == ["new", "open-settings", "theme"]
    assert order[4:7] == ["log", "prompt", "send"]
    page.locator("#open-settings").focus()
    page.keyboard.press("Enter")
    assert page.locator("#system:focus").count() == 1
    page.keyboard.press("Escape")
    assert page.locator("#open-settings:focus").count() == 1
    page.locator("#new").focus()
    page.keyboard.press("Space")
    assert page.locator(".turn").count() == 0 and page.locator("#welcome:visible").count() == 1


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_axe_finds_no_barrier(server: Serving, browser: "Browser", scheme: str) -> None:
    axe = pytest.importorskip("axe_playwright_python.sync_playwright", reason="needs axe")
    with opened(browser, server.url, color_scheme=scheme) as page:
        add_to_requests(page, grammar='root ::= "# A\\n* b\\n\\n```c\\nd\\n```\\n`e` **f**"')
        page.fill("#prompt", "Hello")
        page.press("#prompt", "Enter")
        wait_for(page, ".assistant .note")
        assert page.locator(".assistant .body > *").count() == 4
        page.click("#open-settings")
        found = axe.Axe().run(page)
        assert found.violations_count == 0, found.generate_report()


def test_the_theme_follows_the_system_until_chosen(server: Serving, browser: "Browser") -> None:
    with opened(browser, server.url, color_scheme="dark") as page:
        ground = "() => getComputedStyle(document.body).backgroundColor"
        dark = page.evaluate(ground)
        page.click("#theme")
        light = page.evaluate(ground)
        assert light != dark and page.get_attribute("#theme", "aria-pressed") == "false"
        page.reload()
        assert page.evaluate(ground) == light


def test_what_the_server_refuses_is_said_and_the_question_kept(page: "Page") -> None:
    page.fill("#prompt", "fox " * 4500)
    page.press("#prompt", "Enter")
    assert "context" in wait_for(page, "#alert")
    assert page.input_value("#prompt").startswith("fox fox")
    assert page.locator(".turn").count() == 0


def test_the_key_is_asked_for_and_kept_for_the_tab_only(
    float_gguf: Path, browser: "Browser"
) -> None:
    options = ServeOptions(alias="tiny", api_key="sécret")
    with serving(float_gguf, options) as server, opened(browser, server.url) as page:
        add_to_requests(page, max_tokens=4)
        for key in ("wrong", "sécret"):
            page.wait_for_selector("#key:focus")
            page.fill("#key", key)
            page.press("#key", "Enter")
        page.wait_for_selector("#send:enabled")
        page.fill("#prompt", "Hello")
        page.press("#prompt", "Enter")
        wait_for(page, ".assistant .note")
        stored = page.evaluate("() => JSON.stringify([localStorage, document.cookie])")
        assert "cret" not in stored
        page.goto(server.url + "/docs")
        page.wait_for_selector(".opblock")


def test_the_documentation_needs_no_other_host(server: Serving, browser: "Browser") -> None:
    with opened(browser, server.url, "/docs") as page:
        page.wait_for_selector(".opblock")
        page.click("#operations-status-health_health_get button")
        page.click(".try-out__btn")
        page.click(".execute")
        assert '"ok"' in wait_for(page, ".live-responses-table .response-col_description")
