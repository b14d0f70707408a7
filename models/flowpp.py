"""Flow++ as a dequantizer: a flow q(u | image) of noise u in (0, 1)^d, with both published architectures.

Standard normal noise is split into its even and its odd columns. Couplings transform one half given the other half and
the image, by mixtures of logistics. A sigmoid maps the result to (0, 1). Parameters have the published names, flat in
each module, and the published shapes. In these, the two spatial axes of the kernel are swapped for plain convolutions,
but not for weight-normalised ones.

Initial parameters depend on data: on the batch that they are initialised with, the output of each layer has mean 0 and
a fixed standard deviation (Salimans & Kingma, 2016).

Source: Ho et al., "Flow++: Improving Flow-Based Generative Models with Variational Dequantization and Architecture
Design", ICML 2019.
"""

import math
from typing import Any, TypeAlias

import flax.linen as nn
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from arrays import Batch, PerExample, inner
from configs.default import Config
from models.flowpp_layers import (
    SMALL_OUTPUT,
    concat_elu,
    conv,
    gated_attention,
    gated_conv,
    layer_norm,
    nin,
    normed_conv,
    position_embedding,
    with_leading_axes,
)
from models.resample import FeatureMap, SameSize

Halves: TypeAlias = tuple[FeatureMap, FeatureMap]
"""The even and the odd columns of images, each [batch, height, width / 2, channel]."""

CONTEXT_CHANNELS = 32
"""Channels of the image features that the couplings see."""

PROCESSOR_HEADS = 4
"""Heads of the attention in the deep processor. The couplings may have another number."""


class ShallowProcessor(nn.Module):
    """Features of the image for the couplings, of the CIFAR-10 architecture."""

    dropout: float

    @nn.compact
    def __call__(self, image: FeatureMap, train: bool) -> SameSize:
        dropout = nn.Dropout(self.dropout, deterministic=not train)
        h = conv(self, "proj", image, CONTEXT_CHANNELS)
        for number in range(3):
            h += gated_conv(self, f"c{number}_", h, None, conv, conv, dropout)
        return h


class DeepProcessor(nn.Module):
    """Features of the image for the couplings, of the ImageNet architectures."""

    dropout: float
    blocks: int
    attention: bool

    @nn.compact
    def __call__(self, image: FeatureMap, train: bool) -> SameSize:
        dropout = nn.Dropout(self.dropout, deterministic=not train)
        h = normed_conv(self, "proj", image, CONTEXT_CHANNELS)
        positions = position_embedding(self, "pos_emb_dq", h, CONTEXT_CHANNELS) if self.attention else None
        for number in range(self.blocks):
            change = gated_conv(self, f"c{number}_", h, None, normed_conv, normed_conv, dropout)
            h = layer_norm(self, f"dqln{number}", h + change)
            if positions is not None:
                change = gated_attention(self, f"dqattn{number}_", h, positions, PROCESSOR_HEADS, dropout)
                h = layer_norm(self, f"ln{number}", h + change)
        return h


class Norm(nn.Module):
    """Scales and shifts each entry of both halves."""

    @nn.compact
    def __call__(self, halves: Halves) -> tuple[Halves, PerExample]:
        results = [self._normalize(number, half) for number, half in enumerate(halves)]
        (even, _), (odd, _) = results
        log_det = sum(log_det for _, log_det in results)
        return (even, odd), jnp.full(len(even), log_det)

    def _normalize(self, number: int, x: FeatureMap) -> tuple[FeatureMap, Array]:
        g = self.param(f"norm{number}_g", lambda key: jax.lax.rsqrt(jnp.var(x, axis=0) + 1e-8))
        g = jnp.maximum(g, 1e-10)
        h = x * with_leading_axes(g, x)
        b = self.param(f"norm{number}_b", lambda key: -jnp.mean(h, axis=0))
        return h + with_leading_axes(b, x), jnp.sum(jnp.log(g))


class Pointwise(nn.Module):
    """The same invertible map of the channels at every pixel, one for each half; at first a rotation or reflection."""

    @nn.compact
    def __call__(self, halves: Halves) -> tuple[Halves, PerExample]:
        even, odd = halves
        channels, pixels = even.shape[-1], even.shape[1] * even.shape[2]
        orthogonal = nn.initializers.orthogonal()
        weights = [self.param(f"W{number}", orthogonal, (channels, channels), even.dtype) for number in range(2)]
        log_det = pixels * sum(jnp.linalg.slogdet(weight)[1] for weight in weights)
        return (even @ weights[0], odd @ weights[1]), jnp.full(len(even), log_det)


def mixture_of_logistics(x: Batch, raw: Float[Array, "batch *dims parameters"]) -> tuple[Batch, PerExample]:
    """exp(s) logit(F(x)) + t, F the distribution function of a mixture of logistics; and ln |det| of its Jacobian.

    Args:
        raw: for each entry of x the numbers artanh(s), t, and K logits, means and log-widths of the mixture.
    """
    log_scale, shift = jnp.tanh(raw[..., 0]), raw[..., 1]
    logits, means, log_widths = jnp.split(raw[..., 2:], 3, axis=-1)
    log_weights = jax.nn.log_softmax(logits)
    z = (x[..., None] - means) * jnp.exp(-log_widths)
    log_below, log_above = jax.nn.log_sigmoid(z), jax.nn.log_sigmoid(-z)
    log_cdf = jax.nn.logsumexp(log_weights + log_below, axis=-1)
    log_survival = jax.nn.logsumexp(log_weights + log_above, axis=-1)
    log_pdf = jax.nn.logsumexp(log_weights + log_below + log_above - log_widths, axis=-1)
    log_derivative = log_scale + log_pdf - log_cdf - log_survival
    return jnp.exp(log_scale) * (log_cdf - log_survival) + shift, jnp.sum(log_derivative, axis=range(1, x.ndim))


class MixLogisticAttnCoupling(nn.Module):
    """Transforms one half by `mixture_of_logistics`, whose parameters a network computes from the other half."""

    filters: int
    components: int
    blocks: int
    heads: int
    dropout: float
    weight_norm: bool
    attention: bool

    @nn.compact
    def __call__(
        self, given: FeatureMap, x: FeatureMap, context: SameSize, train: bool
    ) -> tuple[FeatureMap, PerExample]:
        raw = self._network(given, context, train)
        return mixture_of_logistics(x, raw.reshape(*x.shape, -1))

    def _network(self, given: FeatureMap, context: SameSize, train: bool) -> SameSize:
        dropout = nn.Dropout(self.dropout, deterministic=not train)
        spatial = normed_conv if self.weight_norm else conv
        positions = position_embedding(self, "pos_emb", given, self.filters) if self.attention else None
        h = spatial(self, "c1" if self.weight_norm else "proj_in", given, self.filters)
        for block in (f"block{number}" for number in range(self.blocks)):
            change = gated_conv(self, f"{block}_conv_", h, context, spatial, nin, dropout)
            h = layer_norm(self, f"{block}_ln1", h + change)
            if positions is not None:
                change = gated_attention(self, f"{block}_attn_", h, positions, self.heads, dropout)
                h = layer_norm(self, f"{block}_ln2", h + change)
        outputs, last = given.shape[-1] * (2 + 3 * self.components), f"block{self.blocks - 1}"
        if self.weight_norm:
            return normed_conv(self, f"{last}_c2", concat_elu(h), outputs, init_scale=SMALL_OUTPUT)
        return conv(self, f"{last}_proj_out", h, outputs, init_scale=SMALL_OUTPUT)


class Flowpp(nn.Module):
    """Maps standard normal noise and images to noise in (0, 1), with its log-density.

    Raises:
        ValueError: a field is out of its range, or the images have an odd number of columns.
    """

    filters: int = 96
    components: int = 32  # logistics in a mixture
    blocks: int = 2  # in the network of each coupling
    heads: int = 4
    dropout: float = 0.0
    couplings: int = 4
    deep: bool = False  # the ImageNet architectures: weight normalisation, a deep processor, no pointwise maps
    processor_blocks: int = 8  # blocks of a deep processor
    attention: bool = True  # in the couplings and in a deep processor

    def __post_init__(self) -> None:
        _check_fields(self)
        super().__post_init__()

    @nn.compact
    def __call__(self, gaussian: FeatureMap, unit: FeatureMap, train: bool) -> tuple[FeatureMap, PerExample]:
        """Noise u and ln q(u | image) in nats.

        Args:
            gaussian: standard normal noise, shaped as the images.
            unit: the images, their levels scaled to [0, 1].
        """
        if gaussian.shape[2] % 2:
            raise ValueError(f"images have {gaussian.shape[2]} columns; the dequantizer needs an even number")
        if self.deep:
            processor = DeepProcessor(self.dropout, self.processor_blocks, self.attention)
        else:
            processor = ShallowProcessor(self.dropout)
        context = processor(jnp.concatenate(split_columns(unit - 0.5), axis=-1), train)
        halves, log_det = self._flow(split_columns(gaussian), context, train)
        logits = join_columns(halves)
        slopes = jax.nn.log_sigmoid(logits) + jax.nn.log_sigmoid(-logits)
        dims = gaussian[0].size
        log_normal = -0.5 * (inner(gaussian, gaussian) + dims * math.log(2 * math.pi))
        return jax.nn.sigmoid(logits), log_normal - log_det - jnp.sum(slopes, axis=(1, 2, 3))

    def _flow(self, halves: Halves, context: SameSize, train: bool) -> tuple[Halves, PerExample]:
        log_det = jnp.zeros(len(context), context.dtype)
        for _ in range(self.couplings):
            for layer in [Norm()] if self.deep else [Norm(), Pointwise()]:
                halves, change = layer(halves)
                log_det += change
            coupling = MixLogisticAttnCoupling(
                self.filters, self.components, self.blocks, self.heads, self.dropout, self.deep, self.attention
            )
            given, x = halves
            x, change = coupling(given, x, context, train)
            halves, log_det = (x, given), log_det + change
        return halves, log_det


def split_columns(images: Float[Array, "batch height columns channels"]) -> Halves:
    """Splits images into their even and their odd columns."""
    return images[:, :, 0::2], images[:, :, 1::2]


def join_columns(halves: Halves) -> Float[Array, "batch height 2*width channels"]:
    """The inverse of `split_columns`."""
    even, odd = halves
    batch, height, width, channels = even.shape
    return jnp.stack([even, odd], axis=3).reshape(batch, height, 2 * width, channels)


ARCHITECTURES: dict[str, dict[str, Any]] = {
    "flowpp_cifar10": {"filters": 96, "components": 32, "blocks": 2, "heads": 4, "couplings": 4, "deep": False},
    "flowpp_imagenet32": {"filters": 128, "components": 32, "blocks": 8, "heads": 4, "couplings": 8, "deep": True},
    "flowpp_imagenet64": {
        "filters": 96,
        "components": 4,
        "blocks": 5,
        "heads": 4,
        "couplings": 4,
        "deep": True,
        "processor_blocks": 5,
        "attention": False,
    },
}
"""The fields of `Flowpp` in the published dequantizers, by config.deq.name.

The published module for ImageNet64 gives several parameters one name, so flax cannot build it, and it has no released
checkpoint. Here, each parameter has its own name, as in the other two architectures. Embeddings of positions, which
would not be used, are left out."""


def _check_fields(network: Flowpp) -> None:
    for field in ("filters", "components", "blocks", "heads", "couplings"):
        if getattr(network, field) < 1:
            raise ValueError(f"{field} is {getattr(network, field)}; it must be at least 1")
    if network.filters % network.heads:
        raise ValueError(f"filters is {network.filters}; it must be a multiple of the {network.heads} attention heads")
    if not 0 <= network.dropout < 1:
        raise ValueError(f"dropout is {network.dropout}; it must lie in [0, 1)")


def flowpp_from_config(deq: Config) -> Flowpp:
    """The dequantizer that config.deq describes: a published one, in the published sizes or others.

    Raises:
        ValueError: for an unknown name or a field whose value is not allowed.
    """
    if deq.name not in ARCHITECTURES:
        raise ValueError(f"deq.name is {deq.name!r}; known: {', '.join(ARCHITECTURES)}")
    sizes = {"filters": deq.filters, "components": deq.components, "blocks": deq.blocks, "heads": deq.attn_heads}
    fields = ARCHITECTURES[deq.name] | {field: size for field, size in sizes.items() if size != 0}
    try:
        return Flowpp(**fields, dropout=deq.dropout)
    except ValueError as error:
        raise ValueError(f"deq.{error}") from error
