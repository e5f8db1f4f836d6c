"""What travels with a job: by `.rayignore` under Ray's own packing, and by ours."""

from __future__ import annotations

import os
import venv
import zipfile
from pathlib import Path

import pytest
import yaml

from orchestrator.errors import SpecError
from orchestrator.submission import upload
from orchestrator.submission.job import DEFAULT_ENVIRONMENT, RUNTIME_ENV
from orchestrator.submission.upload import files_at, find_upload, write_package

ROOT = Path(__file__).parents[1]
CLONE_BYTES = 4_000_000
"""Of what a clone sends: 3.3 MB of source, configurations and sample data."""
LEFT_HERE = (
    *("myenv/lib/x.py", "envs/gpu/lib/x.py", "data/corpus.txt", "runs/a/model.bin", "mlruns/0/meta.yaml", "mlflow.db"),
    *(".env", ".env.local", "tests/test_a.py", "findings/x.md", "orchestrator/__pycache__/a.pyc", "notes.txt"),
    *(".git/config", ".mypy_cache/x", "node_modules/x.js", "wandb/x", "outputs/x.pt"),
)
TRAVELS = ("orchestrator/a.py", "jobs/b.py", "configs/data/reviews.csv", "configs/devices.yaml", "mine.yaml")


def fill(folder: Path, *names: str) -> None:
    for name in names:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text("x")


@pytest.fixture
def clone(tmp_path: Path) -> Path:
    """A folder like a clone in use, with the ignore files that are shipped."""
    fill(tmp_path, *LEFT_HERE, *TRAVELS)
    (tmp_path / "myenv" / "pyvenv.cfg").touch()
    (tmp_path / "envs" / "gpu" / "conda-meta").mkdir()
    for name in (".rayignore", ".gitignore"):
        (tmp_path / name).write_text((ROOT / name).read_text())
    return tmp_path


def packed_by_ray(folder: Path, target: Path) -> set[str]:
    """Names of files in the package that `ray job submit --working-dir` makes, without a cluster."""
    from ray._private.ray_constants import get_runtime_env_default_excludes
    from ray._private.runtime_env.packaging import create_package

    create_package(str(folder), target, include_gitignore=True, excludes=get_runtime_env_default_excludes())
    with zipfile.ZipFile(target) as package:
        return {name for name in package.namelist() if not name.endswith("/")}


def test_ray_packs_what_a_training_needs_and_no_environment_of_any_name(clone: Path, tmp_path: Path) -> None:
    assert packed_by_ray(clone, tmp_path.parent / "package.zip") == set(TRAVELS)


def test_submit_packs_the_same(clone: Path) -> None:
    assert {name for name, _ in find_upload(clone).files} == set(TRAVELS)


def test_this_clone_sends_little_and_what_the_demo_needs(tmp_path: Path) -> None:
    names = packed_by_ray(ROOT, tmp_path / "package.zip")
    assert (tmp_path / "package.zip").stat().st_size < CLONE_BYTES
    assert {"configs/data/movie-reviews/reviews.csv", "configs/tune/demo.yaml", "jobs/tune.py"} <= names
    assert not [name for name in names if name.startswith(("tests/", "findings/", ".venv/"))]
    ours = find_upload(ROOT)
    assert {name for name, _ in ours.files} == names
    assert ours.size < CLONE_BYTES


def test_an_environment_that_venv_makes_stays_here_whatever_its_name(tmp_path: Path) -> None:
    venv.create(tmp_path / "any name", with_pip=False)
    fill(tmp_path, "spec.yaml")
    assert [name for name, _ in find_upload(tmp_path).files] == ["spec.yaml"]


def test_a_folder_without_rules_of_its_own_sends_no_secrets_stores_or_caches(tmp_path: Path) -> None:
    fill(tmp_path, *LEFT_HERE, *TRAVELS)
    names = {name for name, _ in find_upload(tmp_path).files}
    assert names >= set(TRAVELS)
    assert not names & {".env", ".env.local", "mlflow.db", "mlruns/0/meta.yaml", ".git/config", ".mypy_cache/x"}


def test_rules_of_git_hold_in_every_folder_and_ask_nothing_of_git(tmp_path: Path) -> None:
    fill(tmp_path, "a/keep.txt", "a/drop.txt", "b/drop.txt", "big/x", "a/big/x")
    (tmp_path / "a" / ".gitignore").write_text("drop.txt\n")
    (tmp_path / ".rayignore").write_text("/big/\n")
    names = {name for name, _ in find_upload(tmp_path).files}
    assert names == {"a/keep.txt", "b/drop.txt", "a/big/x", "a/.gitignore", ".rayignore"}


def test_links_that_lead_in_a_circle_are_not_followed(tmp_path: Path) -> None:
    fill(tmp_path, "a/x")
    (tmp_path / "a" / "up").symlink_to(tmp_path)
    assert [name for name, _ in find_upload(tmp_path).files] == ["a/x"]


def test_what_the_spec_needs_travels_though_the_rules_leave_it_out(clone: Path) -> None:
    needed = files_at("data", clone)
    assert ("data/corpus.txt", clone / "data" / "corpus.txt") in find_upload(clone, needed=needed).files


@pytest.mark.parametrize("location", ["/data/x", "~/x", "s3://bucket/x", "package://a/b", "../x", "owner/name"])
def test_places_outside_of_the_folder_name_no_file_of_it(tmp_path: Path, location: str) -> None:
    fill(tmp_path / "in", "a")
    fill(tmp_path, "x")
    assert files_at(location, tmp_path / "in") == []


@pytest.mark.parametrize(("location", "count"), [("d", 3), ("d/*.txt", 1), ("d/**/*.txt", 2), ("./d/a.txt", 1)])
def test_files_folders_and_globs_of_a_spec_are_found(tmp_path: Path, location: str, count: int) -> None:
    fill(tmp_path, "d/a.txt", "d/e/b.txt", "d/e/c.csv")
    found = files_at(location, tmp_path)
    assert len(found) == count
    assert all(not name.startswith(".") for name, _ in found)


def test_a_folder_that_is_too_large_is_refused_with_its_largest_parts(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(upload, "LIMIT_BYTES", 3 * 1024**2)
    fill(tmp_path, "code/a.py", "videos/b/c")
    (tmp_path / "videos" / "b" / "d.bin").write_bytes(b"0" * 3 * 1024**2)
    with pytest.raises(SpecError, match=r"too large[\s\S]*the largest: videos/b 3 MiB[\s\S]*\.rayignore"):
        find_upload(tmp_path)


def test_the_same_files_make_the_same_package(tmp_path: Path) -> None:
    fill(tmp_path / "in", "a", "b/c")
    made = []
    for name in ("one.zip", "two.zip"):
        write_package(find_upload(tmp_path / "in"), tmp_path / name)
        os.utime(tmp_path / "in" / "a", (10**9, 10**9))
        made.append((tmp_path / name).read_bytes())
    assert made[0] == made[1]
    with zipfile.ZipFile(tmp_path / "one.zip") as package:
        assert package.namelist() == ["a", "b/c"]


def test_a_script_stays_executable(tmp_path: Path) -> None:
    fill(tmp_path / "in", "run.sh")
    (tmp_path / "in" / "run.sh").chmod(0o755)
    write_package(find_upload(tmp_path / "in"), tmp_path / "p.zip")
    with zipfile.ZipFile(tmp_path / "p.zip") as package:
        assert package.getinfo("run.sh").external_attr >> 16 == 0o755


def test_the_shipped_environment_is_what_submit_takes_without_it() -> None:
    assert yaml.safe_load((ROOT / RUNTIME_ENV).read_text()) == {"env_vars": dict(DEFAULT_ENVIRONMENT)}
