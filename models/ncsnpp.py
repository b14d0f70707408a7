"""NCSN++ and DDPM++: the score networks of [S21a], a U-Net of residual blocks with optional image pyramids."""

import functools
from collections.abc import Callable
from typing import Any, TypeAlias

import flax.linen as nn
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float, Int

from arrays import PerExample, append_dims
from configs.default import Config
from models.ladder import Ladder, ladder_from_config
from models.layers import (
    NONLINEARITIES,
    AttnBlockpp,
    Combine,
    Downsample,
    Embedding,
    GaussianFourierProjection,
    GroupNorm,
    ResnetBlockBigGANpp,
    ResnetBlockDDPMpp,
    Upsample,
    conv,
    kernel_init,
    positional_embedding,
    residual_sum,
)
from models.resample import AnySize, Doubled, FeatureMap, Halved, Projected, SameSize, Taps, downsample, upsample
from sde_lib import SDES

Block: TypeAlias = Callable[..., AnySize]
"""A residual block, called with feature maps to join and, by name, `features` or `resample` to change their shape."""

CHOICES: dict[str, tuple[str, ...]] = {
    "nonlinearity": tuple(NONLINEARITIES),
    "resblock_type": ("biggan", "ddpm"),
    "embedding_type": ("fourier", "positional"),
    "progressive": ("none", "output_skip", "residual"),
    "progressive_input": ("none", "input_skip", "residual"),
    "progressive_combine": ("sum", "cat"),
    "remat": ("none", "block", "conv"),
    "dtype": ("float32", "bfloat16"),
}
"""The allowed values of those fields of `NCSNpp` that are names."""


def _maps_channels(primitive: Any, *arguments: Any, **params: Any) -> bool:
    """Returns whether an operation is a convolution, or a matrix product along the channels, which come last.

    The products of attention and of resampling filters are along other axes. Their results are large for the few
    operations that it takes to recompute them.
    """
    if primitive is not lax.dot_general_p:
        return primitive is lax.conv_general_dilated_p
    (contracted, _), (batch, _) = params["dimension_numbers"]
    return not batch and tuple(contracted) == (arguments[0].ndim - 1,)


REMAT_POLICIES: dict[str, Callable[..., bool] | None] = {"block": None, "conv": _maps_channels}
"""The operations inside a layer whose results are saved for the backward pass, by `remat`; None saves nothing."""

REMAT_SYNONYMS: dict[Any, str] = {False: "none", "False": "none", True: "block", "True": "block"}
"""Older values of model.remat."""


class NCSNpp(nn.Module):
    """Maps noisy images and their noise level to an image of the same shape; fields as in configs/default.py.

    `labels` tell how noisy each image is. With `scale_by_sigma` they are the noise levels sigma, which are positive,
    and the output is divided by them. If there is also a `ladder`, labels are numbers of levels of the ladder, 0 for
    the largest sigma, and the output is divided by the sigma of the level.

    Raises:
        ValueError: a field is out of its range, or the images are too small for the number of resolutions.
    """

    nf: int = 128
    ch_mult: tuple[int, ...] = (1, 2, 2, 2)
    num_res_blocks: int = 4
    attn_resolutions: tuple[int, ...] = (16,)
    nonlinearity: str = "swish"
    dropout: float = 0.0
    resblock_type: str = "biggan"
    resamp_with_conv: bool = True
    fir_kernel: Taps | None = None  # None: resample by repeating and averaging
    skip_rescale: bool = True
    progressive: str = "none"
    progressive_input: str = "none"
    progressive_combine: str = "sum"
    embedding_type: str = "positional"
    fourier_scale: float = 16.0
    conditional: bool = True
    init_scale: float = 0.0
    scale_by_sigma: bool = False
    ladder: Ladder | None = None  # with a ladder, labels are numbers of its levels
    centered: bool = True  # images are in [-1, 1]; else in [0, 1], and mapped to [-1, 1] here
    dtype: str = "float32"  # of feature maps; parameters, moments, embeddings and output have the images' precision
    remat: str = "none"  # what the backward pass recomputes; see `REMAT_POLICIES`
    num_classes: int = 0  # classes are 0, ..., num_classes - 1; num_classes stands for any class

    def __post_init__(self) -> None:
        _check_fields(self)
        super().__post_init__()

    @nn.compact
    def __call__(
        self, x: FeatureMap, labels: PerExample, train: bool, classes: Int[Array, " batch"] | None = None
    ) -> FeatureMap:
        self._check_size(x)
        images = x if self.centered else 2 * x - 1
        if self.dtype == "bfloat16":
            images = images.astype(jnp.bfloat16)
        block = functools.partial(self._block, embedding=self._embed(labels, classes), train=train)
        skips = self._down_path(images, block)
        h = self._middle(skips[-1], block)
        h = self._up_path(h, skips, block, channels=x.shape[-1]).astype(x.dtype)
        if not self.scale_by_sigma:
            return h
        return h / append_dims(labels if self.ladder is None else self.ladder.sigma(labels), h)

    def _embed(self, labels: PerExample, classes: Int[Array, " batch"] | None) -> Embedding | None:
        if self.embedding_type == "fourier":
            embedding = GaussianFourierProjection(self.nf, self.fourier_scale)(jnp.log(labels))
        else:
            embedding = positional_embedding(labels, self.nf)
        if not self.conditional:
            return None
        embedding = nn.Dense(4 * self.nf, kernel_init=kernel_init())(embedding)
        embedding = nn.Dense(4 * self.nf, kernel_init=kernel_init())(self._act(embedding))
        if not self.num_classes:
            return embedding
        classes = jnp.full(labels.shape, self.num_classes) if classes is None else classes
        return embedding + nn.Embed(self.num_classes + 1, 4 * self.nf, name="class_embedding")(classes)

    def _down_path(self, images: FeatureMap, block: Block) -> list[AnySize]:
        """Returns the feature maps of the downward path, from the highest resolution to the lowest."""
        pyramid = images
        skips = [conv(self.nf)(images)]
        for level, multiplier in enumerate(self.ch_mult):
            for _ in range(self.num_res_blocks):
                h = block(skips[-1], features=self.nf * multiplier)
                skips.append(self._attention_if_due(h))
            if level < len(self.ch_mult) - 1:
                pyramid, h = self._join_input_pyramid(pyramid, self._halve(skips[-1], block))
                skips.append(h)
        return skips

    def _middle(self, h: FeatureMap, block: Block) -> FeatureMap:
        return block(self._attention(block(h)))

    def _up_path(
        self, h: FeatureMap, skips: list[AnySize], block: Block, channels: int
    ) -> Float[Array, "batch _ _ {channels}"]:
        """Computes an image with `channels` channels from the lowest resolution and the maps of the downward path."""
        skips = list(skips)
        pyramid = None
        for level, multiplier in reversed(list(enumerate(self.ch_mult))):
            for _ in range(self.num_res_blocks + 1):
                h = block(h, skips.pop(), features=self.nf * multiplier)
            h = self._attention_if_due(h)
            pyramid, h = self._join_output_pyramid(pyramid, h, channels)
            if level > 0:
                h = self._double(h, block)
        if self.progressive == "output_skip" and pyramid is not None:
            return pyramid
        return self._head(h, channels, self.init_scale)

    def _join_input_pyramid(self, pyramid: AnySize, h: FeatureMap) -> tuple[AnySize, SameSize]:
        """Returns the pyramid at the next lower resolution, and the feature maps joined with it."""
        if self.progressive_input == "none":
            return pyramid, h
        if self.progressive_input == "input_skip":
            pyramid = self._resampled(Downsample(None, self.fir_kernel), pyramid)
            return pyramid, Combine(self.progressive_combine)(pyramid, h)
        pyramid = self._resampled(Downsample(h.shape[-1], self.fir_kernel), pyramid)
        h = residual_sum(pyramid, h, self.skip_rescale)
        return h, h

    def _join_output_pyramid(
        self, pyramid: AnySize | None, h: FeatureMap, channels: int
    ) -> tuple[SameSize | None, FeatureMap]:
        """Returns the pyramid joined with the feature maps, and the feature maps for the next block."""
        if self.progressive == "none":
            return None, h
        if self.progressive == "output_skip":
            image = self._head(h, channels, self.init_scale)
            if pyramid is not None:
                image += self._resampled(Upsample(None, self.fir_kernel), pyramid)
            return image, h
        if pyramid is None:
            return self._head(h, h.shape[-1], init_scale=1.0), h
        pyramid = self._resampled(Upsample(h.shape[-1], self.fir_kernel), pyramid)
        h = residual_sum(pyramid, h, self.skip_rescale)
        return h, h

    def _halve(self, h: FeatureMap, block: Block) -> Halved:
        if self.resblock_type == "ddpm":
            return self._resampled(Downsample(h.shape[-1] if self.resamp_with_conv else None, self.fir_kernel), h)
        return block(h, resample=downsample)

    def _double(self, h: FeatureMap, block: Block) -> Doubled:
        if self.resblock_type == "ddpm":
            return self._resampled(Upsample(h.shape[-1] if self.resamp_with_conv else None, self.fir_kernel), h)
        return block(h, resample=upsample)

    def _block(
        self,
        *maps: SameSize,
        embedding: Embedding | None,
        train: bool,
        features: int | None = None,
        resample: Callable[[FeatureMap, Taps | None], AnySize] | None = None,
    ) -> AnySize:
        """A residual block of feature maps, whose channels are joined. `resample` is used by blocks that resample."""
        options: dict[str, Any] = {
            "nonlinearity": NONLINEARITIES[self.nonlinearity],
            "dropout": self.dropout,
            "init_scale": self.init_scale,
            "skip_rescale": self.skip_rescale,
            "features": features,
        }
        if self.resblock_type == "ddpm":
            block = ResnetBlockDDPMpp(**options)
        else:
            block = ResnetBlockBigGANpp(**options, resample=resample, taps=self.fir_kernel)
        return apply_with_remat(self.remat, block, maps, embedding, train)

    def _resampled(self, layer: Downsample | Upsample, h: FeatureMap) -> AnySize:
        return apply_with_remat(self.remat, layer, (h,))

    def _attention(self, h: FeatureMap) -> FeatureMap:
        return apply_with_remat(self.remat, AttnBlockpp(self.init_scale, self.skip_rescale), (h,))

    def _attention_if_due(self, h: FeatureMap) -> FeatureMap:
        return self._attention(h) if h.shape[1] in self.attn_resolutions else h

    def _head(self, h: FeatureMap, features: int, init_scale: float) -> Projected:
        """Computes an image, or the start of the output pyramid, from feature maps."""
        return conv(features, init_scale=init_scale)(self._act(GroupNorm()(h)))

    def _act(self, x: Array) -> Array:
        return NONLINEARITIES[self.nonlinearity](x)

    def _check_size(self, x: FeatureMap) -> None:
        height, width, multiple = x.shape[1], x.shape[2], 2 ** (len(self.ch_mult) - 1)
        if height % multiple or width % multiple:
            raise ValueError(
                f"images of {height}x{width} pixels cannot be halved {len(self.ch_mult) - 1} times: "
                f"height and width must be multiples of {multiple}, or ch_mult shorter"
            )


def apply_with_remat(remat: str, layer: Callable[..., AnySize], maps: tuple[SameSize, ...], *args: Any) -> AnySize:
    """Applies a module to feature maps, whose channels are joined.

    In the backward pass, the values that `REMAT_POLICIES` does not save are recomputed. The joined channels are among
    them, so that they are not stored beside the feature maps that they come from.
    """

    def call(layer: Callable[..., AnySize], *maps: SameSize) -> AnySize:
        return layer(maps[0] if len(maps) == 1 else jnp.concatenate(maps, axis=-1), *args)

    if remat == "none":
        return call(layer, *maps)
    return nn.remat(call, policy=REMAT_POLICIES[remat])(layer, *maps)


def _check_fields(network: NCSNpp) -> None:
    for field, known in CHOICES.items():
        if getattr(network, field) not in known:
            raise ValueError(f"{field} is {getattr(network, field)!r}; known: {', '.join(known)}")
    allowed = {
        "nf": (network.nf >= 4, "at least 4"),
        "ch_mult": (len(network.ch_mult) > 0 and min(network.ch_mult) >= 1, "positive integers, at least one"),
        "num_res_blocks": (network.num_res_blocks >= 1, "at least 1"),
        "dropout": (0 <= network.dropout < 1, "in [0, 1)"),
        "fir_kernel": (network.fir_kernel is None or sum(network.fir_kernel) > 0, "of positive sum"),
        "fourier_scale": (network.fourier_scale > 0, "positive"),
        "init_scale": (network.init_scale >= 0, "0 or more"),
    }
    for field, (is_allowed, text) in allowed.items():
        if not is_allowed:
            raise ValueError(f"{field} is {getattr(network, field)!r}; it must be {text}")
    if network.ladder is not None and network.embedding_type == "fourier":
        raise ValueError("embedding_type is 'fourier', which embeds ln sigma; it must be 'positional' with a ladder")


ONLY_CHOICES: dict[str, Any] = {
    "attention_type": "ddpm",
    "normalization": "GroupNorm",
    "conv_size": 3,
    "trainable_embedding": False,
    "data_init": False,
}
"""Fields of config.model that published configurations have, with the only value that is supported."""


def ncsnpp_from_config(config: Config) -> NCSNpp:
    """The score network that config.model describes, for the images of config.data and the SDE of config.training.

    Raises:
        ValueError: a field of config.model has a value that is not allowed.
    """
    check_scale_by_sigma(config)
    if config.model.embedding_type == "fourier" and not config.training.continuous:
        raise ValueError(
            "model.embedding_type is 'fourier', which embeds ln sigma; with training.continuous=False it must be "
            "'positional'"
        )
    network = ncsnpp_from_fields(config.model, config.data.centered, ladder_from_config(config))
    return network.clone(num_classes=config.data.num_classes)


def check_scale_by_sigma(config: Config) -> None:
    """Raises ValueError if model.scale_by_sigma cannot be used with the SDE and model.parameterization."""
    scale_by_sigma, sde, parameterization = (
        config.model.scale_by_sigma,
        config.training.sde,
        config.model.parameterization,
    )
    if scale_by_sigma != (SDES[sde].scale_by_sigma and parameterization == "noise"):
        raise ValueError(
            f"model.scale_by_sigma is {scale_by_sigma}, but networks for training.sde={sde} with "
            f"model.parameterization={parameterization} need {not scale_by_sigma}"
        )


def ncsnpp_from_fields(model: Config, centered: bool, ladder: Ladder | None = None) -> NCSNpp:
    """Builds the network with the fields of config.model for any SDE. With `ladder`, labels number its levels."""
    for field, only in ONLY_CHOICES.items():
        if model[field] != only:
            raise ValueError(f"model.{field} is {model[field]!r}; it must be {only!r}")
    return NCSNpp(
        **u_net_fields(model, centered, ladder),
        resblock_type=model.resblock_type,
        fir_kernel=tuple(model.fir_kernel) if model.fir else None,
        skip_rescale=model.skip_rescale,
        progressive=model.progressive,
        progressive_input=model.progressive_input,
        progressive_combine=model.progressive_combine,
        embedding_type=model.embedding_type,
        fourier_scale=model.fourier_scale,
        init_scale=model.init_scale,
    )


def u_net_fields(model: Config, centered: bool, ladder: Ladder | None) -> dict[str, Any]:
    """Returns the fields of config.model that NCSN++ and DDPM have in common, as fields of the network."""
    names = ("nf", "num_res_blocks", "nonlinearity", "dropout", "resamp_with_conv", "conditional", "scale_by_sigma")
    tuples = {name: tuple(model[name]) for name in ("ch_mult", "attn_resolutions")}
    arithmetic = {"dtype": model.dtype, "remat": str(REMAT_SYNONYMS.get(model.remat, model.remat))}
    return {name: model[name] for name in names} | tuples | arithmetic | {"ladder": ladder, "centered": centered}
