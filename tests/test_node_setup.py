"""How a node installs the project: `cluster/node/setup.sh`, with real pip and tiny wheels instead of two gigabytes."""

from __future__ import annotations

import base64
import hashlib
import os
import subprocess
import sys
import zipfile
from dataclasses import dataclass
from pathlib import Path

import pytest

pytestmark = pytest.mark.slow

NODE = Path(__file__).parents[1] / "cluster" / "node"


def write_wheel(folder: Path, name: str, *, requires: str | None = None, says: str = "1") -> Path:
    """A wheel of one module with one value."""
    folder.mkdir(parents=True, exist_ok=True)
    path, info = folder / f"{name}-1.0-py3-none-any.whl", f"{name}-1.0.dist-info"
    needs = f"Requires-Dist: {requires}\n" if requires else ""
    files = {
        f"{name}.py": f"VALUE = {says!r}\n",
        f"{info}/METADATA": f"Metadata-Version: 2.1\nName: {name}\nVersion: 1.0\n{needs}",
        f"{info}/WHEEL": "Wheel-Version: 1.0\nGenerator: tests\nRoot-Is-Purelib: true\nTag: py3-none-any\n",
    }
    sums = {
        file: base64.urlsafe_b64encode(hashlib.sha256(text.encode()).digest()).decode().rstrip("=")
        for file, text in files.items()
    }
    record = "".join(f"{file},sha256={sums[file]},{len(text)}\n" for file, text in files.items())
    with zipfile.ZipFile(path, "w") as archive:
        for file, text in {**files, f"{info}/RECORD": f"{record}{info}/RECORD,,\n"}.items():
            archive.writestr(file, text)
    return path


@dataclass(frozen=True, kw_only=True)
class Node:
    """A machine: a home folder of its own, and a folder that it shares."""

    home: Path
    shared: Path
    index: Path
    """The package index that it reaches; of a machine without a network there is none."""

    def prepare(self, *, says: str = "1") -> None:
        """As `ray up` leaves it: the names, and what `make wheel` built."""
        dist = self.home / "orchestrator"
        write_wheel(dist, "orchestrator", requires="tinydep", says=says)
        write_wheel(dist, "weights", requires="a_whole_serving_stack")
        (dist / "constraints.txt").write_text("tinydep==1.0\n")
        for script in NODE.iterdir():
            (dist / script.name).write_bytes(script.read_bytes())
        (self.home / "orchestrator.names").write_text(
            f"SHARED={self.shared}\nPYTHON={sys.executable}\nVENV=$HOME/venv\nMLFLOW_TRACKING_URI=\n"
        )

    def setup(self, role: str) -> subprocess.CompletedProcess[str]:
        environment = {"HOME": str(self.home), "PATH": os.environ["PATH"], "PIP_INDEX_URL": self.index.as_uri()}
        environment |= {"PIP_CONFIG_FILE": os.devnull, "PIP_RETRIES": "0"}
        command = ["bash", str(self.home / "orchestrator" / "setup.sh"), role]
        return subprocess.run(command, env=environment, capture_output=True, text=True, check=False)

    def value(self) -> str:
        """What the installed project says."""
        code = "import orchestrator, tinydep, weights; print(orchestrator.VALUE)"
        command = [self.home / "venv" / "bin" / "python", "-I", "-c", code]
        return subprocess.run(command, capture_output=True, text=True, check=True, cwd=self.home).stdout.strip()


def test_the_head_collects_packages_once_and_a_worker_installs_from_them_without_a_network(tmp_path: Path) -> None:
    wheel = write_wheel(tmp_path / "index" / "tinydep", "tinydep")
    (wheel.parent / "index.html").write_text(f'<a href="{wheel.name}">{wheel.name}</a>')
    head, worker = (
        Node(home=tmp_path / name, shared=tmp_path / "shared", index=index)
        for name, index in (("head", tmp_path / "index"), ("worker", tmp_path / "none"))
    )
    for node in (head, worker):
        node.prepare()
    assert worker.setup("worker").returncode != 0, "there is nothing to install from yet"

    done = head.setup("head")
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "shared" / "orchestrator-packages" / "tinydep-1.0-py3-none-any.whl").is_file()
    done = worker.setup("worker")
    assert done.returncode == 0, done.stderr
    assert head.value() == worker.value() == "1"

    stamp = (worker.home / "venv" / "orchestrator.py", *(worker.home / "venv").rglob("site-packages/orchestrator.py"))[
        -1
    ]
    before = stamp.stat().st_mtime_ns
    assert worker.setup("worker").returncode == 0
    assert stamp.stat().st_mtime_ns == before, "the same wheel is not installed again"

    worker.prepare(says="2")
    assert worker.setup("worker").returncode == 0
    assert worker.value() == "2", "a new wheel of the same version is"

    shell = (worker.home / ".bashrc").read_text()
    assert shell.count("env.sh  # orchestrator") == 1
    assert (worker.home / ".profile").read_text() == shell


def test_several_wheels_are_refused_with_what_to_do(tmp_path: Path) -> None:
    node = Node(home=tmp_path / "node", shared=tmp_path / "shared", index=tmp_path)
    node.prepare()
    (node.home / "orchestrator" / "orchestrator-0.9-py3-none-any.whl").touch()
    done = node.setup("head")
    assert done.returncode == 1
    assert "make wheel" in done.stderr
