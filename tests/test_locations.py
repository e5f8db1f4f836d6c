import sysconfig
from pathlib import Path

import pytest

from orchestrator.errors import SpecError
from orchestrator.locations import default_tracking_uri, home, resolve


def test_plain_paths_pass_unchanged() -> None:
    assert resolve("data/*.txt") == "data/*.txt"
    assert resolve("owner/name") == "owner/name"


def test_a_package_location_is_found_without_importing_the_package() -> None:
    import sys

    assert Path(resolve("package://xmlrpc/client.py")).is_file()
    assert "xmlrpc" not in sys.modules


def test_a_sysconfig_location_is_below_that_path() -> None:
    assert resolve("sysconfig://stdlib/json") == f"{sysconfig.get_path('stdlib')}/json"


def test_a_missing_package_is_named_with_the_remedy() -> None:
    with pytest.raises(SpecError, match="pip install no-such-package"):
        resolve("package://no_such_package/model")


def test_an_unknown_sysconfig_path_lists_the_known_ones() -> None:
    with pytest.raises(SpecError, match="stdlib"):
        resolve("sysconfig://nowhere/x")


def test_state_lives_in_the_home_folder_and_not_in_the_working_directory(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    monkeypatch.setenv("ORCHESTRATOR_HOME", str(tmp_path / "state"))
    assert home() == tmp_path / "state"
    assert default_tracking_uri() == f"sqlite:///{tmp_path}/state/mlflow.db"
