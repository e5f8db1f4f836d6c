from __future__ import annotations

import io
import json
import os
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from rich.console import Console

from orchestrator.doctor import machine_checks, report
from orchestrator.doctor.machine_checks import Finding


@pytest.fixture
def busy_port() -> Iterator[int]:
    with socket.socket() as server:
        server.bind(("127.0.0.1", 0))
        server.listen()
        yield server.getsockname()[1]


def program(folder: Path, name: str, script: str) -> None:
    """An executable on a PATH of its own: the outermost edge of checks that ask other programs."""
    path = folder / name
    path.write_text(f"#!/bin/sh\n{script}\n", encoding="utf-8")
    path.chmod(0o755)


def test_port_in_use_is_named_with_its_process_and_a_way_round(busy_port: int) -> None:
    finding = machine_checks.check_port(busy_port)
    assert finding.status == "warn"
    assert f"(pid {os.getpid()})" in finding.detail
    assert finding.remedy is not None
    assert "`orchestrator run` does not need it" in finding.remedy


def test_free_port_is_ok_though_closed_connections_linger(busy_port: int) -> None:
    with socket.socket() as server:
        server.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        server.bind(("127.0.0.1", 0))
        server.listen()
        port = server.getsockname()[1]
        with socket.create_connection(("127.0.0.1", port)):
            accepted, _ = server.accept()
            accepted.close()
    assert machine_checks.check_port(port).status == "ok"


def test_stale_build_lock_fails_and_says_what_to_remove(tmp_path: Path) -> None:
    lock = tmp_path / "py311_cpu" / "cpu_adam" / "lock"
    lock.parent.mkdir(parents=True)
    lock.touch()
    os.utime(lock, (time.time() - 600, time.time() - 600))
    (finding,) = machine_checks.check_build_locks([tmp_path])
    assert finding.status == "fail"
    assert finding.remedy is not None
    assert f"rm {lock}" in finding.remedy


def test_lock_of_a_build_that_runs_is_left_alone(tmp_path: Path) -> None:
    lock = tmp_path / "cpu_adam" / "lock"
    lock.parent.mkdir()
    lock.touch()
    os.utime(lock, (time.time() - 600, time.time() - 600))
    builder = subprocess.Popen(["sleep", "60"], cwd=lock.parent)
    try:
        (finding,) = machine_checks.check_build_locks([tmp_path])
    finally:
        builder.kill()
        builder.wait()
    assert finding.status == "ok"
    assert "is being built now" in finding.detail


def test_young_lock_is_no_stale_lock(tmp_path: Path) -> None:
    lock = tmp_path / "cpu_adam" / "lock"
    lock.parent.mkdir()
    lock.touch()
    assert [finding.status for finding in machine_checks.check_build_locks([tmp_path])] == ["ok"]


def test_extension_folder_follows_the_environment(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.delenv("TORCH_EXTENSIONS_DIR", raising=False)
    assert machine_checks.extension_folders() == (tmp_path / "torch_extensions",)
    monkeypatch.setenv("TORCH_EXTENSIONS_DIR", "/elsewhere")
    assert machine_checks.extension_folders() == (Path("/elsewhere"),)


@pytest.fixture
def tiny_disk(tmp_path: Path) -> Iterator[Path]:
    folder = tmp_path / "tiny"
    folder.mkdir()
    mounted = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=64k", "tmpfs", folder], capture_output=True, check=False
    )
    if mounted.returncode != 0:
        pytest.skip(f"mounting a small tmpfs needs root: {mounted.stderr.decode().strip()}")
    yield folder
    subprocess.run(["umount", folder], check=True)


def test_full_disk_fails_with_the_variable_that_moves_the_folder(tiny_disk: Path) -> None:
    with pytest.raises(OSError, match="No space"):
        (tiny_disk / "filler").write_bytes(b"x" * 2**17)
    finding = machine_checks.check_folder("home", tiny_disk / "not" / "yet")
    assert finding.status == "fail"
    assert "No space left" in finding.detail
    assert finding.remedy is not None
    assert "ORCHESTRATOR_HOME" in finding.remedy


def test_small_disk_fails_before_a_checkpoint_does(tiny_disk: Path) -> None:
    finding = machine_checks.check_folder("temp", tiny_disk)
    assert finding.status == "fail"
    assert finding.remedy is not None
    assert "TMPDIR" in finding.remedy


def test_small_shared_memory_warns(tiny_disk: Path) -> None:
    finding = machine_checks.check_shared_memory(tiny_disk)
    assert finding.status == "warn"
    assert finding.remedy is not None
    assert "--shm-size" in finding.remedy


def test_memory_limit_of_a_container_counts(tmp_path: Path) -> None:
    limit = tmp_path / "memory.max"
    limit.write_text(f"{2**30}\n", encoding="utf-8")
    finding = machine_checks.check_memory(limit)
    assert finding.status == "warn"
    assert "of 1.0 GiB" in finding.detail


def test_long_temporary_path_warns_with_both_lengths() -> None:
    assert machine_checks.check_socket_path(Path("/tmp")).status == "ok"
    finding = machine_checks.check_socket_path(Path("/tmp") / ("x" * 60))
    assert finding.status == "warn"
    assert "133 bytes, 107 allowed" in finding.detail


@pytest.mark.parametrize(
    ("version", "status"), [((3, 10), "fail"), ((3, 11), "ok"), ((3, 13), "ok"), ((3, 14), "fail")]
)
def test_python_outside_the_supported_range_fails(version: tuple[int, int], status: str) -> None:
    assert machine_checks.check_python(version).status == status


def test_package_at_another_version_than_tested_is_named(tmp_path: Path) -> None:
    pins = tmp_path / "constraints.txt"
    pins.write_text("# why\nray==0.0.1\nnot-installed-here==1.0\n", encoding="utf-8")
    (finding,) = machine_checks.check_packages(pins)
    assert finding.status == "warn"
    assert "(tested: 0.0.1)" in finding.detail
    assert "not-installed-here" not in finding.detail


def test_shipped_constraints_pin_every_core_package() -> None:
    path = machine_checks.find_constraints()
    assert path is not None
    pins = [line for line in path.read_text(encoding="utf-8").splitlines() if not line.startswith("#")]
    names = {pin.partition("==")[0] for pin in pins}
    assert names >= set(machine_checks.CORE_PACKAGES)
    assert not [pin for pin in pins if "+" in pin], "a local version tag ties the file to one kind of machine"


def test_driver_without_gpus_warns(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    program(tmp_path, "nvidia-smi", "exit 9")
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.setattr(sys, "executable", "/bin/false")
    assert report.check_gpus().status == "warn"


@pytest.mark.parametrize(
    ("torch_says", "status", "part"),
    [
        ("None 0", "fail", "a build without CUDA"),
        ("13.0 0", "fail", "(CUDA 13.0) sees none of them"),
        ("13.0 2", "ok", "torch with CUDA 13.0 sees 2"),
        ("", "warn", "did not answer"),
    ],
)
def test_gpus_that_torch_cannot_use_fail(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, torch_says: str, status: str, part: str
) -> None:
    program(tmp_path, "nvidia-smi", "echo 'NVIDIA H100, 81559 MiB, 580.1'; echo 'NVIDIA H100, 81559 MiB, 580.1'")
    program(tmp_path, "python", f"echo '{torch_says}'")
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    monkeypatch.setattr(sys, "executable", str(tmp_path / "python"))
    finding = report.check_gpus()
    assert finding.status == status
    assert finding.detail.startswith("2 x NVIDIA H100")
    assert part in finding.detail


def test_program_that_hangs_is_given_up(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    program(tmp_path, "nvidia-smi", "exec sleep 60")
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    monkeypatch.setattr(sys, "executable", "/bin/true")
    monkeypatch.setattr(report, "PROBE_TIMEOUT_S", 0.3)
    started = time.monotonic()
    assert report.check_gpus().status == "warn"
    assert time.monotonic() - started < 5


def test_unusable_store_fails_with_the_reason_and_the_password_stays_hidden() -> None:
    def refuse(uri: str) -> None:
        raise ConnectionError("nobody there")

    finding = report.check_mlflow("http://127.0.0.1:1", refuse)
    assert (finding.status, finding.detail) == ("fail", "nobody there")
    usable = report.check_mlflow("postgresql://me:secret@host/db", lambda uri: None)
    assert usable.status == "ok"
    assert "secret" not in usable.detail


def test_store_that_hangs_does_not_hold_the_diagnosis(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(report, "DEADLINE_S", 0.3)
    release = threading.Event()
    started = time.monotonic()

    def hang(uri: str) -> None:
        release.wait(30)

    findings = report.diagnose(check_store=hang)
    release.set()
    assert time.monotonic() - started < 8
    assert findings[-1].check == "mlflow"
    assert (findings[-1].status, findings[-1].detail) == ("fail", "no answer in 0.3 s")


def test_findings_render_and_serialise() -> None:
    findings = [
        Finding(check="a", status="ok", detail="[fine]"),
        Finding(check="b", status="fail", detail="broken", remedy="mend it"),
    ]
    assert report.exit_code(findings) == 1
    assert report.exit_code(findings[:1]) == 0
    assert json.loads(json.dumps(report.to_json(findings)))["ok"] is False
    out = io.StringIO()
    Console(file=out, width=80).print(report.render(findings))
    assert "[fine]" in out.getvalue()
    assert "-> mend it" in out.getvalue()


def test_diagnosis_loads_neither_torch_nor_ray_nor_mlflow() -> None:
    code = (
        "import sys; from orchestrator.doctor.report import diagnose; diagnose();"
        "print([name for name in ('torch', 'ray', 'mlflow') if name in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
