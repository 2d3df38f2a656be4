"""What stands beside the code agrees with it: versions of Python, continuous integration, citation, forms."""

from __future__ import annotations

import re
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml
from packaging.requirements import Requirement

import flashsae

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

ROOT = Path(__file__).parents[1]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text("utf-8"))
WORKFLOWS = sorted((ROOT / ".github" / "workflows").glob("*.yml"))
FORMS = sorted(path for path in (ROOT / ".github" / "ISSUE_TEMPLATE").glob("*.yml") if path.stem != "config")


def read_yaml(path: Path) -> Any:
    return yaml.safe_load(path.read_text("utf-8"))


def steps_of(workflow: str) -> list[dict[str, Any]]:
    return [
        step for job in read_yaml(ROOT / f".github/workflows/{workflow}.yml")["jobs"].values() for step in job["steps"]
    ]


def test_tests_run_on_every_python_that_the_package_says_it_supports() -> None:
    matrix = read_yaml(ROOT / ".github/workflows/tests.yml")["jobs"]["tests"]["strategy"]["matrix"]["python-version"]
    classified = [
        name.rpartition(" ")[2]
        for name in PROJECT["project"]["classifiers"]
        if re.fullmatch(r"Programming Language :: Python :: 3\.\d+", name)
    ]
    assert matrix == classified  # strings: a bare 3.10 would be the number 3.1
    assert PROJECT["project"]["requires-python"] == f">={matrix[0]}"
    oldest = tuple(map(int, matrix[0].split(".")))
    assert PROJECT["tool"]["ruff"]["target-version"] == "py{}{}".format(*oldest)
    assert f"sys.version_info < {oldest}" in (ROOT / "Makefile").read_text("utf-8")


@pytest.mark.parametrize("path", WORKFLOWS, ids=lambda path: path.stem)
def test_a_workflow_calls_a_target_of_the_makefile_on_code_that_it_fetched(path: Path) -> None:
    workflow = read_yaml(path)
    assert {"push", "pull_request"} == workflow[True].keys()  # `on` is a yes in YAML
    assert workflow["permissions"] == {"contents": "read"}
    targets = re.findall(r"^([\w-]+):", (ROOT / "Makefile").read_text("utf-8"), re.MULTILINE)
    for job in workflow["jobs"].values():
        assert job["timeout-minutes"] <= 60
        assert job["steps"][0]["uses"].startswith("actions/checkout@")
        commands = [step["run"] for step in job["steps"] if "run" in step]
        assert commands
        assert all(command.removeprefix("make ") in targets for command in commands)


def test_continuous_integration_here_runs_what_the_workflows_run() -> None:
    here = (ROOT / ".ci" / "run").read_text("utf-8").splitlines()
    assert here[-2:] == ["make lint", "make test"]
    assert {path.stem for path in WORKFLOWS} == {"docs", "interop", "lint", "tests"}
    assert [step["run"] for step in steps_of("lint") if "run" in step] == ["make lint"]
    assert [step["run"] for step in steps_of("tests") if "run" in step] == ["make test"]


def test_libraries_of_others_are_met_in_a_job_of_their_own(pytestconfig: pytest.Config) -> None:
    assert [step["run"] for step in steps_of("interop") if "run" in step] == ["make test-interop"]
    assert "interop" not in (ROOT / ".ci" / "run").read_text("utf-8")
    assert "interop" in pytestconfig.getini("norecursedirs")
    pinned = dict(
        re.findall(r"^([\w-]+)==([\d.]+)$", (ROOT / "tests/interop/requirements.txt").read_text("utf-8"), re.MULTILINE)
    )
    asked = [Requirement(each) for each in PROJECT["project"]["optional-dependencies"]["peers"]]
    assert all(each.specifier.contains(pinned[each.name]) for each in asked)
    assert not {"torch", "torchvision"} & pinned.keys()


def test_lint_and_types_cover_all_code_and_the_benchmarks() -> None:
    recipe = (ROOT / "Makefile").read_text("utf-8").partition("\nlint:")[2].partition("\n\n")[0]
    assert "ruff format --check .\n" in recipe
    assert "ruff check .\n" in recipe
    assert "/mypy" in recipe
    assert {"src", "benchmarks"} <= set(PROJECT["tool"]["mypy"]["files"])


@pytest.mark.parametrize("path", FORMS, ids=lambda path: path.stem)
def test_a_form_asks_questions_with_names_of_their_own(path: Path) -> None:
    form = read_yaml(path)
    assert form["name"]
    assert form["description"]
    questions = [part for part in form["body"] if part["type"] != "markdown"]
    assert {part["type"] for part in questions} <= {"textarea", "input", "dropdown", "checkboxes"}
    assert all(part["attributes"]["label"] for part in questions)
    names = [part["id"] for part in questions]
    assert len(set(names)) == len(names)
    assert any(part.get("validations", {}).get("required") for part in questions)


def test_whoever_reports_a_fault_is_asked_for_what_doctor_says() -> None:
    assert {path.stem for path in FORMS} == {"bug", "feature", "wrong_number"}
    for name in ("bug", "wrong_number"):
        (question,) = [
            part for part in read_yaml(ROOT / f".github/ISSUE_TEMPLATE/{name}.yml")["body"] if part["id"] == "doctor"
        ]
        assert "`flashsae doctor`" in question["attributes"]["label"]
        assert question["validations"]["required"] is True


def test_the_citation_is_one_of_this_version_and_names_no_person() -> None:
    citation, project = read_yaml(ROOT / "CITATION.cff"), PROJECT["project"]
    assert citation["cff-version"] == "1.2.0"
    assert citation["message"]
    assert citation["title"].startswith("FlashSAE")
    assert (
        citation["authors"] == project["authors"] == [{"name": "The FlashSAE developers"}]
    )  # an entity, in both formats
    assert str(citation["version"]) == project["version"] == flashsae.__version__
    assert citation["license"] == project["license"]
    assert citation["repository-code"] == project["urls"]["Repository"]


def test_helpers_lie_in_one_folder_and_test_files_have_names_of_their_own() -> None:
    tests = ROOT / "tests"
    files = [path for path in tests.rglob("*.py") if path.name not in ("__init__.py", "conftest.py")]
    helpers = [path for path in files if tests / "helpers" in path.parents]
    others = [path.name for path in files if path not in helpers]
    assert helpers
    assert all(name.startswith("test_") for name in others), "a helper that lies beside tests"
    assert len(set(others)) == len(others)


def test_a_latent_is_active_by_one_word() -> None:
    files = [*(ROOT / "docs").glob("*.md"), *(ROOT / "src").rglob("*.py"), *(ROOT / "src/flashsae/report").glob("*.j*")]
    said = {path.name: re.findall(r"(?i)\bfir(?:es?|ed|ing)\b", path.read_text("utf-8")) for path in files}
    assert {"script.js", "template.html.j2", "quickstart.md"} <= said.keys()
    assert not {name: words for name, words in said.items() if words}
