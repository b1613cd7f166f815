"""The page of tools/explain.py, in headless Chromium where one is installed: totals, the three shadings, what the pointer shows."""

from __future__ import annotations

import html
import json
import math
import re
import shutil
import subprocess
from pathlib import Path

import pytest

from tools.explain import TokenNote, page_html

BROWSER = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
OPTIONS = """--headless --no-sandbox --disable-gpu --disable-quic --no-first-run --disable-background-networking
             --disable-component-update --disable-sync --disable-dev-shm-usage --window-size=900,700""".split()

# text, bits, network bits, n-gram bits, network's weight, longest match, seen, likely, piece
DOCUMENTS = [
    [
        TokenNote("The", 12.5, 12.5, math.inf, 1.0, -1, 0, [("A", 0.5), ("The", 0.00017)], "The"),
        TokenNote(" <b>\n", 0.25, 6.25, 0.125, 0.125, 3, 2, [(" <b>", 0.84), (" x", 0.00001)], " <b>"),
        TokenNote("", 4.0, 4.0, math.inf, 0.75, 1, 1, [("é", 0.25)], "<0xC3>"),
        TokenNote("é", 2.0, 1.0, 9.0, 0.5, 1, 1, [("é", 0.25)], "<0xA9>"),
    ],
    [TokenNote("end", 1.0, 1.0, math.inf, 1.0, 0, 5, [("end", 0.5)], "end")],
]

# What a reader does: look at the totals, choose each shading, point at tokens and away from them.
READER = """<script>
  const seen = {totals: [...document.querySelectorAll("tr")].map((row) => [...row.children].map((cell) => cell.textContent)),
                text: [...document.querySelectorAll(".document")].map((part) => part.textContent), shades: {}, scales: {}, tips: []};
  const spans = [...document.querySelectorAll(".document span")];
  for (const name of [...document.querySelector("select").options].map((option) => option.value)) {
    document.querySelector("select").value = name;
    document.querySelector("select").dispatchEvent(new Event("change"));
    seen.shades[name] = spans.map((span) => getComputedStyle(span).backgroundColor);
    seen.scales[name] = document.getElementById("scale").textContent;
  }
  const tip = document.getElementById("tip");
  for (const span of spans) {
    const box = span.getBoundingClientRect();
    const middle = {bubbles: true, clientX: box.x + box.width / 2, clientY: box.y + 2};
    document.elementFromPoint(middle.clientX, middle.clientY).dispatchEvent(new MouseEvent("mousemove", middle));
    const place = tip.getBoundingClientRect();
    seen.tips.push({rows: [...tip.children].map((row) => row.innerText), bold: tip.querySelector(".actual")?.textContent ?? null,
                    inside: place.left >= 0 && place.right <= innerWidth && place.top >= 0 && place.bottom <= innerHeight});
  }
  document.querySelector("h1").dispatchEvent(new MouseEvent("mousemove", {bubbles: true}));
  seen.away = getComputedStyle(tip).display;
  document.body.appendChild(document.createElement("pre")).textContent = "SEEN" + JSON.stringify(seen) + "NEES";
</script>"""


@pytest.fixture(scope="module")
def seen(tmp_path_factory) -> dict:
    """What the browser shows of the page to such a reader."""
    if BROWSER is None:
        pytest.skip("no Chromium is installed")
    folder: Path = tmp_path_factory.mktemp("page")
    page = page_html("a <title>", "subtitle", DOCUMENTS)
    (folder / "page.html").write_text(page.replace("</html>", f"{READER}</html>"), encoding="utf-8")
    command = [
        BROWSER,
        *OPTIONS,
        f"--user-data-dir={folder / 'profile'}",
        "--dump-dom",
        (folder / "page.html").as_uri(),
    ]
    shown = subprocess.run(command, capture_output=True, text=True, timeout=180, encoding="utf-8")
    found = re.search("SEEN(.*)NEES", shown.stdout.split("<pre>")[-1], re.S)
    assert found, shown.stderr[-2000:]
    return json.loads(html.unescape(found[1]))


def test_the_totals_add_up(seen):
    assert seen["totals"] == [
        ["document", "tokens", "bytes", "bits", "bits a byte", "network alone"],
        ["document 1", "4", "10", "19", "1.875", "2.375"],
        ["document 2", "1", "3", "1", "0.333", "0.333"],
        ["all", "5", "13", "20", "1.519", "1.904"],
    ]
    assert seen["text"] == ["The <b>\né", "end"]


def colours(shade: str) -> tuple[float, ...]:
    """(red, green, blue, opacity) of a computed colour."""
    values = [float(x) for x in re.findall(r"[\d.]+", shade)]
    return (*values, 1.0) if len(values) == 3 else tuple(values)


def test_each_shading_shows_what_it_says(seen):
    the, bold, accent, end = (
        [colours(seen["shades"][name][i]) for name in ("bits", "network", "saved")] for i in range(4)
    )
    assert the[0] == the[1] and the[0][0] > 200 > 60 > the[0][1] and the[0][3] == 0.75, "12 bits and more are red"
    assert bold[0][3] == 0 and bold[1][3] > 0.4, "the network alone would have paid 6.25 bits, the mixture .25"
    assert bold[2][1] > 2 * bold[2][0] and bold[2][3] > 0.7, "green: 6 bits saved"
    assert accent[0] == colours(seen["shades"]["bits"][2]) and accent[0][3] > accent[1][3], (
        "4 bits of its first byte included"
    )
    assert accent[2][2] > accent[2][1] and accent[2][3] > 0, "purple: a bit lost"
    assert the[2][3] == end[2][3] == 0, "nothing saved, nothing lost"
    assert seen["scales"] == {"bits": "0124681012+", "network": "0124681012+", "saved": "-4-2-101248"}


def test_the_pointer_shows_what_is_known_of_a_token(seen):
    the, bold, accent, end = seen["tips"]
    line = "{}\n{}".format
    assert [re.sub(r"\s*\n\s*", "\n", row) for row in the["rows"] if row] == [
        "The", line("cost", "12.50 bits"), line("network alone", "12.50 bits"), line("n-gram alone", "no match"),
        line("weights", "network 100.0%, n-gram 0%"), line("longest match", "none"), line("A", "50.0%"), line("The", "0.02%"),
    ]  # fmt: skip
    text = "\n".join(bold["rows"])
    assert bold["rows"][0] == "·<b>⏎" and "n-gram alone\n0.13 bits" in text and "3 tokens, seen 2 times" in text
    assert bold["bold"].startswith("·<b>") and "<0.01%" in text
    assert "with the bytes before it\n6.00 bits" in "\n".join(accent["rows"]) and accent["bold"] is None
    assert "1 token, seen 1 time" in "\n".join(accent["rows"]) and "longest match\nnone" in "\n".join(end["rows"])
    assert all(tip["inside"] for tip in seen["tips"]) and seen["away"] == "none"
