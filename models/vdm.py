"""The network of Variational Diffusion Models [K21]: a U-Net that keeps the full resolution, as [Z23] uses it.

Modules keep the published names. Parameters are stored under these names, so published parameters can be loaded.
"""

import functools
import math
from collections.abc import Callable
from typing import TypeAlias

import flax.linen as nn
import jax.numpy as jnp
from jaxtyping import Array, Float

from arrays import PerExample
from configs.default import Config
from models.layers import Dropout, Embedding, GroupNorm, attention, positional_embedding, swish
from models.mlp import TIMES_PER_UNIT
from models.ncsnpp import REMAT_POLICIES, REMAT_SYNONYMS, apply_with_remat
from models.resample import FeatureMap, SameSize
from sde_lib import SDES

Norm = functools.partial(GroupNorm, groups=32)
"""Group normalisation as in [K21]: 32 groups, also where a group has fewer than four channels."""

Apply: TypeAlias = Callable[..., SameSize]
"""Applies a module to feature maps and further arguments."""

EMBEDDED_TIMES_PER_UNIT = 1000
"""The time in [0, 1] is multiplied by this number before it is embedded."""

FOURIER_EXPONENTS = (6, 7)
"""The k of the features sin(2^k 2 pi x) and cos(2^k 2 pi x) of [K21] App. C."""


class VDM(nn.Module):
    """Maps noisy images in [-1, 1] and their times to images of the same shape ([K21] App. B).

    The downward path has `num_res_blocks` residual blocks, the middle has two blocks with attention between them, and
    the upward path has `num_res_blocks + 1` blocks. Each block of the upward path also sees one feature map of the
    downward path. The output is the noisy image plus the output of the last convolution. Layers that end a branch start
    at zero, so the network starts as the identity.

    Labels are 999 t, as for the other networks. The label of the published network is (gamma - gamma_min) / (gamma_max
    - gamma_min), gamma = 2 ln(sigma / alpha), which is t if gamma is linear in t.
    """

    nf: int = 128
    num_res_blocks: int = 32
    attn_resolutions: tuple[int, ...] = ()  # heights of images at which attention follows every block
    fourier_features: bool = True  # the network also sees `fourier_features` of the image
    dropout: float = 0.0
    remat: str = "none"  # a name in `REMAT_POLICIES`, or none

    scale_by_sigma = False

    @nn.compact
    def __call__(
        self, x: FeatureMap, labels: PerExample, train: bool, conditioning: PerExample | None = None
    ) -> FeatureMap:
        """Returns the output for images x.

        `conditioning` is one more number for each image, an input next to the time embedding: 0 for plain images (the
        default), 1 for augmented ones ([Z23]).
        """
        conditioning = jnp.zeros_like(labels) if conditioning is None else conditioning
        times = EMBEDDED_TIMES_PER_UNIT / TIMES_PER_UNIT * labels
        embedding = jnp.concatenate([positional_embedding(times, self.nf), conditioning[:, None]], axis=1)
        unet = ScoreUNet(
            nf=self.nf,
            num_res_blocks=self.num_res_blocks,
            attention=x.shape[1] in self.attn_resolutions,
            dropout=self.dropout,
            remat=self.remat,
            name="score_model",
        )
        inputs = jnp.concatenate([x, fourier_features(x)], axis=-1) if self.fourier_features else x
        return x + unet(inputs, embedding, x.shape[-1], train)


class ScoreUNet(nn.Module):
    """The U-Net of `VDM`, from an image with its features and a time embedding to the last convolution."""

    nf: int
    num_res_blocks: int
    attention: bool  # self-attention follows every block (True), or only the middle blocks (False)
    dropout: float
    remat: str

    @nn.compact
    def __call__(self, inputs: FeatureMap, embedding: Embedding, channels: int, train: bool) -> SameSize:
        for layer in ("dense0", "dense1"):
            embedding = swish(nn.Dense(4 * self.nf, name=layer)(embedding))
        block = functools.partial(self._block, embedding=embedding, train=train)
        skips = [nn.Conv(self.nf, (3, 3), name="conv_in")(inputs)]
        for i in range(self.num_res_blocks):
            skips.append(self._attention_if_due(f"down.attn_{i}", block(f"down.block_{i}", skips[-1])))
        h = block("mid.block_1", skips[-1])
        h = block("mid.block_2", self._attention("mid.attn_1", h))
        for i in range(self.num_res_blocks + 1):
            h = block(f"up.block_{i}", h, skips.pop())
            h = self._attention_if_due(f"up.attn_{i}", h)
        return nn.Conv(channels, (3, 3), kernel_init=nn.initializers.zeros, name="conv_out")(swish(Norm()(h)))

    def _block(self, name: str, *maps: SameSize, embedding: Embedding, train: bool) -> SameSize:
        return apply_with_remat(self.remat, ResnetBlock(self.nf, self.dropout, name=name), maps, embedding, train)

    def _attention(self, name: str, h: FeatureMap) -> FeatureMap:
        return apply_with_remat(self.remat, AttnBlock(name=name), (h,))

    def _attention_if_due(self, name: str, h: FeatureMap) -> FeatureMap:
        return self._attention(name, h) if self.attention else h


class ResnetBlock(nn.Module):
    """A residual block. The time embedding shifts the channels between its two convolutions, without a bias."""

    features: int
    dropout: float

    @nn.compact
    def __call__(self, x: FeatureMap, embedding: Embedding, train: bool) -> SameSize:
        zeros = nn.initializers.zeros
        h = nn.Conv(self.features, (3, 3), name="conv1")(swish(Norm()(x)))
        h += nn.Dense(self.features, use_bias=False, kernel_init=zeros, name="cond_proj")(embedding)[:, None, None, :]
        h = Dropout(self.dropout)(swish(Norm()(h)), train)
        h = nn.Conv(self.features, (3, 3), kernel_init=zeros, name="conv2")(h)
        if x.shape[-1] != self.features:
            x = nn.Dense(self.features, name="nin_shortcut")(x)
        return x + h


class AttnBlock(nn.Module):
    """Self-attention between all pixels, one head, on a residual branch."""

    @nn.compact
    def __call__(self, x: FeatureMap) -> FeatureMap:
        batch, _, _, channels = x.shape
        h = Norm()(x).reshape(batch, -1, channels)
        h = attention(*(nn.Dense(channels, name=name)(h) for name in ("q", "k", "v")))
        h = nn.Dense(channels, kernel_init=nn.initializers.zeros, name="proj_out")(h)
        return x + h.reshape(x.shape)


def fourier_features(x: FeatureMap) -> Float[Array, "batch height width _"]:
    """sin(2^k 2 pi x), then cos(2^k 2 pi x), of each channel for each k in `FOURIER_EXPONENTS` ([K21] App. C)."""
    frequencies = 2 * math.pi * 2.0 ** jnp.array(FOURIER_EXPONENTS, x.dtype)
    angles = (x[..., None] * frequencies[None, None, None, None, :]).reshape(*x.shape[:-1], -1)
    return jnp.concatenate([jnp.sin(angles), jnp.cos(angles)], axis=-1)


def vdm_from_config(config: Config) -> VDM:
    """Builds the network that config.model describes, for the SDE of config.training.

    Raises:
        ValueError: if a field of config has a value that the network does not allow.
    """
    model, sde = config.model, config.training.sde
    if SDES[sde].variance_exploding:
        raise ValueError(f"model.name is 'vdm', but training.sde={sde} is variance exploding: set it to 'vpsde'")
    remat = str(REMAT_SYNONYMS.get(model.remat, model.remat))
    allowed = {
        "scale_by_sigma": (not model.scale_by_sigma, "False"),
        "nf": (model.nf >= 32 and model.nf % 32 == 0, "a multiple of 32"),
        "num_res_blocks": (model.num_res_blocks >= 1, "at least 1"),
        "dropout": (0 <= model.dropout < 1, "in [0, 1)"),
        "dtype": (model.dtype == "float32", "'float32'"),
        "remat": (remat == "none" or remat in REMAT_POLICIES, f"none or one of {', '.join(REMAT_POLICIES)}"),
    }
    for field, (is_allowed, text) in allowed.items():
        if not is_allowed:
            raise ValueError(f"model.{field} is {model[field]!r}; with model.name=vdm it must be {text}")
    if not config.data.centered:
        raise ValueError("data.centered is False, but model.name=vdm needs images in [-1, 1]: set it to True")
    return VDM(
        nf=model.nf,
        num_res_blocks=model.num_res_blocks,
        attn_resolutions=tuple(model.attn_resolutions),
        fourier_features=model.fourier_features,
        dropout=model.dropout,
        remat=remat,
    )
