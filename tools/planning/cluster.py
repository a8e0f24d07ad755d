"""What a cluster offers: memory, arithmetic, links. Vendors' data sheets, one direction of a link; all can be given."""

from dataclasses import dataclass, replace

from megabagel.training.flops import peak_tflops


@dataclass(frozen=True)
class Cluster:
    """`gpus` devices in nodes of `per_node`, which NVLink connects. Bytes, FLOP/s and bytes per second of one device.

    `network` is the device's share of its node's network cards.
    """

    gpu: str
    gpus: int
    memory: float
    peak: float  # dense bf16
    bandwidth: float  # of its memory
    nvlink: float
    network: float
    per_node: int = 8

    def ring(self, ranks: float, stride: int) -> float:
        """Bytes per second that each of `ranks` devices sends in a ring over all of them, `stride` devices apart.

        Beyond a node, the group's members in it send through all their network cards at once.
        """
        inside = max(1, self.per_node // stride)
        return self.nvlink if ranks <= inside else min(self.nvlink, inside * self.network)

    def exchange(self, ranks: float, stride: int) -> float:
        """The same of an all-to-all: what leaves the node goes through the device's own network card."""
        inside = max(1, self.per_node // stride)
        if ranks <= inside:
            return self.nvlink
        across = (ranks - inside) / (ranks - 1)
        return 1 / (across / self.network + (1 - across) / self.nvlink)


# memory in GB, memory bandwidth in TB/s, NVLink and network in GB/s, devices per node
_DATA_SHEETS = {
    "A100": (80, 2.0, 300, 25, 8),
    "A800": (80, 2.0, 200, 25, 8),
    "H100": (80, 3.35, 450, 50, 8),
    "H800": (80, 3.35, 200, 50, 8),
    "H200": (141, 4.8, 450, 50, 8),
    "H20": (96, 4.0, 450, 50, 8),
    "B200": (180, 7.7, 900, 50, 8),
    "GB200": (186, 8.0, 900, 50, 72),
    "L40S": (48, 0.86, 32, 25, 8),
}
GPUS = tuple(_DATA_SHEETS)


def cluster_of(gpu: str, gpus: int, **given: float | None) -> Cluster:
    """The cluster by its GPU's name; `given` fields that are not None replace the data sheet's.

    Raises ValueError with one sentence where the name is unknown and something that the data sheet says is missing.
    """
    known = {name: value for name, value in given.items() if value is not None}
    if gpu in _DATA_SHEETS:
        memory, bandwidth, nvlink, network, per_node = _DATA_SHEETS[gpu]
        peak = peak_tflops(gpu, "bf16") * 1e12
        sheet = Cluster(gpu, gpus, memory * 1e9, peak, bandwidth * 1e12, nvlink * 1e9, network * 1e9, per_node)
        return replace(sheet, **known)
    needed = [name for name in ("memory", "peak", "bandwidth", "nvlink", "network") if name not in known]
    if needed:
        raise ValueError(
            f"--gpu {gpu} is not in the table ({', '.join(GPUS)}); give one of those, or all of --memory, --peak, "
            f"--bandwidth, --nvlink and --network."
        )
    return Cluster(gpu, gpus, **known)
