"""A score network of two convolutions, a dequantizer and a classifier of one, for tests of what is around them.

The training step of the score network compiles in a tenth of the time of the smallest NCSN++, at order 3 in a
thirtieth.

    python -m tests.tiny_network --config=... --mode=...    # main.py with this network
"""

import contextlib
from collections.abc import Iterator
from unittest import mock

import flax.linen as nn
import jax
import jax.numpy as jnp
from jaxtyping import Array, Int

from arrays import Batch, PerExample, append_dims
from configs.default import Config
from dequantization import variational
from evaluators import class_training
from models.flowpp import Flowpp, flowpp_from_config
from models.layers import conv
from models.ncsnpp import ncsnpp_from_config
from models.resample import FeatureMap
from models.score import IMAGE_NETWORKS
from models.wideresnet import Logits, WideResnet


class TinyNetwork(nn.Module):
    """Two convolutions, the first of which knows the noise level; called as an NCSN++ is."""

    nf: int
    scale_by_sigma: bool
    num_classes: int

    @nn.compact
    def __call__(
        self, x: FeatureMap, labels: PerExample, train: bool, classes: Int[Array, " batch"] | None = None
    ) -> Batch:
        level = jnp.log(labels) if self.scale_by_sigma else labels / 999
        embedding = nn.Dense(self.nf)(level[:, None])
        if self.num_classes:
            classes = jnp.full(labels.shape, self.num_classes) if classes is None else classes
            embedding += nn.Embed(self.num_classes + 1, self.nf, name="class_embedding")(classes)
        h = nn.swish(conv(self.nf)(x) + embedding[:, None, None, :])
        h = conv(x.shape[-1], init_scale=0.0)(h)
        return h / append_dims(labels, h) if self.scale_by_sigma else h


def tiny_from_config(config: Config) -> TinyNetwork:
    """Builds the network. Raises ValueError for fields that NCSN++ does not allow."""
    network = ncsnpp_from_config(config)
    return TinyNetwork(network.nf, network.scale_by_sigma, network.num_classes)


@contextlib.contextmanager
def tiny_network() -> Iterator[None]:
    """Puts the tiny network in the place of NCSN++."""
    with mock.patch.dict(IMAGE_NETWORKS, ncsnpp=tiny_from_config):
        yield


class TinyFlow(Flowpp):
    """A dequantizer whose logits are normal, with a mean and a scale from one convolution of the image."""

    @nn.compact
    def __call__(self, gaussian: FeatureMap, unit: FeatureMap, train: bool) -> tuple[FeatureMap, PerExample]:
        mean, log_scale = jnp.split(nn.Conv(2 * gaussian.shape[-1], (3, 3))(unit - 0.5), 2, axis=-1)
        logits = mean + jnp.exp(log_scale) * gaussian
        log_normal = jax.scipy.stats.norm.logpdf(gaussian) - log_scale
        slopes = jax.nn.log_sigmoid(logits) + jax.nn.log_sigmoid(-logits)
        return jax.nn.sigmoid(logits), jnp.sum(log_normal - slopes, axis=(1, 2, 3))


def tiny_flow_from_config(deq: Config) -> TinyFlow:
    """Builds the dequantizer. Raises ValueError for fields that Flow++ does not allow."""
    flow = flowpp_from_config(deq)
    return TinyFlow(flow.filters, flow.components, flow.blocks, flow.heads)


@contextlib.contextmanager
def tiny_flow() -> Iterator[None]:
    """Puts the tiny dequantizer in the place of Flow++."""
    with mock.patch.object(variational, "flowpp_from_config", tiny_flow_from_config):
        yield


class TinyClassifier(WideResnet):
    """A classifier of noisy images by their means after one convolution."""

    @nn.compact
    def __call__(self, x: FeatureMap, sigmas: PerExample) -> Logits:
        level = nn.Dense(4)(jnp.log(sigmas)[:, None])
        h = nn.relu(nn.Conv(4, (3, 3))(x) + level[:, None, None, :])
        return nn.Dense(self.num_outputs)(h.mean((1, 2)))


@contextlib.contextmanager
def tiny_classifier() -> Iterator[None]:
    """Puts the tiny classifier in the place of the wide residual network."""
    with mock.patch.object(class_training, "WideResnet", TinyClassifier):
        yield


if __name__ == "__main__":
    import main

    with tiny_network():
        main.app.run(main.main, flags_parser=main._parse_flags)
