"""The compilation cache in folders that cannot be written, and switched off."""

import jax
import pytest

from infra.startup import use_compilation_cache

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
