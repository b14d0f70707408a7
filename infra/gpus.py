"""Descriptions of GPUs, for which XLA compiles programs on a machine without one.

The descriptions have the values that XLA's compiler reads. Sources: NVIDIA's data sheets, and the descriptions in the
folder xla/backends/gpu/target_config/specs of openxla/xla.
"""

import importlib.util
from typing import NamedTuple

import numpy as np
from jax.experimental import topologies
from jax.sharding import Mesh


class Gpu(NamedTuple):
    """A model of GPU. Sizes are in bytes, and the rates are in bytes per second and GHz."""

    name: str
    compute_capability: tuple[int, int]
    cores: int
    """Streaming multiprocessors."""
    lanes: int
    """Units for 32-bit floats in each core."""
    threads: int
    """Threads that a core holds."""
    shared_memory: int
    """Shared memory of each core, in bytes. A block can use 1024 bytes less."""
    l2_cache: int
    memory: int
    bandwidth: int
    clock: float

    @property
    def usable_gb(self) -> float:
        """The memory in GB that JAX takes by default."""
        return 0.75 * self.memory / 1e9

    def target(self) -> str:
        """Returns the description in the text format of XLA's GpuTargetConfigProto."""
        major, minor = self.compute_capability
        return f"""
            platform_name: "CUDA"
            device_description_str: "{self.name}"
            dnn_version_info {{ major: 9 minor: 10 patch: 0 }}
            gpu_device_info {{
                cuda_compute_capability {{ major: {major} minor: {minor} }}
                core_count: {self.cores}
                fpus_per_core: {self.lanes}
                threads_per_core_limit: {self.threads}
                threads_per_block_limit: 1024
                threads_per_warp: 32
                block_dim_limit_x: 2147483647
                block_dim_limit_y: 65535
                block_dim_limit_z: 65535
                registers_per_core_limit: 65536
                registers_per_block_limit: 65536
                shared_memory_per_core: {self.shared_memory}
                shared_memory_per_block: 49152
                shared_memory_per_block_optin: {self.shared_memory - 1024}
                l2_cache_size: {self.l2_cache}
                device_memory_size: {self.memory}
                memory_bandwidth: {self.bandwidth}
                clock_rate_ghz: {self.clock}
            }}"""


_HOPPER = ((9, 0), 132, 128, 2048, 233_472, 52_428_800)
_A100 = ((8, 0), 108, 64, 2048, 167_936, 41_943_040)

GPUS = {
    "h100": Gpu("NVIDIA H100 80GB HBM3", *_HOPPER, 84_942_979_072, 3_352_320_000_000, 1.98),
    "h200": Gpu("NVIDIA H200", *_HOPPER, 151_397_597_184, 4_800_000_000_000, 1.98),
    "a100": Gpu("NVIDIA A100-SXM4-80GB", *_A100, 85_100_068_864, 2_039_040_000_000, 1.41),
    "a100-40": Gpu("NVIDIA A100-SXM4-40GB", *_A100, 42_331_013_120, 1_555_200_000_000, 1.41),
    "a6000": Gpu("NVIDIA RTX A6000", (8, 6), 84, 128, 1536, 102_400, 6_291_456, 51_041_271_808, 768_096_000_000, 1.8),
}
"""The GPUs that cost.device may name."""


PLUGINS = ("jax_cuda13_plugin", "jax_cuda12_plugin")
"""The packages with which JAX compiles for GPUs; one of them must be installed."""


def gpu_by_name(name: str) -> Gpu:
    """Returns the GPU that cost.device names.

    Raises:
        ValueError: for an unknown name.
    """
    if name not in GPUS:
        raise ValueError(f"cost.device is {name!r}; known: {', '.join(GPUS)}, or '' for the devices of this machine")
    return GPUS[name]


def mesh_of(gpu: Gpu, count: int = 1) -> Mesh:
    """Returns GPUs of one machine along the axis "data", for which programs can be compiled but not run.

    Raises:
        ValueError: if JAX is installed without its packages for GPUs, or does not load them.
    """
    if not any(map(importlib.util.find_spec, PLUGINS)):
        raise ValueError(
            "cost.device needs JAX's packages for CUDA, which are not installed: pip install -r requirements-gpu.txt "
            "(6 GB; a GPU is not needed)"
        )
    try:
        topology = topologies.get_topology_desc("", "cuda", topology=f"1x1x{count}", target_config=gpu.target())
    except NotImplementedError as error:
        raise ValueError(
            "cost.device cannot load JAX's packages for CUDA; on a machine without a GPU, set JAX_PLATFORMS=cpu"
        ) from error
    return Mesh(np.array(topology.devices), ("data",))
