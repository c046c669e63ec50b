"""What mkdocs does with this repository: pages that lie outside of docs/, links to files, and a page of all errors."""

from __future__ import annotations

import ast
import posixpath
import re
from pathlib import Path
from typing import Any

import griffe
from mkdocs.structure.files import File, Files

ROOT = Path(__file__).resolve().parents[1]
OUTSIDE = {  # page of the site: file of the repository
    "start.md": "README.md",
    "changelog.md": "CHANGELOG.md",
    "contributing.md": "CONTRIBUTING.md",
    "report.md": "examples/paper/results/report.md",
    "benchmarks.md": "tests/benchmarks/RESULTS.md",
}
LINK = re.compile(r"(\]\()([^)#\s]+)(#[^)\s]*)?(\))")
ROLE = re.compile(r":(?:func|class|meth|attr|mod|data):`~?([^`]+)`")
ERRORS = ("TypeError", "ValueError", "RuntimeError", "NotImplementedError", "ImportError")


def on_files(files: Files, config: Any) -> Files:
    """Add the pages of ``OUTSIDE``, every file that a page links to, and the page of errors."""
    for page, path in OUTSIDE.items():
        files.append(File.generated(config, page, abs_src_path=str(ROOT / path)))
    files.append(File.generated(config, "errors.md", content=errors_page()))
    for page in list(files.documentation_pages()):
        if page.src_uri.endswith(".md") and page.src_uri != "errors.md":
            for target in _linked(page):
                if _place(target) not in files.src_uris and (ROOT / target).is_file():
                    files.append(File.generated(config, _place(target), abs_src_path=str(ROOT / target)))
    return files


def on_page_markdown(markdown: str, page: Any, config: Any, files: Files) -> str:
    """Point links at where the site has the file. A link to a folder becomes its text."""
    source = page.file.abs_src_path
    if source is None:
        return markdown
    here, folder = posixpath.dirname(page.file.src_uri), posixpath.dirname(_in_repository(source))

    def moved(match: re.Match) -> str:
        opening, link, anchor, closing = match.groups()
        if "://" in link:
            return match[0]
        target = posixpath.normpath(posixpath.join(folder, link))
        if (ROOT / target).is_dir():
            return f"{opening}https://invalid.invalid{closing}"
        return f"{opening}{posixpath.relpath(_place(target), here or '.')}{anchor or ''}{closing}"

    markdown = LINK.sub(moved, markdown)
    return re.sub(r"\[([^\]]*)\]\(https://invalid\.invalid\)", r"\1", markdown)


def on_page_content(html: str, page: Any, config: Any, files: Files) -> str:
    """Point a notebook's links to pages at their addresses."""
    if not page.file.src_uri.endswith(".ipynb"):
        return html
    return re.sub(r'href="((?:\.\./)?)([\w-]+)\.(?:md|ipynb)(#[\w-]*)?"', r'href="../\1\2/\3"', html)


def _linked(page: File) -> set[str]:
    """The files of the repository that ``page`` links to."""
    folder = posixpath.dirname(_in_repository(str(page.abs_src_path)))
    links = [match[2] for match in LINK.finditer(page.content_string) if "://" not in match[2]]
    return {posixpath.normpath(posixpath.join(folder, link)) for link in links}


def _in_repository(path: str) -> str:
    return Path(path).resolve().relative_to(ROOT).as_posix()


def _place(path: str) -> str:
    """Where the site has the file ``path`` of the repository."""
    pages = {source: page for page, source in OUTSIDE.items()}
    if path in pages:
        return pages[path]
    return path.removeprefix("docs/") if path.startswith("docs/") else f"files/{path}"


class PlainRoles(griffe.Extension):
    """Docstrings are written with roles such as :func:`sinkhorn`. Markdown shows the name alone."""

    def on_object(self, *, obj: griffe.Object, **kwargs: Any) -> None:
        """Replace the roles in the docstring of ``obj``."""
        if obj.docstring is not None:
            obj.docstring.value = ROLE.sub(lambda match: f"`{match[1]}`", obj.docstring.value)


def errors_page() -> str:
    """Every error message of the package, by file: where a message has a value, the page has ``…``."""
    lines = [
        "# All error messages",
        "",
        "An error says what was expected, what came, and what to do. So this page is for a search engine, and for you "
        "if you want to know where an error comes from. `…` stands for a value. [Warnings](troubleshooting.md) have a "
        "page of their own.",
    ]
    for path in sorted(
        [*ROOT.glob("proto_reg/*.py"), *ROOT.glob("proto_reg/[fk]*/*.py"), *ROOT.glob("integrations/*.py")]
    ):
        found = errors_of(path)
        if found:
            lines += ["", f"## {path.relative_to(ROOT).as_posix()}", ""]
            lines += [f"- **{kind}** {message}" for kind, message in found]
    return "\n".join(lines) + "\n"


def errors_of(path: Path) -> list[tuple[str, str]]:
    """Pairs (class, message) of the errors that the file ``path`` raises with a message of its own."""
    found = []
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        call = node.exc if isinstance(node, ast.Raise) else None
        if isinstance(call, ast.Call) and isinstance(call.func, ast.Name) and call.func.id in ERRORS and call.args:
            message = template(call.args[0])
            if len(message.replace("…", "").split()) > 3:
                found.append((call.func.id, message))
    return found


def template(node: ast.expr) -> str:
    """The text of a string or f-string, with ``…`` for what is computed."""
    if isinstance(node, ast.Constant):
        return str(node.value)
    if isinstance(node, ast.JoinedStr):
        return "".join(map(template, node.values))
    if isinstance(node, ast.BinOp):
        return template(node.left) + template(node.right)
    return "…"
