"""A real browser for the pages that alignkit makes, and what axe-core finds in them."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

WIDE = {"width": 1440, "height": 900}
PHONE = {"width": 390, "height": 844}


def missing(what: str) -> None:
    """Skip, or fail where a browser is required."""
    if os.environ.get("ALIGNKIT_REQUIRE_BROWSER"):
        pytest.fail(f"ALIGNKIT_REQUIRE_BROWSER is set, but there is no {what}")
    pytest.skip(f"this is tested in a browser, and there is no {what}")


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    """Debian's Chromium, without requests of its own."""
    try:
        from playwright.sync_api import sync_playwright
    except ImportError:
        missing("Playwright")
    executable = shutil.which("chromium")
    if executable is None:
        missing("chromium")
    with sync_playwright() as playwright:
        arguments = ["--no-sandbox", "--disable-background-networking", "--disable-component-update"]
        opened = playwright.chromium.launch(executable_path=executable, args=arguments)
        yield opened
        opened.close()


def serious_findings(page: Any) -> list[tuple[str, str, str]]:
    """What axe-core finds at both widths, in light and dark: width and scheme, the rule, the element."""
    import axe_core_python

    (folder,) = axe_core_python.__path__
    page.evaluate((Path(folder) / "axe.min.js").read_text(encoding="utf-8"))
    findings = []
    for size in (WIDE, PHONE):
        page.set_viewport_size(size)
        for scheme, rules in (("light", {}), ("dark", {"runOnly": ["color-contrast"]})):  # only colors differ
            page.emulate_media(color_scheme=scheme, reduced_motion="reduce")
            report = page.evaluate("(rules) => axe.run(document, rules)", rules)
            assert "color-contrast" in [each["id"] for each in report["passes"]]
            serious = [each for each in report["violations"] if each["impact"] in ("serious", "critical")]
            where = f"{size['width']} {scheme}"
            findings += [(where, each["id"], node["html"]) for each in serious for node in each["nodes"]]
    return findings
