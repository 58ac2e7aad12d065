"""What ``edgekd --help`` groups, and what a shell completes."""

import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import typer

from edgekd.cli import app
from edgekd.cli_help import PLACES
from tests.test_cli import HEAVY

BASH = shutil.which("bash")
# What bash runs when Tab is pressed behind the words of COMP_WORDS.
COMPLETE = """
set -euo pipefail
eval "$(edgekd --show-completion; true)"
COMP_WORDS=({words}) COMP_CWORD={index} COMPREPLY=()
$(complete -p edgekd | sed 's/.*-F \\([^ ]*\\) .*/\\1/') edgekd
printf '%s\\n' "${{COMPREPLY[@]}}"
"""


def test_every_verb_stands_in_one_place_of_the_help() -> None:
    group = typer.main.get_command(app)
    names = [name for verbs in PLACES.values() for name in verbs]
    assert sorted(names) == sorted(group.commands)  # type: ignore[attr-defined]
    result = subprocess.run(
        [sys.executable, "-m", "edgekd", "--help"], capture_output=True, text=True, check=True
    )
    sections = result.stdout.split("\n\n")[2:]
    shown = {
        section.splitlines()[0].rstrip(":"): tuple(
            line.split()[0] for line in section.splitlines()[1:] if line[2:3].strip()
        )
        for section in sections
    }
    assert shown == PLACES


@pytest.fixture
def command(tmp_path: Path) -> dict[str, str]:
    """An environment in which ``edgekd`` is this checkout's, whatever is installed."""
    program = tmp_path / "edgekd"
    program.write_text(
        f"#!{sys.executable}\n"
        "import atexit, sys\nfrom pathlib import Path\n"
        f"sys.path[:0] = {sys.path!r}\n"
        "from edgekd.cli import main\n"
        f"heavy = lambda: ' '.join(name for name in {HEAVY!r} if name in sys.modules)\n"
        f"atexit.register(lambda: Path({str(tmp_path / 'heavy')!r}).write_text(heavy()))\n"
        "main()\n"
    )
    program.chmod(0o755)
    return {"PATH": f"{tmp_path}:/usr/bin:/bin", "HOME": str(tmp_path)}


@pytest.mark.skipif(BASH is None, reason="no bash here")
@pytest.mark.parametrize(
    ("words", "expected"),
    [
        ("edgekd di", {"distill"}),
        ("edgekd devices ", {"list", "show", "detect", "fit"}),
        ("edgekd export --qu", {"--quant", "--quiet"}),
        ("edgekd serve --kv-type q", {"q8_0", "q4_0"}),
    ],
)
def test_bash_completes_verbs_options_and_values(
    words: str, expected: set[str], command: dict[str, str], tmp_path: Path
) -> None:
    split = words.split(" ")
    quoted = " ".join(f"'{word}'" for word in split)
    script = COMPLETE.format(words=quoted, index=len(split) - 1)
    result = subprocess.run(
        [BASH or "bash", "-c", script], capture_output=True, text=True, env=command, check=False
    )
    assert result.returncode == 0, result.stderr
    assert set(result.stdout.split()) == expected
    assert (tmp_path / "heavy").read_text() == "", "completion imports what is slow to import"
