"""Look at a finished report as a reader would: links, images, width on a telephone and on a desk, requests to the network.

python tests/browser.py report          # prints what is wrong and exits with 1, or says that all is well
"""

import html
import json
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path
from urllib.parse import unquote, urlsplit

from bs4 import BeautifulSoup

WIDTHS = (400, 1400)
FLAGS = (
    "--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--disable-background-networking",
    "--disable-component-update", "--disable-sync", "--disable-dev-shm-usage", "--hide-scrollbars",
    "--allow-file-access-from-files", "--host-resolver-rules=MAP * ~NOTFOUND",
)  # fmt: skip

# A window cannot be made as narrow as a telephone, a frame can. Each frame reports what it holds once all have loaded.
_FRAME = '<iframe style="width:{width}px;height:900px;border:0;display:block" data-width="{width}" src="{source}"></iframe>'
_MEASURE = """<script>
window.onload = () => {
  const seen = [...document.querySelectorAll('iframe')].map(frame => {
    const page = frame.contentDocument, root = page.documentElement, right = Math.max(root.scrollWidth, page.body.scrollWidth);
    const inside = element => element.closest('.scroll') !== null && !element.classList.contains('scroll');
    const wide = [...page.body.querySelectorAll('*')].filter(
      element => !inside(element) && element.getBoundingClientRect().right > frame.clientWidth + 1);
    return {
      page: frame.getAttribute('src'), width: Number(frame.dataset.width), right: right,
      widest: wide.slice(0, 3).map(element => element.tagName.toLowerCase() + '.' + element.className),
      images: [...page.images].filter(image => !image.naturalWidth).map(image => image.getAttribute('src').slice(0, 80)),
      silent: [...page.images].filter(image => !image.alt).map(image => image.getAttribute('src').slice(0, 80)),
      requests: [...frame.contentWindow.performance.getEntriesByType('resource').map(entry => entry.name),
        ...[...page.querySelectorAll('[src], link[href], object[data], [poster]')].map(
          element => element.src || element.href || element.data || element.poster)
      ].filter(address => /^(https?|wss?):/.test(address)),
    };
  });
  const result = document.createElement('pre');
  result.id = 'result';
  result.textContent = JSON.stringify(seen);
  document.body.replaceChildren(result);
};
</script>"""


def find_chromium() -> str | None:
    """The path of an installed Chromium or Chrome, or None."""
    return next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)


def check_report(folder: Path) -> list[str]:
    """Everything wrong with the pages below `folder`, one sentence each: links first, then what the browser saw."""
    folder = Path(folder).resolve()
    pages = sorted(folder.rglob("*.html"))
    if not pages:
        return [f"no pages in {folder}"]
    problems = broken_links(folder)
    for start in range(0, len(pages), 10):
        problems += _browse(folder, pages[start : start + 10])
    return problems


def broken_links(folder: Path) -> list[str]:
    """Local links and images of the pages below `folder` that lead to no file, or to no place on its page."""
    folder = Path(folder).resolve()
    parsed = {page: BeautifulSoup(page.read_text(encoding="utf-8"), "html.parser") for page in sorted(folder.rglob("*.html"))}
    anchors = {page: {node["id"] for node in soup.find_all(id=True)} for page, soup in parsed.items()}
    problems = []
    for page, soup in parsed.items():
        for node in soup.find_all(["a", "img", "link"]):
            address = node.get("href") or node.get("src") or ""
            parts = urlsplit(address)
            if parts.scheme or not address:
                continue
            target = (page.parent / unquote(parts.path)).resolve() if parts.path else page
            where = f"{page.relative_to(folder)}: {address}"
            if not target.is_file():
                problems.append(f"{where} leads to no file")
            elif not target.is_relative_to(folder):
                problems.append(f"{where} leads out of the report")
            elif parts.fragment and unquote(parts.fragment) not in anchors.get(target, ()):
                problems.append(f"{where} leads to no place on its page")
    return problems


def screenshot(page: Path, width: int, height: int, picture: Path) -> None:
    """Store what a window `width` pixels wide shows of `page` as the PNG `picture`."""
    frame = _FRAME.replace("900px", f"{height}px").format(width=width, source=Path(page).resolve().as_uri())
    with tempfile.TemporaryDirectory() as scratch:
        shell = Path(scratch) / "shell.html"
        shell.write_text(f"<body style='margin:0'>{frame}</body>")
        _chromium(scratch, f"--window-size={max(width, 500)},{height}", f"--screenshot={picture}", shell.as_uri())


def _browse(folder: Path, pages: list[Path]) -> list[str]:
    with tempfile.TemporaryDirectory() as scratch:
        shell = Path(scratch) / "shell.html"
        frames = [_FRAME.format(width=width, source=page.as_uri()) for page in pages for width in WIDTHS]
        shell.write_text(f"<!DOCTYPE html><body>{''.join(frames)}{_MEASURE}</body>")
        dom = _chromium(scratch, "--window-size=1500,1000", "--dump-dom", shell.as_uri())
    found = BeautifulSoup(dom, "html.parser").find(id="result")
    if found is None:
        return [f"the browser did not finish loading {', '.join(page.name for page in pages)}"]
    problems = []
    for seen in json.loads(html.unescape(found.text)):
        where = f"{Path(unquote(urlsplit(seen['page']).path)).relative_to(folder)} at {seen['width']} px"
        if seen["right"] > seen["width"]:
            problems.append(f"{where} is {seen['right']} px wide: {', '.join(seen['widest']) or 'no element found'}")
        problems += [f"{where}: image {source} is not shown" for source in seen["images"]]
        problems += [f"{where}: image {source} has no alternative text" for source in seen["silent"]]
        problems += [f"{where} asks the network for {address}" for address in sorted(set(seen["requests"]))]
    return problems


def _chromium(scratch: str, *arguments: str) -> str:
    command = [find_chromium(), *FLAGS, f"--user-data-dir={scratch}/profile", *arguments]
    return subprocess.run(command, capture_output=True, text=True, timeout=120, check=True).stdout


if __name__ == "__main__":
    if find_chromium() is None:
        sys.exit("no chromium, chromium-browser or google-chrome on the path: install one to look at the report")
    complaints = check_report(Path(sys.argv[1] if len(sys.argv) > 1 else "report"))
    print("\n".join(complaints) or "every link, image and width is in order, and nothing asks the network")
    sys.exit(bool(complaints))
