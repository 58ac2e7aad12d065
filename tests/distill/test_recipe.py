from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from edgekd.distill.recipe import Job, Recipe, resolve_job, write_recipe
from edgekd.errors import RecipeError

SOURCES = {"teacher": "t", "student": "s", "data": ["d.txt"]}


def test_all_faults_of_a_recipe_are_named_together() -> None:
    with pytest.raises(RecipeError, match=r"steps 0 is below 1; temperature 0.0 must be above 0"):
        Recipe(steps=0, temperature=0.0)


@pytest.mark.parametrize(
    ("setting", "value"),
    [("steps", True), ("steps", 1.5), ("learning_rate", "1e-4"), ("grid", "q3"), ("seed", -1)],
)
def test_a_setting_of_the_wrong_type_is_refused(setting: str, value: object) -> None:
    with pytest.raises(RecipeError, match=setting):
        Recipe(**{setting: value})  # type: ignore[arg-type]


def test_the_command_line_goes_over_the_file(tmp_path: Path) -> None:
    path = tmp_path / "recipe.toml"
    path.write_text('teacher = "from file"\ndata = "one.txt"\nsteps = 7\nseed = 3\n')
    job = resolve_job(path, {"teacher": "t", "student": "s", "data": [], "steps": 9, "seed": None})
    assert (job.teacher, job.student, job.data) == ("t", "s", ["one.txt"])
    assert (job.recipe.steps, job.recipe.seed, job.recipe.row_tokens) == (9, 3, 512)


def test_an_unknown_setting_is_named_with_the_known_ones(tmp_path: Path) -> None:
    path = tmp_path / "recipe.toml"
    path.write_text("temprature = 2.0\n")
    with pytest.raises(RecipeError, match=r"unknown settings: temprature; known are .*temperature"):
        resolve_job(path, SOURCES)


@pytest.mark.parametrize(
    ("text", "complaint"),
    [("steps = ", "no TOML"), ("teacher = 3", "teacher 3 is no str"), (None, "cannot read")],
)
def test_a_bad_file_is_refused(text: str | None, complaint: str, tmp_path: Path) -> None:
    path = tmp_path / "recipe.toml"
    if text is not None:
        path.write_text(text)
    with pytest.raises(RecipeError, match=complaint):
        resolve_job(path, {"student": "s", "data": ["d"]})


def test_sources_named_nowhere_are_asked_for() -> None:
    with pytest.raises(RecipeError, match="--student, --data missing"):
        resolve_job(None, {"teacher": "t"})


@given(
    teacher=st.text(min_size=1),
    rate=st.floats(1e-12, 10, allow_nan=False),
    steps=st.integers(1, 10**9),
)
def test_a_written_recipe_reads_back_as_itself(teacher: str, rate: float, steps: int) -> None:
    import tempfile

    job = Job(
        teacher=teacher,
        student="s \u00b2",
        data=["a", "b c"],
        recipe=Recipe(steps=steps, learning_rate=rate),
    )
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "recipe.toml"
        write_recipe(path, job)
        assert resolve_job(path, {}) == job
