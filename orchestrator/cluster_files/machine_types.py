"""Machine types of the clouds that cluster files name, and what an hour of one costs by the device catalogue.

Read by `check` (prices) and `render` (which type gives so many GPUs). The types are those of the clouds' own lists
(AWS "Accelerated computing", Google "GPU machine types", Azure "GPU accelerated sizes"), from memory, November 2026:
GPUs of a node, its virtual cores and its memory. A test compares those of AWS with the names botocore knows.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

from orchestrator.errors import SpecError
from orchestrator.planning.hardware import Device, catalogue, find_device

Cloud = Literal["aws", "gcp", "azure"]


@dataclass(frozen=True, kw_only=True)
class MachineType:
    """One kind of machine of a cloud."""

    cloud: Cloud
    name: str
    gpus: int
    device: str
    """Name in the device catalogue; of a machine without a GPU `cpu`."""
    cpus: int
    """Virtual cores."""
    memory_gib: float

    @property
    def usd_per_hour(self) -> float | None:
        """What it costs on demand: its GPUs, or its cores, at the catalogue's price; None where no price is known.

        A GPU's price there holds its share of the machine.
        """
        price = catalogue()[self.device].usd_per_hour
        return None if price is None else price * (self.gpus or self.cpus)


def _types(cloud: Cloud, *rows: tuple[str, int, str, int, float]) -> tuple[MachineType, ...]:
    return tuple(
        MachineType(cloud=cloud, name=name, gpus=gpus, device=device, cpus=cpus, memory_gib=memory)
        for name, gpus, device, cpus, memory in rows
    )


MACHINE_TYPES = (
    *_types(
        "aws",
        ("m7i.xlarge", 0, "cpu", 4, 16),
        ("g4dn.xlarge", 1, "T4", 4, 16),
        ("g4dn.12xlarge", 4, "T4", 48, 192),
        ("g5.xlarge", 1, "A10G", 4, 16),
        ("g5.12xlarge", 4, "A10G", 48, 192),
        ("g5.48xlarge", 8, "A10G", 192, 768),
        ("g6.xlarge", 1, "L4", 4, 16),
        ("g6.12xlarge", 4, "L4", 48, 192),
        ("g6.48xlarge", 8, "L4", 192, 768),
        ("g6e.xlarge", 1, "L40S", 4, 32),
        ("g6e.12xlarge", 4, "L40S", 48, 384),
        ("g6e.48xlarge", 8, "L40S", 192, 1536),
        ("p3.2xlarge", 1, "V100-16GB", 8, 61),
        ("p3.8xlarge", 4, "V100-16GB", 32, 244),
        ("p3.16xlarge", 8, "V100-16GB", 64, 488),
        ("p3dn.24xlarge", 8, "V100-32GB", 96, 768),
        ("p4d.24xlarge", 8, "A100-40GB", 96, 1152),
        ("p4de.24xlarge", 8, "A100-80GB", 96, 1152),
        ("p5.48xlarge", 8, "H100-80GB", 192, 2048),
        ("p5en.48xlarge", 8, "H200", 192, 2048),
        ("p6-b200.48xlarge", 8, "B200", 192, 2048),
        ("p6-b300.48xlarge", 8, "B300", 192, 4096),
    ),
    *_types(
        "gcp",
        ("e2-standard-4", 0, "cpu", 4, 16),
        ("g2-standard-4", 1, "L4", 4, 16),
        ("g2-standard-24", 2, "L4", 24, 96),
        ("g2-standard-48", 4, "L4", 48, 192),
        ("g2-standard-96", 8, "L4", 96, 384),
        ("a2-highgpu-1g", 1, "A100-40GB", 12, 85),
        ("a2-highgpu-4g", 4, "A100-40GB", 48, 340),
        ("a2-highgpu-8g", 8, "A100-40GB", 96, 680),
        ("a2-ultragpu-1g", 1, "A100-80GB", 12, 170),
        ("a2-ultragpu-4g", 4, "A100-80GB", 48, 680),
        ("a2-ultragpu-8g", 8, "A100-80GB", 96, 1360),
        ("a3-highgpu-8g", 8, "H100-80GB", 208, 1872),
        ("a3-ultragpu-8g", 8, "H200", 224, 2952),
        ("a4-highgpu-8g", 8, "B200", 224, 3968),
    ),
    *_types(
        "azure",
        ("Standard_D4s_v5", 0, "cpu", 4, 16),
        ("Standard_NC4as_T4_v3", 1, "T4", 4, 28),
        ("Standard_NC64as_T4_v3", 4, "T4", 64, 440),
        ("Standard_NV36ads_A10_v5", 1, "A10G", 36, 440),
        ("Standard_NC24ads_A100_v4", 1, "A100-80GB", 24, 220),
        ("Standard_NC48ads_A100_v4", 2, "A100-80GB", 48, 440),
        ("Standard_NC96ads_A100_v4", 4, "A100-80GB", 96, 880),
        ("Standard_ND96asr_v4", 8, "A100-40GB", 96, 900),
        ("Standard_ND96amsr_A100_v4", 8, "A100-80GB", 96, 1900),
        ("Standard_ND96isr_H100_v5", 8, "H100-80GB", 96, 1900),
        ("Standard_ND96isr_H200_v5", 8, "H200", 96, 1850),
    ),
)


def find_machine_type(cloud: str, name: str) -> MachineType | None:
    """The machine type of a cloud by its name; None where this project does not know it."""
    return next((one for one in MACHINE_TYPES if (one.cloud, one.name) == (cloud, name)), None)


@dataclass(frozen=True, kw_only=True)
class Machines:
    """So many machines of one type."""

    type: MachineType
    count: int


def choose_machines(cloud: Cloud, *, gpu: str, gpus: int) -> Machines:
    """The fewest machines of a cloud that have so many of a GPU; of equally many, those with the fewest GPUs.

    Raises SpecError for an unknown device, and for one that the cloud has not in any type known here.
    """
    device = find_device(gpu)
    offered = [one for one in MACHINE_TYPES if one.cloud == cloud and one.device == device.name and one.gpus]
    if not offered:
        names = dict.fromkeys(one.device for one in MACHINE_TYPES if one.cloud == cloud and one.gpus)
        raise SpecError(
            f"no machine type of {cloud} with this GPU is known here",
            got=f"--gpu {gpu}" if gpu == device.name else f"--gpu {gpu} ({device.name})",
            allowed=", ".join(names),
            do="choose another GPU or provider, or render one of these and write the machine type into the file",
        )
    best = min(offered, key=lambda one: (math.ceil(gpus / one.gpus), one.gpus))
    return Machines(type=best, count=math.ceil(gpus / best.gpus))


def gpus_of_a_node(device: Device) -> int:
    """GPUs assumed in a machine where no cloud's list says it: 8, as in servers with NVLink, and 4 of cards on PCIe.

    A guess at usual servers; the file that is written says what it counts on.
    """
    return 8 if (device.node_gb_s or 0) > _PCIE_GB_S else 4


_PCIE_GB_S = 25
"""GB/s of PCIe 4 x16, as the catalogue has it for cards without a link of their own."""
