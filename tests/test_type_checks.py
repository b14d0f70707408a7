"""The checks of annotations that conftest.py switches on: all modules have them, and they refuse wrong shapes."""

import importlib.util
from typing import Any

import jax
import jax.numpy as jnp
import pytest
from jaxtyping import TypeCheckError

from arrays import inner
from dequantization.noise import Bins
from models.mlp import MLP
from models.score import ScoreModel
from sde_lib import VPSDE
from tests.test_structure import imports, parts


@pytest.mark.parametrize("part", sorted(parts()))
def test_every_module_is_checked(part):
    spec = importlib.util.find_spec(part)
    assert spec is not None
    assert type(spec.loader).__module__.startswith("jaxtyping")


def test_shapes_that_differ_are_refused():
    with pytest.raises(TypeCheckError, match=r"parameters of arrays\.inner"):
        inner(jnp.ones((3, 2)), jnp.ones((3, 4)))


def test_integers_are_refused_as_data():
    with pytest.raises(TypeCheckError, match="Float"):
        inner(jnp.ones((3, 2), jnp.int32), jnp.ones((3, 2), jnp.int32))


def test_fields_of_dataclasses_are_checked():
    levels: Any = 2.5
    with pytest.raises(TypeCheckError, match=r"Bins\.__init__"):
        Bins(levels, centered=True)


def test_checks_hold_under_jit():
    with pytest.raises(TypeCheckError, match=r"parameters of linear_sde\.SDE\.marginal"):
        jax.eval_shape(VPSDE().marginal, jnp.ones((3, 2)), jnp.ones(4))


def test_jax_may_fill_pytrees_with_placeholders():
    score_fn = ScoreModel(MLP(), VPSDE()).score_fn({}, jax.random.key(0))
    assert jax.tree.map(lambda leaf: "placeholder", score_fn).dropout_key == "placeholder"


def test_an_int_is_a_float():
    assert VPSDE(beta_min=0, beta_max=20).beta_max == 20


def test_no_module_needs_the_checker():
    assert [part for part, files in parts().items() if any("beartype" in imports(path) for path in files)] == []
