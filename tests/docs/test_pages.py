"""What the documentation says can be typed, compiled, followed and looked at."""

import json
import subprocess
import tomllib
from pathlib import Path
from typing import Any

import pytest
import typer

from edgekd.cli import app
from tests.docs.pages import (
    PAGES,
    ROOT,
    Block,
    anchors_of,
    blocks_of,
    commands_of,
    edgekd_arguments,
    links_of,
    name_of,
    spans_of,
    split,
)

# They act as soon as they are parsed, on the files of whoever runs the tests.
AT_ONCE = {"--install-completion", "--show-completion", "--help"}
SHELL = blocks_of("bash")


def follow(arguments: list[str]) -> None:
    """Parse ``arguments`` as ``edgekd`` would, and run nothing.

    Raises:
        Exception: a command or an option does not exist, a value is none of those allowed, or
            something required is missing.
    """
    command: Any = typer.main.get_command(app)
    if arguments[0] in AT_ONCE & options_of(command):
        return
    context = command.make_context("edgekd", list(arguments))
    while hasattr(command, "commands"):
        rest = [*context._protected_args, *context.args]
        if not rest and command.invoke_without_command:
            return
        name, command, rest = command.resolve_command(context, rest)
        context = command.make_context(name, rest, parent=context)


def options_of(command: Any) -> set[str]:
    """Return every option of ``command`` and of the commands below it."""
    found = {name for each in command.params for name in (*each.opts, *each.secondary_opts)}
    below = getattr(command, "commands", {}).values()
    return found.union(*(options_of(each) for each in below)) | {"--help"}


@pytest.mark.parametrize("block", SHELL, ids=str)
def test_shell_blocks_are_shell(block: Block) -> None:
    done = subprocess.run(
        ["bash", "-n"], input=block.text, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("block", SHELL, ids=str)
def test_what_is_typed_exists(block: Block) -> None:
    for words in commands_of(block.text):
        arguments = edgekd_arguments(words)
        if arguments is not None:
            try:
                follow(arguments)
            except Exception as error:
                reason = getattr(error, "message", error)
                pytest.fail(f"edgekd {' '.join(arguments)}: {type(error).__name__} {reason}")
        elif words[0].startswith(("./scripts/", "scripts/")):
            assert (ROOT / words[0]).is_file(), f"{words[0]} does not exist"
        elif words[0] == "python" and words[1:2] and words[1].endswith(".py"):
            assert (ROOT / words[1]).is_file(), f"{words[1]} does not exist"


def test_the_blocks_with_commands_are_seen() -> None:
    """Or the tests above would pass on pages whose blocks nobody finds."""
    seen = [edgekd_arguments(words) for block in SHELL for words in commands_of(block.text)]
    verbs = {arguments[0] for arguments in seen if arguments}
    left_out = set(typer.main.get_command(app).commands) - verbs  # type: ignore[attr-defined]
    assert not left_out, f"no page shows how to type {left_out}"


@pytest.mark.parametrize(
    ("typed", "reason"),
    [
        ("edgekd explode model.gguf", "explode"),
        ("edgekd serve m.gguf --prot 80", "--prot"),
        ("edgekd bench m.gguf --kv-type f16", "--kv-type"),
        ("edgekd bench compare a.json", "new"),
        ("A=1 edgekd export m --format gguf --head q9 --out x 2>log | tail -1", "q9"),
        ("edgekd export m --format gguf \\\n  --outt x", "--outt"),
        ("torchrun --nproc-per-node 2 -m edgekd distill --gird q4_0", "--gird"),
        ("echo one && (edgekd chat)", "model"),
        ("edgekd --instal-completion", "--instal-completion"),
        ("edgekd devices fit m --ctx many  # don't", "integer"),
    ],
)
def test_what_cannot_be_typed_is_found(typed: str, reason: str) -> None:
    (arguments,) = [found for w in commands_of(typed) if (found := edgekd_arguments(w)) is not None]
    with pytest.raises(Exception, match=reason) as caught:
        follow(arguments)
    assert type(caught.value).__module__.startswith("typer")


@pytest.mark.parametrize("page", PAGES, ids=name_of)
def test_options_in_prose_exist(page: Path) -> None:
    root: Any = typer.main.get_command(app)
    for span in spans_of(page):
        words = span.split()
        command, names = root, words
        if words[0] == "edgekd" and words[1:2] and words[1] in root.commands:
            command, names = root.commands[words[1]], words[2:]
        elif words[0] in root.commands and len(words) > 1:
            command, names = root.commands[words[0]], words[1:]
        elif not words[0].startswith("--"):
            continue
        wanted = {word.split("=")[0].rstrip(",:") for word in names if word.startswith("--")}
        assert wanted <= options_of(command), f"`{span}`"


@pytest.mark.parametrize("page", PAGES, ids=name_of)
def test_links_lead_somewhere_and_images_are_there(page: Path) -> None:
    for is_image, target in links_of(page):
        if target.startswith(("https://", "http://", "mailto:")):
            continue
        path, _, anchor = target.partition("#")
        found = (page.parent / path).resolve() if path else page
        assert found.exists(), target
        assert found.is_relative_to(ROOT), f"{target} leaves the checkout"
        if is_image:
            assert found.stat().st_size > 500, f"{target} is no picture"
        if anchor and found.suffix == ".md":
            assert anchor in anchors_of(found), target


@pytest.mark.parametrize("block", blocks_of("python"), ids=str)
def test_python_blocks_compile(block: Block) -> None:
    compile(block.text, str(block), "exec")


@pytest.mark.parametrize(
    ("language", "read"), [("json", json.loads), ("toml", tomllib.loads)], ids=["json", "toml"]
)
def test_data_blocks_can_be_read(language: str, read: Any) -> None:
    for block in blocks_of(language):
        read(block.text)


@pytest.mark.parametrize("page", PAGES, ids=name_of)
def test_every_block_says_what_it_is(page: Path) -> None:
    known = {"bash", "python", "json", "toml", "ini", "text", "mermaid"}
    assert {block.language for block in split(page)[0]} <= known


@pytest.mark.parametrize("block", [*SHELL, *blocks_of("python")], ids=str)
def test_every_block_of_commands_is_run_or_says_why_not(block: Block) -> None:
    assert block.mark, "put <!-- run --> or <!-- not run: why --> before it"


def test_most_blocks_of_commands_are_run() -> None:
    marks = [block.mark for block in SHELL if name_of(block.page) != "docs/peers.md"]
    assert sum(mark.startswith("run") for mark in marks) > len(marks) / 2
