"""MkDocs hook: pages for the files of the repository that the documentation links to.

On a code host, a link such as ``[hookspecs.py](../alignkit/hookspecs.py)`` opens the file. The site has a page for each
file that is linked to, so that the same link works there: Markdown and notebooks as pages, other text as source, and a
folder as its ``README.md`` or a list of its Python files.
"""

from __future__ import annotations

import json
import posixpath
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from mkdocs.structure.files import File, Files, InclusionLevel

ROOT = Path(__file__).parents[2]
FOLDER = "repository"  # of these pages in the site
IMAGES = (".png", ".svg")
FENCE = "`" * 8

CODE = re.compile(r"^ *(?P<fence>`{3,})[^\n]*\n.*?^ *(?P=fence) *$|`[^`\n]+`", re.M | re.S)
LINK = re.compile(r"(?<=\]\()(?![a-z]+:|#)([^)#\s]+)(?=[)#])")


def on_files(files: Files, config: Any) -> Files:
    """Add the files that pages link to, those that these link to, and so on."""
    paths = [f"docs/{file.src_uri}" for file in files.documentation_pages() if file.abs_src_path]
    while paths:
        page = paths.pop()
        for path in _linked(page, _markdown(page)):
            uri = _uri(path)
            if files.get_file_from_path(uri) is None and (ROOT / path).exists():
                content = (ROOT / path).read_bytes() if uri.endswith(IMAGES) else _markdown(path)
                files.append(File.generated(config, uri, content=content, inclusion=InclusionLevel.NOT_IN_NAV))
                if path.endswith((".md", ".ipynb")) or (ROOT / path).is_dir():
                    paths.append(path)
    return files


def on_page_markdown(markdown: str, page: Any, **_: Any) -> str:
    """Point links to files of the repository at their pages."""
    own = page.file.src_uri
    path = own.removeprefix(f"{FOLDER}/") if own.startswith(f"{FOLDER}/") else f"docs/{own}"
    return _replace_links(
        markdown, lambda target: posixpath.relpath(_uri(_resolve(path, target)), posixpath.dirname(own) or ".")
    )


def _linked(page: str, markdown: str) -> Iterator[str]:
    """The paths that a page of the repository links to."""
    targets: list[str] = []
    _replace_links(markdown, lambda target: targets.append(target) or target)  # type: ignore[func-returns-value]
    page = f"{page}/README.md" if (ROOT / page).is_dir() else page
    yield from (_resolve(page, target) for target in targets)


def _resolve(page: str, target: str) -> str:
    return posixpath.normpath(posixpath.join(posixpath.dirname(page), target))


def _replace_links(markdown: str, replace: Callable[[str], str]) -> str:
    """Replace the targets of relative links, except in code."""
    result, end = [], 0
    for code in CODE.finditer(markdown):
        result += [LINK.sub(lambda link: replace(link[1]), markdown[end : code.start()]), code[0]]
        end = code.end()
    return "".join([*result, LINK.sub(lambda link: replace(link[1]), markdown[end:])])


def _uri(path: str) -> str:
    """The file of the site that shows a path of the repository."""
    if path.startswith("docs/"):
        return path.removeprefix("docs/")
    if (ROOT / path).is_dir():
        return f"{FOLDER}/{path}/README.md"
    return f"{FOLDER}/{path}" if path.endswith((".md", *IMAGES)) else f"{FOLDER}/{path}.md"


def _markdown(path: str) -> str:
    """The page that shows a file or a folder."""
    file = ROOT / path
    if file.is_dir():
        readme = file / "README.md"
        return readme.read_text(encoding="utf-8") if readme.exists() else _listing(path)
    text = file.read_text(encoding="utf-8")
    if file.suffix == ".md":
        return text
    if file.suffix == ".ipynb":
        return _notebook(json.loads(text))
    return f'---\nsearch: {{exclude: true}}\n---\n\n# {path}\n\n{FENCE}{file.suffix[1:]} linenums="1"\n{text}{FENCE}\n'


def _notebook(notebook: dict[str, Any]) -> str:
    """A notebook without its output."""
    cells = [(cell["cell_type"], "".join(cell["source"])) for cell in notebook["cells"]]
    return "\n\n".join(text if kind == "markdown" else f"{FENCE}python\n{text}\n{FENCE}" for kind, text in cells)


def _listing(path: str) -> str:
    """A page with links to the files of a folder and of the folders in it."""
    files = sorted((ROOT / path).rglob("*.py"))
    names = [file.relative_to(ROOT / path).as_posix() for file in files if file.stat().st_size]
    lines = "".join(f"- [{name}]({name})\n" for name in names)
    return f"---\nsearch: {{exclude: true}}\n---\n\n# {path}\n\n{lines}"
