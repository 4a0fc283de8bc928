"""What the site has beside the pages: navigation, a reference page for each module, and the code that pages link to.

The pages link to files as they lie in the repository. What is outside of ``docs`` becomes a page of the site, and
links to it are turned there.
"""

import posixpath
import re
from pathlib import Path
from typing import Any

import griffe
from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files
from mkdocs.structure.pages import Page

DOCS = Path(__file__).parent
ROOT = DOCS.parent
LIBRARY = ROOT / "lightning_custom"
PROJECT = {"Front page": ROOT / "README.md", "Contributing": ROOT / "CONTRIBUTING.md", "Changes": ROOT / "CHANGELOG.md"}
LINK = re.compile(r"(?<=\]\()(?P<target>[^)\s#]+)(?=[)#])")
ENTRY = re.compile(r"\[([^\]]+)\]\(([^)\s]+\.md)\)")


def uri(path: Path) -> str:
    """Where a file or folder of the repository is in the site, before it is made HTML."""
    if path.is_relative_to(DOCS):
        return path.relative_to(DOCS).as_posix()
    if path.is_relative_to(LIBRARY) and (path.is_dir() or path.suffix == ".py"):
        module = path / "index" if path.is_dir() else path.with_suffix("")
        return f"reference/{module.relative_to(LIBRARY).as_posix().replace('__init__', 'index')}.md"
    if path in PROJECT.values():
        return f"project/{path.stem.lower()}.md"
    return f"source/{path.relative_to(ROOT).as_posix()}.md"


def modules() -> list[Path]:
    """The files of the library."""
    return [path for path in LIBRARY.rglob("*.py") if path.stem != "__main__"]


def reference_navigation(package: Path) -> list[Any]:
    """A package's page, then its modules, then its packages."""
    names = sorted(path.stem for path in package.glob("*.py") if not path.stem.startswith("__"))
    parts = sorted(path.parent for path in package.glob("*/__init__.py"))
    pages = [uri(package / "__init__.py"), *({name: uri(package / f"{name}.py")} for name in names)]
    return [*pages, *({part.name: reference_navigation(part)} for part in parts)]


def linked(path: Path, markdown: str) -> dict[str, Path]:
    """The files that the page at ``path`` links to, by the links."""
    targets = {match["target"]: (path.parent / match["target"]).resolve() for match in LINK.finditer(markdown)}
    return {link: target for link, target in targets.items() if target.is_relative_to(ROOT) and target.exists()}


def reference(path: Path) -> str:
    """The page of a module."""
    name = ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__")
    return f"::: {name}\n"


def listing(path: Path) -> str:
    """The page of a file that is no module of the library."""
    language = "python" if path.suffix == ".py" else "text"
    head = f"---\nsearch:\n  exclude: true\n---\n\n# {path.relative_to(ROOT).as_posix()}\n\n"
    return f'{head}~~~~~~{language} linenums="1"\n{path.read_text()}\n~~~~~~\n'


def on_config(config: MkDocsConfig) -> MkDocsConfig:
    """The navigation is the index page's: its sections and links, in their order."""
    nav: list[dict[str, Any]] = [{"Documentation": "README.md"}]
    for part in re.split(r"^\*\*", (DOCS / "README.md").read_text(), flags=re.MULTILINE)[1:]:
        title = part.partition("**")[0]
        nav.append({title: [{name[0].upper() + name[1:]: page} for name, page in ENTRY.findall(part)]})
    nav.append({"Reference": reference_navigation(LIBRARY)})
    nav.append({"Project": [{title: uri(path)} for title, path in PROJECT.items()]})
    config.nav = nav
    return config


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Add the pages that are made."""
    made = {path: reference(path) for path in modules()} | {path: path.read_text() for path in PROJECT.values()}
    pages = [*DOCS.rglob("*.md"), *PROJECT.values()]
    for path in {target for page in pages for target in linked(page, page.read_text()).values()}:
        if path.is_file() and uri(path).startswith("source/"):
            made[path] = listing(path)
    for path, content in made.items():
        files.append(File.generated(config, uri(path), content=content))
    return files


def on_page_markdown(markdown: str, page: Page, **_: Any) -> str:
    """Turn the links of a page that lies in the repository to where their files are in the site."""
    source = next((path for path in PROJECT.values() if uri(path) == page.file.src_uri), DOCS / page.file.src_uri)
    if not source.exists():
        return markdown
    targets = linked(source, markdown)
    here = posixpath.dirname(page.file.src_uri)

    def turned(match: re.Match[str]) -> str:
        target = targets.get(match["target"])
        return match["target"] if target is None else posixpath.relpath(uri(target), here or ".")

    return LINK.sub(turned, markdown)


class Docstrings(griffe.Extension):
    """Docstrings are Markdown but for the roles of their references and the doctests, which are made so here."""

    ROLE = re.compile(r":(?:attr|class|data|func|meth|mod):`(?P<short>~?)(?P<name>[\w.]+)`")
    DOCTEST = re.compile(r"^(?P<code>>>> .*?)(?=\n\s*\n|\Z)", re.MULTILINE | re.DOTALL)

    def on_package(self, *, pkg: griffe.Module, **_: Any) -> None:
        """Visit every object of the package."""
        self._visit(pkg)

    def _visit(self, thing: griffe.Object) -> None:
        if thing.docstring is not None:
            text = self.ROLE.sub(self._as_code, thing.docstring.value)
            thing.docstring.value = self.DOCTEST.sub(r"```pycon\n\g<code>\n```", text)
        for member in thing.members.values():
            if isinstance(member, griffe.Object):
                self._visit(member)

    @staticmethod
    def _as_code(match: re.Match[str]) -> str:
        name = match["name"]
        shown = name.rpartition(".")[2] if match["short"] else name
        return f"[`{shown}`][{name}]" if name.startswith("lightning_custom.") else f"`{shown}`"
