"""Settings of all tests: four devices on one machine, no silent broadcasting, checked annotations, cached programs."""

import gc
import os
from collections.abc import Iterator
from importlib.metadata import version
from pathlib import Path

# JAX reads these when it first looks at its devices. The programs of the tests are small, so most optimisations would
# take longer than they save. Without LLVM's optimisations (level 0), they compile in a third of the time; with the
# older code generator of fusions, and one module for each program, in two thirds of that. Version 0.11 has only the new
# code generator, and ends the process at a flag that it does not know.
os.environ["XLA_FLAGS"] = (
    f"{os.environ.get('XLA_FLAGS', '')} --xla_force_host_platform_device_count=4 --xla_backend_optimization_level=0"
    f"{' --xla_cpu_use_fusion_emitters=false' if version('jaxlib').startswith('0.10.') else ''}"
    " --xla_cpu_parallel_codegen_split_count=1"
    " --xla_cpu_experimental_ynn_fusion_type=-LIBRARY_FUSION_TYPE_INDIVIDUAL_CONVOLUTION"  # as main.py sets it
)
os.environ.setdefault("JAX_PLATFORMS", "cpu")
os.environ.setdefault("JAX_COMPILATION_CACHE_DIR", str(Path(__file__).parent.parent / ".cache" / "jax"))
os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "0")  # the workers share small programs too
# There is one worker for each core. More threads of NumPy's matrix routines wait for each other: on a busy machine, a
# test took a minute instead of a second.
os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")

import jax
import jaxtyping
import pytest

from tests.type_checks import check_annotations

jax.config.update("jax_numpy_rank_promotion", "raise")
check_annotations()  # before a test imports one of the modules
gc.set_threshold(50_000)  # tracing makes many objects, few of which can be freed

SLOW = {
    "test_baselines",
    "test_batch_size",
    "test_bits_per_dim",
    "test_bound_likelihood",
    "test_checkpoints",
    "test_control_modes",
    "test_controllable",
    "test_cost",
    "test_density_grid",
    "test_dequantization",
    "test_dequantizer_training",
    "test_derivatives",
    "test_devices",
    "test_diagnostics",
    "test_discrete",
    "test_entropy",
    "test_examples",
    "test_extending",
    "test_flowpp",
    "test_fuzz",
    "test_golden",
    "test_hosts",
    "test_idode",
    "test_langevin",
    "test_likelihood",
    "test_losses",
    "test_models",
    "test_ode",
    "test_ode_score",
    "test_points",
    "test_published_checkpoints",
    "test_published_runs",
    "test_refinenet",
    "test_report",
    "test_run_lib",
    "test_samples",
    "test_sampling",
    "test_sde_density",
    "test_sde_lib",
    "test_sliced",
    "test_tfds_folders",
    "test_train_state",
    "test_unbiased_orders",
    "test_usage",
    "test_vdm",
    "test_waiting",
}
"""Files whose tests compile much, or run main.py. `make check` leaves them out."""


@pytest.fixture
def unchecked() -> Iterator[None]:
    """Switches the checks of annotations off, for tests that pass wrong types to see how they are refused."""
    jaxtyping.config.update("jaxtyping_disable", True)
    yield
    jaxtyping.config.update("jaxtyping_disable", False)


@pytest.fixture
def stop_requested() -> Iterator[None]:
    """Asks the loops to stop, as a signal does."""
    from infra import stop

    stop.request()
    yield
    stop.clear()


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        if item.path.stem in SLOW:
            item.add_marker(pytest.mark.slow)
