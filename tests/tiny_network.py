"""A score network of two convolutions, for tests of what is around the network.

Its training step compiles in a tenth of the time of the smallest NCSN++, at order 3 in a thirtieth.

    python -m tests.tiny_network --config=... --mode=...    # main.py with this network
"""

import contextlib
from collections.abc import Iterator
from unittest import mock

import flax.linen as nn
import jax.numpy as jnp
from jaxtyping import Array, Float

from arrays import Batch, PerExample, append_dims
from configs.default import Config
from models.layers import conv
from models.ncsnpp import ncsnpp_from_config
from models.score import NETWORKS


class TinyNetwork(nn.Module):
    """Two convolutions, the first of which knows the noise level; called as an NCSN++ is."""

    nf: int
    scale_by_sigma: bool

    @nn.compact
    def __call__(self, x: Float[Array, "batch h w c"], labels: PerExample, train: bool) -> Batch:
        level = jnp.log(labels) if self.scale_by_sigma else labels / 999
        embedding = nn.Dense(self.nf)(level[:, None])
        h = nn.swish(conv(self.nf)(x) + embedding[:, None, None, :])
        h = conv(x.shape[-1], init_scale=0.0)(h)
        return h / append_dims(labels, h) if self.scale_by_sigma else h


def tiny_from_config(config: Config) -> TinyNetwork:
    """Builds the network. Raises ValueError for fields that NCSN++ does not allow."""
    network = ncsnpp_from_config(config)
    return TinyNetwork(network.nf, network.scale_by_sigma)


@contextlib.contextmanager
def tiny_network() -> Iterator[None]:
    """Puts the tiny network in the place of NCSN++."""
    with mock.patch.dict(NETWORKS, ncsnpp=tiny_from_config):
        yield


if __name__ == "__main__":
    import main

    with tiny_network():
        main.app.run(main.main, flags_parser=main._parse_flags)
