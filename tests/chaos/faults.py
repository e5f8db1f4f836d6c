"""When a fault strikes and what it does: small functions on a scene, with real processes, files and links."""

from __future__ import annotations

import shutil
import time
from collections.abc import Callable
from pathlib import Path

from tests.chaos import processes
from tests.chaos.scene import DRIVER, Scene
from tests.chaos.servers import OBJECTS

Moment = Callable[[Scene], bool]
"""Whether it is time; asked many times a second."""
Fault = Callable[[Scene], None]
"""Raises LookupError when there is nothing to strike; the runner then asks again."""

_SPIN_S = 0.001
_SAVING_WITHIN_S = 60.0
"""How long after the step before it a checkpoint may begin."""


# -- moments ---------------------------------------------------------------------------------------------------------


def at_step(step: int) -> Moment:
    """Once a step was taken."""
    return lambda scene: scene.files.step >= step


def while_saving(step: int) -> Moment:
    """In the middle of writing the checkpoint of a step; notes it when the writing was too quick."""

    def moment(scene: Scene) -> bool:
        if scene.files.step < step - 1:
            return False
        deadline = time.monotonic() + _SAVING_WITHIN_S
        while not scene.files.is_saving(step):  # a few dozen milliseconds: too short for the runner's own pace
            if scene.files.is_saved(step):
                scene.notes.append(f"the checkpoint of step {step} was complete before the fault")
                return True
            if time.monotonic() > deadline:
                return False
            time.sleep(_SPIN_S)
        return True

    return moment


def after(seconds: float) -> Moment:
    """Some time after the fault before."""
    return lambda scene: bool(scene.struck_at) and time.time() >= scene.struck_at[-1] + seconds


def saved(step: int) -> Moment:
    """Once the checkpoint of a step is complete."""
    return lambda scene: scene.files.is_saved(step)


# -- processes -------------------------------------------------------------------------------------------------------


def kill_leader(scene: Scene) -> None:
    """Rank 0, as the kernel's OOM killer would."""
    processes.kill([scene.leader()])


def kill_other(scene: Scene) -> None:
    """A rank that is not 0."""
    processes.kill(scene.others()[-1:])


def stop_other(scene: Scene) -> None:
    """A rank that is not 0 hangs for good."""
    scene.stop(scene.others()[-1])


def stop_leader(scene: Scene) -> None:
    """Rank 0 hangs for good."""
    scene.stop(scene.leader())


def slow_other(scene: Scene) -> None:
    """A rank that is not 0 gets a fifth of its time, as on a core that others use too."""
    scene.slow_down(scene.others()[-1])


def wake(scene: Scene) -> None:
    """What was stopped goes on where it was."""
    scene.wake()


def kill_driver(scene: Scene) -> None:
    """The command itself."""
    processes.kill(processes.of(DRIVER))


def terminate_driver(scene: Scene) -> None:
    """SIGTERM to the command, as `ray job stop` and a scheduler send it."""
    for process in processes.of(DRIVER):
        process.terminate()


def kill_node_of_leader(scene: Scene) -> None:
    """The raylet, the workers and all else of the node that rank 0 is on."""
    scene.cluster.kill(_node(scene, scene.leader().pid))


def kill_node_of_other(scene: Scene) -> None:
    """The same of a node that rank 0 is not on."""
    scene.cluster.kill(_node_of_other(scene))


def drain_node_of_other(scene: Scene) -> None:
    """SIGTERM to the node's `ray start`, as a spot machine's last notice: Ray drains it within 30 s."""
    scene.cluster.drain(_node_of_other(scene))


def kill_cluster(scene: Scene) -> None:
    """Every node, the head and with it the driver."""
    processes.kill(processes.of(DRIVER))
    scene.cluster.kill_all()


def lose_run_folder(scene: Scene) -> None:
    """The disk of the driver's machine goes with the cluster; what is in a bucket stays."""
    kill_cluster(scene)
    _lose_folder(scene)


def lose_driver(scene: Scene) -> None:
    """The driver and its disk; the nodes live, with what they keep of the run."""
    kill_driver(scene)
    _lose_folder(scene)


def _lose_folder(scene: Scene) -> None:
    assert scene.files.folder is not None, "the run has begun"
    assert scene.files.lost is not None
    shutil.move(scene.files.folder, scene.files.lost)


def add_nodes(scene: Scene) -> None:
    """The nodes that were lost come back."""
    scene.cluster.repair()


def kill_server(scene: Scene) -> None:
    """The MLflow server."""
    assert scene.server is not None
    scene.server.kill()


def start_server(scene: Scene) -> None:
    """The MLflow server comes back."""
    assert scene.server is not None
    scene.server.start()


def stop_objects(scene: Scene) -> None:
    """The object store takes requests and answers none."""
    for process in processes.of(OBJECTS):
        scene.stop(process)


# -- links -----------------------------------------------------------------------------------------------------------


def cut_node_of_other(scene: Scene) -> None:
    """The cable of a host that rank 0 is not on."""
    scene.cut(_node_of_other(scene))


def cut_node_of_leader(scene: Scene) -> None:
    """The cable of the host that rank 0 is on."""
    scene.cut(_node(scene, scene.leader().pid))


def heal_links(scene: Scene) -> None:
    """All cables are back."""
    scene.heal()


# -- disks and files -------------------------------------------------------------------------------------------------


def fill_disk(scene: Scene) -> None:
    """Leaves nothing free on the disk that checkpoints go to."""
    assert scene.storage is not None
    with (scene.storage / "filler").open("wb", buffering=0) as filler:
        try:
            while filler.write(b"\0" * (1 << 16)):
                pass
        except OSError:  # full, which is the point
            return


def truncate_newest(scene: Scene) -> None:
    """Cuts the largest file of the newest checkpoint to a half."""
    file = _largest(scene.files.newest_checkpoint())
    with file.open("r+b") as stream:
        stream.truncate(file.stat().st_size // 2)


def flip_bit_of_newest(scene: Scene) -> None:
    """Flips one bit in the middle of the largest file of the newest checkpoint."""
    file = _largest(scene.files.newest_checkpoint())
    with file.open("r+b") as stream:
        stream.seek(file.stat().st_size // 2)
        (byte,) = stream.read(1)
        stream.seek(-1, 1)
        stream.write(bytes([byte ^ 16]))


def remove_from_newest(scene: Scene) -> None:
    """Removes the largest file of the newest checkpoint."""
    _largest(scene.files.newest_checkpoint()).unlink()


def both(first: Fault, second: Fault) -> Fault:
    """One right after the other."""

    def fault(scene: Scene) -> None:
        first(scene)
        second(scene)

    return fault


def hide_runs(scene: Scene) -> None:
    """One host does not see the folder of runs, as where nobody mounted it."""
    scene.hide_runs(min(scene.cluster.layout.nodes))


def _node_of_other(scene: Scene) -> str:
    """A node with workers, but not rank 0; raises LookupError when there is none."""
    leaders = _node(scene, scene.leader().pid)
    found = {_node(scene, worker.pid) for worker in scene.others()} - {leaders}
    if not found:
        raise LookupError("all workers are on rank 0's node")
    return min(found)


def _largest(checkpoint: Path) -> Path:
    return max((path for path in checkpoint.rglob("*") if path.is_file()), key=lambda path: path.stat().st_size)


def _node(scene: Scene, pid: int) -> str:
    name = scene.cluster.node_of(pid)
    if name is None:
        raise LookupError(f"process {pid} is on no node")
    return name
