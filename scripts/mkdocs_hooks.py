"""What mkdocs cannot do itself: a page for each command, links out of docs/, forgotten pages."""

import posixpath
import re
from pathlib import Path
from typing import Any

from mkdocs.structure.files import File

_LINK = re.compile(r"(?<!!)\[([^\]]+)\]\((\.\./[^)\s#]+)(#[^)\s]*)?\)")
_SECTION = re.compile(r"^## edgekd (\S+)((?: \S+)?)\n(.*?)(?=^## |\Z)", re.MULTILINE | re.DOTALL)
_GUIDES = {
    "demo": "tutorial.md",
    "prune": "distill.md",
    "cache": "distill.md",
    "answer": "distill.md",
    "distill": "distill.md",
    "export": "export.md",
    "package": "phones.md",
    "serve": "serve.md",
    "chat": "tutorial.md",
    "bench": "bench-method.md",
    "eval": "eval.md",
    "report": "report.md",
    "verify": "export.md",
    "devices": "devices.md",
    "doctor": "troubleshooting.md",
}
_COMMANDS, _MORE = "Commands", "More"


def on_config(config: Any) -> None:
    """Put the commands, and pages that the menu does not name, into it."""
    folder = Path(config.docs_dir)
    named = set(re.findall(r"[\w./-]+\.md", repr(config.nav)))
    pages = sorted(path.relative_to(folder).as_posix() for path in folder.rglob("*.md"))
    config.nav.append({_COMMANDS: [{verb: _page(verb)} for verb in _commands(folder)]})
    if others := [page for page in pages if page not in named]:
        config.nav.append({_MORE: others})


def on_files(files: Any, config: Any) -> None:
    """Add a page for each verb: its help, that of the commands below it, and its guide."""
    for verb, text in _commands(Path(config.docs_dir)).items():
        files.append(File.generated(config, _page(verb), content=text))


def on_page_markdown(markdown: str, page: Any, config: Any, files: Any) -> str:
    """Let links to code and results lead to the repository, which the site is no part of."""
    folder = posixpath.dirname(page.file.src_uri)

    def replace(match: re.Match[str]) -> str:
        text, target, anchor = match.groups()
        path = posixpath.normpath(posixpath.join("docs", folder, target))
        if path.startswith("docs/"):
            return match[0]
        if not config.repo_url:
            return text if text.startswith("`") else f"{text} (`{path}`)"
        return f"[{text}]({config.repo_url.rstrip('/')}/blob/main/{path}{anchor or ''})"

    return _LINK.sub(replace, markdown)


def _page(verb: str) -> str:
    return f"commands/{verb}.md"


def _commands(folder: Path) -> dict[str, str]:
    """Return the page of each verb, out of the reference that scripts/write_cli_docs.py writes."""
    pages: dict[str, str] = {}
    for verb, below, text in _SECTION.findall((folder / "cli.md").read_text("utf-8")):
        if not below:
            guide = _GUIDES.get(verb, "index.md")
            pages[verb] = f"# edgekd {verb}\n\nThe guide: [{guide}](../{guide}).\n"
        pages[verb] += (f"\n## edgekd {verb}{below}\n" if below else "") + text.rstrip() + "\n"
    return pages
