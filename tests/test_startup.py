"""The compilation cache in folders that cannot be written, and switched off; the library for convolutions on CPUs."""

import os
import subprocess
import sys

import jax
import pytest

from infra.startup import use_compilation_cache, use_fast_convolutions

OPTIONS = ("enable_compilation_cache", "compilation_cache_dir", "persistent_cache_min_compile_time_secs")


@pytest.fixture
def cache_options():
    """Returns a function that reads the options of the cache, which are restored after the test."""
    before = {f"jax_{name}": getattr(jax.config, f"jax_{name}") for name in OPTIONS}
    yield lambda: [getattr(jax.config, name) for name in before]
    for name, value in before.items():
        jax.config.update(name, value)


@pytest.mark.parametrize("exists", [True, False])
def test_a_cache_that_cannot_be_written_is_only_read(exists, cache_options, tmp_path, monkeypatch, caplog):
    (tmp_path / "file").touch()
    folder = "/proc" if exists else str(tmp_path / "file" / "cache")  # not even root can write into these
    monkeypatch.delenv("JAX_ENABLE_COMPILATION_CACHE", raising=False)
    monkeypatch.setenv("JAX_COMPILATION_CACHE_DIR", folder)
    use_compilation_cache()
    assert cache_options() == [exists, folder, float("inf")]
    (record,) = caplog.records
    assert record.getMessage().startswith("Cannot write the compilation cache: ")
    assert folder in record.getMessage()


@pytest.mark.parametrize(("variable", "use", "used"), [("False", True, False), ("1", True, True), ("", False, False)])
def test_the_environment_can_switch_the_cache_off(variable, use, used, cache_options, tmp_path, monkeypatch):
    monkeypatch.setenv("JAX_ENABLE_COMPILATION_CACHE", variable)
    monkeypatch.setenv("JAX_COMPILATION_CACHE_DIR", str(tmp_path / "new" / "cache"))
    use_compilation_cache(use)
    assert cache_options()[:2] == [used, str(tmp_path / "new" / "cache")]
    assert (tmp_path / "new").exists() == used


CONVOLUTION = """
import jax, jax.numpy as jnp, infra.startup
{set_up}
convolution = jax.jit(lambda x, kernel: jax.lax.conv(x, kernel, (1, 1), "SAME"))
print("__ynn_fusion" in convolution.lower(jnp.ones((8, 32, 8, 8)), jnp.ones((32, 32, 3, 3))).compile().as_text())
"""


@pytest.mark.parametrize(("set_up", "ynn"), [("", True), ("infra.startup.use_fast_convolutions()", False)])
def test_convolutions_on_cpus_are_not_left_to_the_slow_library(set_up, ynn):
    environment = {**os.environ, "XLA_FLAGS": "", "JAX_ENABLE_COMPILATION_CACHE": "false"}
    code = CONVOLUTION.format(set_up=set_up)
    found = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=True)
    assert found.stdout.strip() == str(ynn)


def test_a_user_can_choose_the_library_for_convolutions(monkeypatch):
    monkeypatch.setenv("XLA_FLAGS", "--xla_cpu_experimental_ynn_fusion_type= --xla_dump_to=x")
    use_fast_convolutions()
    assert os.environ["XLA_FLAGS"] == "--xla_cpu_experimental_ynn_fusion_type= --xla_dump_to=x"
    monkeypatch.setenv("XLA_FLAGS", "--xla_dump_to=x")
    use_fast_convolutions()
    assert os.environ["XLA_FLAGS"].startswith("--xla_dump_to=x --xla_cpu_experimental_ynn_fusion_type=-")
