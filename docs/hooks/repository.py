"""Links of the pages to files of the repository: checked, and the files taken into the site.

The pages link to `../eval/results/…` and the like, so that links work when the pages are read as files. For the site,
each linked file, and each file linked from it, is copied below `repository/`, and the links are rewritten. A broken
link is not changed, and `mkdocs build --strict` refuses it.
"""

import posixpath
import re
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
_LINK = re.compile(r"(?P<picture>!?)\[(?P<text>(?:`[^`]*`|[^\]`])*)\]\((?P<link>[^)\s]+)\)")
_CODE = re.compile(r"^(```|~~~).*?^\1", re.M | re.S)
_ELSEWHERE = re.compile(r"[a-z+]+:|//")


def links(markdown: str) -> list[str]:
    """The relative links of a page, outside of code, without anchors."""
    found = (match["link"].partition("#")[0] for match in _LINK.finditer(_CODE.sub("", markdown)))
    return [link for link in found if link and not _ELSEWHERE.match(link)]


def target(page: str, link: str) -> str | None:
    """The target file of a link in a page, both relative to the repository's root; for a directory, its README.

    None if there is no such file.
    """
    path = posixpath.normpath(posixpath.join(posixpath.dirname(page), link))
    if (ROOT / path).is_dir():
        path += "/README.md"
    return path if not path.startswith("..") and (ROOT / path).is_file() else None


def reached(pages: Iterable[str]) -> list[str]:
    """The files outside docs/ that the pages link to, directly or through other pages."""
    waiting, found = list(pages), set()
    while waiting:
        page = waiting.pop()
        text = (ROOT / page).read_text(encoding="utf-8")
        new = {path for link in links(text) if (path := target(page, link)) and not path.startswith("docs/")} - found
        found |= new
        waiting += [path for path in new if path.endswith(".md")]
    return sorted(found)


def in_site(path: str) -> str:
    """The path of a repository file in the site's sources."""
    return path.removeprefix("docs/") if path.startswith("docs/") else f"repository/{path}"


def rewritten(markdown: str, page: str) -> str:
    """A page with its links rewritten for the site; a link to a directory without a README becomes plain text."""
    here = posixpath.dirname(in_site(page))

    def new(match: re.Match[str]) -> str:
        link, _, anchor = match["link"].partition("#")
        if not link or _ELSEWHERE.match(link):
            return match[0]
        path = target(page, link)
        if path is None:
            is_directory = (ROOT / posixpath.dirname(page) / link).is_dir()
            return match["text"] if is_directory else match[0]
        place = posixpath.relpath(in_site(path), here or ".")
        return f"{match['picture']}[{match['text']}]({place}{'#' + anchor if anchor else ''})"

    return _outside_code(markdown, lambda part: _LINK.sub(new, part))


def _outside_code(markdown: str, change: Callable[[str], str]) -> str:
    parts, end = [], 0
    for code in _CODE.finditer(markdown):
        parts += [change(markdown[end : code.start()]), code[0]]
        end = code.end()
    return "".join([*parts, change(markdown[end:])])


def on_files(files: Any, config: Any) -> Any:
    """mkdocs: adds the repository files that the pages link to."""
    from mkdocs.structure.files import File

    pages = [f"docs/{file.src_uri}" for file in files.documentation_pages()]
    for path in reached(pages):
        files.append(File.generated(config, in_site(path), abs_src_path=str(ROOT / path)))
    return files


def on_page_markdown(markdown: str, page: Any, config: Any, files: Any) -> str:
    """mkdocs: rewrites the links of a page."""
    uri = page.file.src_uri
    return rewritten(markdown, uri.removeprefix("repository/") if uri.startswith("repository/") else f"docs/{uri}")
