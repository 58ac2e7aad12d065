"""What mkdocs cannot do itself: links out of docs/, and pages that nobody put into the menu."""

import posixpath
import re
from pathlib import Path
from typing import Any

_LINK = re.compile(r"(?<!!)\[([^\]]+)\]\((\.\./[^)\s#]+)(#[^)\s]*)?\)")
_MORE = "More"


def on_config(config: Any) -> None:
    """Put pages that the menu does not name at its end."""
    folder = Path(config.docs_dir)
    named = set(re.findall(r"[\w./-]+\.md", repr(config.nav)))
    pages = sorted(path.relative_to(folder).as_posix() for path in folder.rglob("*.md"))
    if others := [page for page in pages if page not in named]:
        config.nav.append({_MORE: others})


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
