"""The site is built without a warning, and has every page, module and equation."""

import html
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
PAGES = sorted((ROOT / "docs").rglob("*.md"))
MODULES = sorted(path for path in (ROOT / "lightning_custom").rglob("*.py") if path.stem != "__main__")
LINK = re.compile(r'(?:href|src)="?([^"\s>#]+)')

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def site(tmp_path_factory):
    """The folder of the site."""
    for name in ("material", "mkdocstrings_handlers.python"):
        pytest.importorskip(name, reason="pip install -e '.[docs]'")
    folder = tmp_path_factory.mktemp("site")
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "--quiet", "--site-dir", str(folder)]
    result = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=280)
    assert result.returncode == 0, result.stdout + result.stderr
    return folder


def built(site, uri):
    """The HTML of a page by its path below ``docs``."""
    path = site / uri.removesuffix(".md").removesuffix("README").removesuffix("index") / "index.html"
    return path.read_text()


def article(text):
    return text[text.index("<article") : text.index("</article>")]


def test_links_lead_to_files_of_the_site(site):
    checked = 0
    for page in site.rglob("*.html"):
        if page.name == "404.html":  # its links are absolute
            continue
        for link in LINK.findall(article(page.read_text())):
            link = html.unescape(link)
            if not re.match(r"[a-z]+:", link):
                target = (page.parent / link).resolve()
                assert target.exists(), f"{page.relative_to(site)}: no {link}"
                checked += 1
    assert checked > 200


@pytest.mark.parametrize("path", MODULES, ids=lambda path: path.relative_to(ROOT).as_posix())
def test_every_module_has_a_page_with_its_public_names(path, site):
    module = path.relative_to(ROOT / "lightning_custom").with_suffix("").as_posix().replace("__init__", "index")
    text = built(site, f"reference/{module}.md")
    name = ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__")
    for public in re.findall(r"^(?:def|class) ([a-zA-Z]\w*)", path.read_text(), re.MULTILINE):
        assert f'id="{name}.{public}"' in text, public


def test_docstrings_are_free_of_roles_and_doctests_of_quotations(site):
    for page in (site / "reference").rglob("index.html"):
        text = article(page.read_text())
        text = re.sub(r"<pre>.*?</pre>", "", text, flags=re.DOTALL)
        assert not re.search(r":(?:class|func|meth|mod|data|attr):", text), page
        assert "<blockquote>" not in text, page


@pytest.mark.parametrize("path", PAGES, ids=lambda path: path.relative_to(ROOT / "docs").as_posix())
def test_every_equation_list_and_table_is_one(path, site):
    """Markdown of the site is stricter than that of repositories: a list needs an empty line before it."""
    source = re.sub(r"^```.*?^```$", "", path.read_text(), flags=re.MULTILINE | re.DOTALL)
    text = article(built(site, path.relative_to(ROOT / "docs").as_posix()))
    prose = re.sub(r'<pre>.*?</pre>|<code>.*?</code>|<(div|span) class="arithmatex.*?</\1>', "", text, flags=re.DOTALL)
    assert len(re.findall('<div class="arithmatex', text)) == len(re.findall(r"^\$\$.*\$\$$", source, re.MULTILINE))
    assert "$" not in re.sub(r"<[^>]+>", "", prose)
    items = len(re.findall(r"^(?:-|\d+\.) ", source, re.MULTILINE))
    assert len(re.findall("<li>", text)) >= items
    assert len(re.findall("<table", text)) == len(re.findall(r"^\|[-|: ]+\|$", source, re.MULTILINE))
    assert len(re.findall("<pre", text)) >= len(re.findall(r"^```\w", path.read_text(), re.MULTILINE))


def test_a_recipes_code_is_a_page_that_its_own_page_links_to(site):
    assert 'href="../../source/recipes/gan.py/"' in built(site, "recipes/gan.md")
    listing = re.sub(r"<[^>]+>", "", built(site, "source/recipes/gan.py.md"))
    assert "def train(" in html.unescape(listing)
