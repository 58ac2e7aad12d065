import json
import shutil
from pathlib import Path

import pytest
from typer.testing import CliRunner

from edgekd.cli import app
from edgekd.errors import VerificationError
from edgekd.export.checkpoint import open_checkpoint
from edgekd.export.export_model import export_model
from edgekd.lineage import render, walk
from edgekd.manifest import Manifest, describe_files, manifest_path, write_manifest


@pytest.fixture
def chain(tiny_folder: Path, tmp_path: Path) -> Path:
    """A student made from a teacher, and its artifact, side by side."""
    teacher, student = tmp_path / "teacher", tmp_path / "student"
    shutil.copytree(tiny_folder, teacher)
    shutil.copytree(tiny_folder, student)
    source = {
        "role": "teacher",
        "name": "teacher",
        "weights_sha256": open_checkpoint(teacher).weights_sha256(),
    }
    files = describe_files([student / "model.safetensors"])
    manifest = Manifest(kind="checkpoint", files=files, made_from=[source], licence="apache-2.0")
    write_manifest(manifest_path(student), manifest)
    export_model(str(student), "gguf", tmp_path / "model.gguf", quant="f16")
    return tmp_path / "model.gguf"


def test_the_chain_leads_from_the_artifact_to_the_teacher(chain: Path) -> None:
    link = walk(chain)
    (student,) = link.sources
    (teacher,) = student.sources
    assert [link.state, student.state, teacher.state] == ["unchanged"] * 3
    assert (student.name, student.licence, teacher.role) == ("student", "apache-2.0", "teacher")
    assert not teacher.sources and not link.changed()
    assert "    teacher: teacher" in render(link)


def test_a_changed_source_is_named_and_a_moved_one_is_found(chain: Path, tmp_path: Path) -> None:
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    (chain.parent / "teacher").rename(elsewhere / "teacher")
    assert walk(chain).sources[0].sources[0].state == "not here"
    assert walk(chain, [elsewhere]).sources[0].sources[0].state == "unchanged"
    weights = elsewhere / "teacher" / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1] + b"\1")
    assert [one.name for one in walk(chain, [elsewhere]).changed()] == ["teacher"]
    found = CliRunner().invoke(
        app, ["verify", str(chain), "--lineage", "--look-in", str(elsewhere), "--json"]
    )
    assert json.loads(found.stdout)["sources"][0]["sources"][0]["state"] == "changed"
    assert isinstance(found.exception, VerificationError)


def test_a_changed_artifact_is_no_longer_its_own(chain: Path) -> None:
    chain.write_bytes(chain.read_bytes() + b"\0")
    assert walk(chain).state == "changed"


def test_a_manifest_that_names_itself_comes_to_an_end(chain: Path) -> None:
    student = chain.parent / "student"
    manifest = json.loads(manifest_path(student).read_text("utf-8"))
    manifest["made_from"][0]["name"] = "student"  # same weights as the teacher's in this test
    manifest_path(student).write_text(json.dumps(manifest), "utf-8")
    with pytest.raises(VerificationError, match="made from itself"):
        walk(chain)


def test_a_name_cannot_lead_out_of_the_folder(chain: Path) -> None:
    path = manifest_path(chain)
    manifest = json.loads(path.read_text("utf-8"))
    manifest["made_from"][0]["name"] = "../" + chain.parent.name + "/student"
    path.write_text(json.dumps(manifest), "utf-8")
    assert walk(chain).sources[0].state == "not here"


@pytest.mark.parametrize("sources", ["teacher", ["teacher"], None])
def test_sources_that_are_no_list_of_models_are_no_manifest_of_ours(
    sources: object, chain: Path
) -> None:
    path = manifest_path(chain)
    manifest = json.loads(path.read_text("utf-8")) | {"made_from": sources}
    path.write_text(json.dumps(manifest), "utf-8")
    with pytest.raises(VerificationError, match="lists no kind, sources"):
        walk(chain)
