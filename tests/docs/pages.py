"""The pages of the documentation, taken apart: fenced blocks, links, spans of code."""

import re
import shlex
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).parents[2]
PAGES = sorted(
    [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *(ROOT / "docs").rglob("*.md")],
    key=lambda page: page.relative_to(ROOT).as_posix(),
)
_FENCE = re.compile(r"^(?P<indent> *)(?P<fence>`{3,}|~{3,})(?P<language>[\w-]*)\s*$")
_MARK = re.compile(r"^<!-- (?P<mark>run(: (server|qnn))?|not run: .+) -->$")
_LINK = re.compile(r"(?P<image>!?)\[[^\]]*\]\((?P<target>[^)\s]+)\)")
_SPAN = re.compile(r"(?<!`)`([^`\n]+)`(?!`)")
_COMMENT = re.compile(r"(?:^|(?<=\s))#.*$", re.MULTILINE)
_COMMAND_ENDS = {"|", "||", "&", "&&", ";", "(", ")"}


@dataclass(frozen=True)
class Block:
    """One fenced block."""

    page: Path
    line: int
    language: str
    mark: str
    """What the HTML comment before it says: "run", "run: server", "not run: why" ...; or ""."""
    text: str

    def __str__(self) -> str:
        """Return where it stands, as pytest shows it."""
        return f"{name_of(self.page)}:{self.line}"


def name_of(page: Path) -> str:
    return page.relative_to(ROOT).as_posix()


def split(page: Path) -> tuple[list[Block], str]:
    """Return the fenced blocks of ``page``, and its text without them.

    Raises:
        ValueError: a fence is not closed, or a mark has no block.
    """
    blocks: list[Block] = []
    prose: list[str] = []
    inside: tuple[int, re.Match[str]] | None = None
    lines: list[str] = []
    mark = ""
    for number, line in enumerate(page.read_text("utf-8").splitlines(), 1):
        if inside is None and (opening := _FENCE.match(line)):
            inside, lines = (number, opening), []
        elif inside is None:
            if found := _MARK.match(line):
                mark = found["mark"]
            elif line.strip():
                if mark:
                    raise ValueError(f"{name_of(page)}:{number}: a mark without a block behind it")
                prose.append(line)
        elif line.strip() == inside[1]["fence"]:
            start, opening = inside
            text = "\n".join(each.removeprefix(opening["indent"]) for each in lines)
            blocks.append(Block(page, start, opening["language"], mark, text + "\n"))
            inside, mark = None, ""
        else:
            lines.append(line)
    if inside or mark:
        raise ValueError(f"{name_of(page)}: a fence or a mark is left open at its end")
    return blocks, "\n".join(prose)


def blocks_of(language: str) -> list[Block]:
    return [block for page in PAGES for block in split(page)[0] if block.language == language]


def links_of(page: Path) -> Iterator[tuple[bool, str]]:
    """Yield each link's target, and whether it is an image."""
    prose = _SPAN.sub("", split(page)[1])
    for match in _LINK.finditer(prose):
        yield bool(match["image"]), match["target"]


def spans_of(page: Path) -> list[str]:
    """Return what stands between single backticks."""
    return _SPAN.findall(split(page)[1])


def anchors_of(page: Path) -> set[str]:
    """Return the names of the headings, as GitHub and mkdocs make them."""
    titles = re.findall(r"^#+ (.*?)\s*$", split(page)[1], re.MULTILINE)
    return {anchor_of(title) for title in titles}


def anchor_of(title: str) -> str:
    """Return the name that a link to the heading ``title`` has."""
    return re.sub(r"[^\w\- ]", "", title.lower()).strip().replace(" ", "-")


def commands_of(script: str) -> Iterator[list[str]]:
    """Yield the words of every simple command in ``script``, comments and redirections gone."""
    plain = _COMMENT.sub("", script.replace("\\\n", " "))
    lexer = shlex.shlex(plain, posix=True, punctuation_chars="();|&\n")
    lexer.commenters = ""  # shlex sees them within words too: run.json#0
    lexer.whitespace = " \t"
    lexer.whitespace_split = True
    words: list[str] = []
    for token in [*lexer, ";"]:
        if token in _COMMAND_ENDS or not token.strip("\n"):
            if words:
                yield words
            words = []
        else:
            words.append(token)


def edgekd_arguments(words: list[str]) -> list[str] | None:
    """Return what is passed to edgekd by a command; None where it is another program."""
    while words and re.fullmatch(r"\w+=.*", words[0]):
        words = words[1:]
    start = next((n for n, word in enumerate(words) if Path(word).name == "edgekd"), None)
    if start is None or (start > 0 and words[start - 1] != "-m"):
        return None
    rest = words[start + 1 :]
    end = next((n for n, word in enumerate(rest) if re.match(r"\d?[<>]", word)), len(rest))
    return rest[:end]
