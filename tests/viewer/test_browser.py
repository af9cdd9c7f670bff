"""The page in a real browser: every view, by keyboard, on a phone; nothing on its console."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest

from priorzero.decisions.reader import read_episodes
from priorzero.view import write_page
from tests.viewer.browser import Browser, find_browser
from tests.viewer.made_run import COMMANDS, chosen_at, make_run

READY = "document.body?.dataset.ready === 'true'"
PANE = "document.querySelectorAll('#view-episodes .pane')"
MOVE = "document.querySelector('#view-episodes .move')"


@pytest.fixture(scope="module")
def browser(tmp_path_factory):
    binary = find_browser()
    if binary is None:
        pytest.skip("no Chromium here (Debian: apt install chromium): the page is not tested")
    browser = Browser(binary, tmp_path_factory.mktemp("profile"))
    yield browser
    browser.close()


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """Runs, and pages: one.html of one, two.html of both, games.html of a run of two games."""
    folder = tmp_path_factory.mktemp("runs")
    runs = [
        make_run(folder / "with_llm", episodes=200, length=30),
        make_run(folder / "without", episodes=4, llm=False),
    ]
    write_page(runs[:1], folder / "one.html", 200)
    write_page(runs, folder / "two.html", 200)
    several = make_run(folder / "several", episodes=6, length=4, games=("a.z5", "b.z5"))
    write_page([several], folder / "games.html", 200)
    return folder


@pytest.fixture
def show(browser, folder):
    """Opens a page; fails at the end where the console told an error."""

    def open_page(page: str, place: str = "", width: int = 1280) -> None:
        browser.size(width, 900, mobile=width < 700)
        browser.open("about:blank")
        browser.errors.clear()
        browser.open((folder / page).as_uri() + place)
        browser.until(READY)

    yield open_page
    assert browser.errors == []


def open_tab(browser, name: str) -> None:
    browser.js(f"document.getElementById('tab-{name}').click()")
    browser.until(f"document.getElementById('view-{name}').childElementCount")


def cells(browser, selector: str) -> list[list[str]]:
    """Texts of a table's rows."""
    rows = f"[...document.querySelectorAll({json.dumps(selector)})]"
    return json.loads(
        browser.js(f"JSON.stringify({rows}.map(r => [...r.cells].map(c => c.textContent)))")
    )


def test_200_episodes_load_at_once(browser, show):
    show("one.html")
    # The bound that is promised is 2 s; this machine may be busy.
    assert browser.js("performance.now()") < 6000
    assert browser.js("data.runs[0].episodes.length") == 200
    browser.until("document.querySelector('#view-curves .plot[data-drawn]')")
    assert browser.js("document.querySelector('#view-curves .plot svg') !== null")
    assert len(cells(browser, "#view-curves tbody tr")) == 1


def test_a_decision_is_shown_as_it_was_recorded(browser, show, folder):
    show("one.html", "#tab=episodes&0=7.2")
    browser.until(MOVE)
    episode = read_episodes(folder / "with_llm")[7]
    recorded = episode.steps[2]
    assert browser.js(f"{MOVE}.querySelector('pre').textContent") == recorded["text"]

    rows = cells(browser, "#view-episodes .bars tbody tr")
    assert sorted(row[0] for row in rows) == sorted(COMMANDS)
    visits = dict(zip(COMMANDS, recorded["visits"], strict=True))
    for command, *shares in rows:
        at = COMMANDS.index(command)
        told = [float(share.rstrip(" ★")) / 100 for share in shares]
        expected = [recorded[name][at] for name in ("llm", "world_model", "mixture")]
        expected += [visits[command] / 4, recorded["improved"][at]]
        assert told == pytest.approx(expected, abs=0.0051)
    chosen = browser.js(f"{MOVE}.querySelector('.chosen td').textContent")
    assert chosen == COMMANDS[chosen_at(2)]

    # The tree follows the moves that were really played, with imagined against real rewards.
    browser.js(f"{MOVE}.querySelector('details.tree').open = true")
    browser.until(f"{MOVE}.querySelector('[role=tree]')")
    rows = cells(browser, "#view-episodes details.tree tbody tr")
    assert [row[:3] for row in rows] == [
        [f"2: {COMMANDS[chosen_at(2)]}", "0.13", "0"],
        [f"3: {COMMANDS[chosen_at(3)]}", "0.38", "2"],
        [f"4: {COMMANDS[chosen_at(4)]}", "0.63", "0"],
    ]
    items = f"{MOVE}.querySelectorAll('[role=treeitem]')"
    assert browser.js(f"{items}.length") == 3  # the root and what was tried there
    browser.js(f"{items}[1].focus()")
    browser.key("ArrowRight")
    assert browser.js(f"{items}.length") == 4
    assert "really 0" in browser.js(f"{items}[1].textContent")
    browser.key("ArrowLeft")
    assert browser.js(f"{items}.length") == 3
    assert "What the LLM reads at 2" in browser.js(
        f"{MOVE}.querySelector('.prompt pre').textContent"
    )


def test_targets_have_columns_where_a_record_has_them(browser, show):
    show("one.html")
    step = "{commands: ['a', 'b'], chosen: 0, improved: [0.5, 0.5], target_llm: [0.25, 0.75]}"
    rows = browser.js(f"[...bars({step}).rows].map(r => [...r.cells].map(c => c.textContent))")
    assert rows == [
        ["command (%)", "Improved", "LLM's target"],
        ["a", "50 ★", "25"],
        ["b", "50", "75 ★"],
    ]


def test_episodes_are_filtered_by_game(browser, show):
    games = "document.querySelector('#view-episodes select[aria-label^=Game]')"
    listed = "document.querySelectorAll('#view-episodes select[aria-label^=Episode] option')"
    show("one.html", "#tab=episodes")
    browser.until(MOVE)
    assert browser.js(f"{games}.offsetWidth") == 0  # one game: nothing to choose

    show("games.html", "#tab=episodes&0=0.0")
    browser.until(MOVE)
    names = browser.js(f"[...{games}.options].map(o => o.textContent).join()")
    assert sorted(names.split(",")) == ["a.z5", "all games", "b.z5"]
    assert browser.js(f"{listed}.length") == 6
    for game, kind in (("b.z5", "world_model_llm"), ("a.z5", "collect")):
        browser.js(f"{games}.value = '{game}', {games}.dispatchEvent(new Event('change'))")
        browser.until(f"{listed}.length === 3")
        told = browser.js(f"[...{listed}].map(o => o.textContent).join()")
        assert told.count(kind) == 3


def test_keys_lead_everywhere(browser, show):
    show("one.html", "#tab=curves&0=0.0")
    browser.js("document.getElementById('tab-curves').focus()")
    for name in ("episodes", "findings", "settings"):
        browser.key("ArrowRight")
        assert browser.js("document.activeElement.id") == f"tab-{name}"
        assert browser.js(f"!document.getElementById('view-{name}').hidden")
    browser.key("ArrowLeft")
    browser.key("ArrowLeft")
    browser.until(MOVE)

    at = "new URLSearchParams(location.hash.slice(1)).get('0')"
    for key, place in (("j", "0.1"), ("j", "0.2"), ("k", "0.1"), ("n", "1.0"), ("p", "0.0")):
        browser.key(key)
        browser.until(f"{at} === '{place}'")
    browser.key("t")
    browser.until(f"{MOVE}.querySelector('details.tree').open")
    browser.key("j")
    browser.until(f"{at} === '0.1' && {MOVE}.querySelector('details.tree').open")
    assert "step 1." in browser.js(f"{MOVE}.querySelector('pre').textContent")


def test_the_page_begins_where_most_is_to_be_seen(browser, show):
    """The last evaluation of the search with the LLM; a kind of finding that there is."""
    show("two.html", "#tab=episodes")
    at = "new URLSearchParams(location.hash.slice(1))"
    browser.until(f"{at}.get('0') && {at}.get('1')")
    for run in (0, 1):
        modes = browser.js(f"data.runs[{run}].episodes.map(e => e.mode)")
        assert len(set(modes)) > 1
        last = max(i for i, mode in enumerate(modes) if mode == "world_model_llm")
        assert browser.js(f"{at}.get('{run}')") == f"{last}.0"

    browser.js("data.runs.forEach(run => run.findings.overruled = [])")
    open_tab(browser, "findings")
    kind = "document.querySelector('#view-findings select')"
    assert browser.js(f"{kind}.value") != "overruled"
    assert browser.js(f"{kind}.options[0].textContent").endswith("was right (0)")


def test_a_finding_leads_to_its_decision(browser, show):
    show("one.html", "#tab=findings")
    browser.until("document.querySelector('#view-findings .list button')")
    episode, step, size = browser.js("data.runs[0].findings.overruled[0]")
    first = "document.querySelector('#view-findings .list button')"
    browser.until(f"{first}.textContent.includes('favourite')")
    assert f"+{size:.2f}" in browser.js(f"{first}.textContent")
    browser.js(f"{first}.click()")
    browser.until(f"{MOVE} && location.hash.includes('0={episode}.{step}')")
    assert f"step {step}." in browser.js(f"{MOVE}.querySelector('pre').textContent")
    for kind in ("surprise", "prior_wrong"):
        open_tab(browser, "findings")
        choose = (
            f"{{ const s = document.querySelector('#view-findings select'); s.value = '{kind}';"
        )
        browser.js(choose + " s.dispatchEvent(new Event('change')); }")
        count = browser.js(f"data.runs[0].findings.{kind}.length")
        assert browser.js(
            "document.querySelector('#view-findings .pane p').textContent"
        ).startswith(f"{count} decisions")


def test_two_runs_stand_beside_each_other(browser, show):
    show("two.html", "#tab=episodes")
    browser.until(f"{PANE}.length === 2 && document.querySelectorAll('.move pre').length >= 2")
    left, right = browser.js(f"[...{PANE}].map(p => Math.round(p.getBoundingClientRect().left))")
    assert right > left + 400
    # What had no LLM shows none.
    heads = "[...document.querySelectorAll('#view-episodes .pane')[1].querySelectorAll('.bars th')]"
    assert "LLM" not in browser.js(f"{heads}.map(t => t.textContent).join()")
    open_tab(browser, "settings")
    differing = [row[0] for row in cells(browser, "#view-settings tr.differs")]
    assert "llm.enable" in differing and "policy.num_simulations" not in differing
    search = "{ const f = document.querySelector('#view-settings input'); f.value = 'burn_in';"
    browser.js(search + " f.dispatchEvent(new Event('input')); }")
    shown = "[...document.querySelectorAll('#view-settings tbody tr')].filter(r => !r.hidden)"
    assert browser.js(f"{shown}.map(r => r.dataset.name)") == ["policy.burn_in"]


def test_a_run_without_decisions_shows_the_rest(browser, show, folder, tmp_path):
    kept = make_run(tmp_path / "kept", episodes=2)
    shutil.rmtree(kept / "decisions")
    write_page([kept, folder / "without"], folder / "kept.html")
    show("kept.html", "#tab=episodes")
    browser.until(f"{PANE}.length === 2 && {MOVE}")
    assert "no recorded decisions" in browser.js(f"{PANE}[0].textContent")
    browser.key("j")  # goes to the pane used last, which is the first: nothing to do there
    open_tab(browser, "findings")
    assert browser.js("document.querySelector('#view-findings .pane p').textContent")[0] == "0"
    open_tab(browser, "curves")
    browser.until("document.querySelector('#view-curves .plot[data-drawn]')")


def test_it_fits_a_phone(browser, show):
    show("two.html", "#tab=curves", width=390)
    for name in ("curves", "episodes", "findings", "settings"):
        open_tab(browser, name)
        if name == "episodes":
            browser.until("document.querySelectorAll('.move pre').length >= 2")
        assert browser.js("document.documentElement.scrollWidth") <= 390, name
