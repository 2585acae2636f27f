"""Music source separation with the deep ResUNet of Kong et al. 2021.

    mixture            (B, C, L)            waveforms
    stft               (B, C, T, F)         X, complex
    |X|, normalised    (B, C, T, F - 1)     without the highest bin
    UNet               (B, D, T, F - 1)     features
    heads, 1x1         (B, S, C, T, F - 1)  mask, q, p_r, p_i
    rule, eq. 1 to 9   (B, S, C, T, F - 1)  Y, complex; the highest bin is 0 again
    istft              (B, S, C, L)         estimates, waveforms

Letters: B batch, S targets, C audio channels, L samples, T frames, F bins, D features.
"The paper": Decoupling magnitude and phase estimation with deep ResUNet for music source
separation, ISMIR 2021. "The published code": github.com/bytedance/music_source_separation.

Four parts: I. the paper; II. using a model; III. songs; IV. files and scripts.
"""
import argparse
import contextlib
import ctypes
import dataclasses
import difflib
import functools
import hashlib
import http.client
import itertools
import math
import os
import queue
import re
import reprlib
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
import typing
import urllib.request
import warnings
import zipfile
from pathlib import Path

import numpy as np
import soundfile
import torch
import torch.nn as nn
import torch.nn.functional as F

import baselines

# ==== I. The paper ===============================================================================
# From a mixture to estimates: spectrograms, rules (sections 2, 3.1, 3.2), network (3.3), Table 3.

SOURCES = ("vocals", "bass", "drums", "other")  # "accompaniment" is the sum of the last three

@dataclasses.dataclass
class Config:
    """What a model is built from; by default the paper's. Other models' sizes: train.RECIPES."""
    model: str = "ResUNetDecouple+"             # a key of MODELS
    targets: tuple = ("vocals",)                # what the model estimates, in this order: S of them
    sample_rate: int = 44100                    # Hz
    channels: int = 2                           # C
    width: int = 32                             # features of the first encoder
    window: int = 2048                          # samples of the STFT's window; F = window / 2 + 1
    hop: int = 441                              # samples between two frames: 10 ms
    __post_init__ = lambda self: check_config(self)                   # raises UserError

# ---- Spectrograms: (..., L) <-> (..., T, F) complex ---------------------------------------------

@functools.cache
@torch.inference_mode(False)                    # a tensor made in that mode can't be learned through
def hann_window(length, dtype, device):
    return torch.hann_window(length, dtype=dtype, device=device)

def stft(audio, window=2048, hop=441, padding="reflect"):
    """(..., L) float -> (..., T, F) complex: centred frames, periodic Hann, T = L // hop + 1."""
    missing = max(0, window // 2 + 1 - audio.shape[-1])               # to reflect the ends
    x = F.pad(audio, (0, missing)).flatten(0, -2)                     # (N, L)
    hann = hann_window(window, x.dtype, x.device)
    X = torch.stft(x, window, hop, window=hann, pad_mode=padding, return_complex=True)
    return X.transpose(1, 2).unflatten(0, audio.shape[:-1])           # (N, F, T) -> (..., T, F)

def istft(X, length, window=2048, hop=441):
    """(..., T, F) complex -> (..., length) float: the inverse of stft."""
    hann = hann_window(window, X.real.dtype, X.device)
    padded = max(length, window // 2 + 1)                             # as in stft
    x = torch.istft(X.flatten(0, -3).transpose(1, 2), window, hop, window=hann, length=padded)
    return x[:, :length].unflatten(0, X.shape[:-2])                   # (N, L) -> (..., L)

# ---- Rules: from the mixture's X and the heads to the estimate's Y ------------------------------
# All are (..., T, F). Heads are real and raw: the paper's M_mag is sigmoid(mask), its Q is q, its
# P_r and P_i are tanh(p_r) and tanh(p_i), a tanh that the published code has, not the paper.

def magnitude_of(X):
    """|X|, at least 1e-5, which keeps the gradient finite at 0."""
    return (X.real ** 2 + X.imag ** 2).clamp(min=1e-10).sqrt()

def phase_of(X):
    """e^(j angle X); 0 for X = 0."""
    return X / magnitude_of(X)

def magnitude_mask(X, mask):
    """A mask in [0, 1] scales the magnitude; the phase stays the mixture's (section 2.2)."""
    return torch.sigmoid(mask) * X                                    # eq. 1, eq. 2

def ideal_mask(S, X, limit=math.inf):
    """The best complex mask for a source's S, with |M| clipped at the limit; 0 if |X| <= 1e-8."""
    M = torch.where(X.abs() > 1e-8, S / X, 0)                         # eq. 3
    return M * (limit / M.abs()).clamp(max=1)

def rotation(p_r, p_i):
    """e^(j angle M): the unit number in the direction of p_r + j p_i; 0 if both are 0."""
    modulus = (p_r ** 2 + p_i ** 2).clamp(min=1e-20).sqrt()
    return torch.complex(p_r / modulus, p_i / modulus)                # eq. 6: cos and sin

def complex_mask(X, o_r, o_i):
    """UNetPhase: the bounded complex mask of Choi et al. 2019, M = tanh(|O|) O / |O|."""
    modulus = (o_r ** 2 + o_i ** 2).clamp(min=1e-20).sqrt()
    M = torch.tanh(modulus) * rotation(o_r, o_i)
    return M * X                                                      # eq. 4

def decouple(X, mask, p_r, p_i):
    """A mask in [0, 1] scales the magnitude, a rotation changes the phase (section 3.1)."""
    M = torch.sigmoid(mask) * rotation(p_r.tanh(), p_i.tanh())        # eq. 7
    return M * X                                                      # eq. 4

def decouple_plus(X, mask, q, p_r, p_i):
    """Like decouple, but adds a magnitude q, so that |M| can exceed 1 (section 3.2)."""
    magnitude = F.relu(torch.sigmoid(mask) * magnitude_of(X) + q)     # eq. 8
    phase = rotation(p_r.tanh(), p_i.tanh()) * phase_of(X)
    return magnitude * phase                                          # eq. 9

# ---- Backbone: (B, C, T, F - 1) -> (B, D, T, F - 1) ---------------------------------------------

def batch_norm(features):
    return nn.BatchNorm2d(features, momentum=0.01)                    # as in the published code

def conv3x3(features_in, features):
    return nn.Conv2d(features_in, features, 3, padding=1, bias=False)

class ConvBlock(nn.Sequential):
    """Two convolutions, batch norm and leaky ReLU after each: for the 33-layer UNet."""

    def __init__(self, features_in, features):
        super().__init__(
            conv3x3(features_in, features), batch_norm(features), nn.LeakyReLU(0.01, inplace=True),
            conv3x3(features, features), batch_norm(features), nn.LeakyReLU(0.01, inplace=True))

class ResBlock(nn.Module):
    """RCB (figure 4c): two convolutions, batch norm and leaky ReLU before each; a shortcut."""

    def __init__(self, features_in, features):
        super().__init__()
        self.bn1 = batch_norm(features_in)
        self.conv1 = conv3x3(features_in, features)
        self.bn2 = batch_norm(features)
        self.conv2 = conv3x3(features, features)
        same = features_in == features
        self.shortcut = nn.Identity() if same else nn.Conv2d(features_in, features, 1)

    def forward(self, x):
        # In place, to save memory: going backward needs neither a batch norm's output nor a
        # convolution's.
        y = self.conv1(F.leaky_relu(self.bn1(x), 0.01, inplace=True))  # (B, D_in, ..) -> (B, D, ..)
        y = self.conv2(F.leaky_relu(self.bn2(y), 0.01, inplace=True))
        return y.add_(self.shortcut(x))

def res_blocks(features_in, features):
    """Four RCBs in a row: the 8 convolutions that REB, ICB and RDB share (figure 4a, b)."""
    return nn.Sequential(
        ResBlock(features_in, features), ResBlock(features, features),
        ResBlock(features, features), ResBlock(features, features))

class Decoder(nn.Module):
    """Up-sample by `stride`, join the output of the encoder, convolve."""

    def __init__(self, features_in, features, stride, residual):
        super().__init__()
        up = nn.ConvTranspose2d(
            features_in, features, kernel_size=stride, stride=stride, bias=False)
        if residual:
            self.up = nn.Sequential(batch_norm(features_in), nn.ReLU(inplace=True), up)
            self.block = res_blocks(2 * features, features)
        else:
            self.up = nn.Sequential(up, batch_norm(features), nn.LeakyReLU(0.01, inplace=True))
            self.block = ConvBlock(2 * features, features)

    def forward(self, x, skips):
        # Popped here, so that in inference the skip is freed before the block runs.
        return self.block(torch.cat([self.up(x), skips.pop()], dim=1))  # (B, 2 D, ..) -> (B, D, ..)

class UNet(nn.Module):
    """The 33-layer UNet or, residual, the 143-layer ResUNet, but for the last layer, the heads.

    6 encoders, 6 decoders with skip connections, a final block; the ResUNet has 4 more blocks, the
    ICBs, between encoders and decoders. That makes 32 and 142 convolutions, not counting those of
    1x1 in shortcuts. F - 1 must be a multiple of 64, T of frame_multiple.

    `growth` has the encoders' numbers of features, as multiples of the width. From the published
    code, not the paper: what they are by default; transposed convolutions as large as their
    strides; no biases; in the ResUNet the last pooling of frequency only.
    """

    def __init__(self, channels, width, residual, growth=(1, 2, 4, 8, 12, 12)):
        super().__init__()
        widths = [round(width * factor) for factor in growth]         # 32, 64, 128, 256, 384, 384
        strides = [(2, 2)] * 6                                        # of each pooling: (T, F)
        if residual:
            strides[5] = (1, 2)
        block = res_blocks if residual else ConvBlock

        self.encoders = nn.ModuleList()
        for features_in, features in zip([channels, *widths], widths):
            self.encoders.append(block(features_in, features))
        self.bottleneck = nn.Sequential()                             # empty: it changes nothing
        if residual:
            self.bottleneck.extend(block(widths[5], widths[5]) for _ in range(4))
        self.decoders = nn.ModuleList()
        for i in reversed(range(6)):                                  # from the deepest encoder up
            deeper = widths[min(i + 1, 5)]
            self.decoders.append(Decoder(deeper, widths[i], strides[i], residual))
        self.after = block(widths[0], widths[0])

        self.strides = strides
        self.frame_multiple = math.prod(stride[0] for stride in strides)  # 64, or 32 when residual

    def forward(self, x):
        skips = []
        for encoder, stride in zip(self.encoders, self.strides):
            skips.append(encoder(x))                                  # (B, D_i, T / 2^i, .. / 2^i)
            x = F.avg_pool2d(skips[-1], stride)                       # both halved; see strides
        x = self.bottleneck(x)                                        # (B, D_5, T / 64, .. / 64)
        for decoder in self.decoders:
            x = decoder(x, skips)
        return self.after(x)                                          # (B, D_0, T, F - 1)

# ---- Models: everything between two waveforms ---------------------------------------------------

class Model(nn.Module):
    """The contract of a model: what each row of MODELS makes from a Config.

    model(mixture)  (B, C, L) -> estimates (B, S, C, L), float32, for any L >= 0
    config          what it was made from: S = len(config.targets), C = config.channels
    stride          in samples: blocks of a song should begin a multiple of it apart, so that the
                    model samples them as it samples the whole song
    residual        the index of the target that is the mixture minus the others, or None
    blocks          in samples: how long blocks should be, and how much two of them should share
    """

    def __init__(self, config, stride=1, residual=None, blocks=None):
        super().__init__()
        self.config = config
        self.stride = stride
        self.residual = residual
        self.blocks = blocks or (SEGMENT, OVERLAP)

HEADS = {                                       # the names of each rule's arguments after X
    magnitude_mask: ("mask",),
    complex_mask: ("o_r", "o_i"),
    decouple: ("mask", "p_r", "p_i"),
    decouple_plus: ("mask", "q", "p_r", "p_i"),
}

class Separator(Model):
    """The paper's system (figure 3): a backbone on |X|, heads of 1x1, and the rule for them.

    The backbone makes (B, width, T, F - 1) of what `inputs` makes of X, by default |X|, where T is
    padded to a multiple of its frame_multiple. It alone leaves float32 under autocast. A `head`
    other than a convolution is for backbones whose output has another shape (Bands).

    From the published code, not the paper: the batch norm per bin; the highest bin is left out; the
    initial weights, of the backbone, too.
    """

    def __init__(self, config, backbone, rule, head=nn.Conv2d, inputs=magnitude_of):
        super().__init__(config, stride=config.hop)
        self.inputs = inputs
        maps = len(config.targets) * config.channels                  # the paper's J: of all heads
        self.norm = batch_norm(config.window // 2 + 1)
        self.backbone = backbone
        self.heads = nn.ModuleDict()
        for name in HEADS[rule]:
            self.heads[name] = head(config.width, maps, 1)
        self.rule = rule

        for name, parameter in self.named_parameters():
            if parameter.dim() == 4:                                  # of convolutions
                nn.init.xavier_uniform_(parameter)
            elif name.endswith("bias"):
                nn.init.zeros_(parameter)

    def forward(self, mixture):
        c = self.config
        X = stft(mixture, c.window, c.hop)                            # (B, C, T, F)

        # The inputs, by default C' = C magnitudes, normalised per bin, without the highest one.
        x = self.norm(self.inputs(X).permute(0, 3, 1, 2))             # (B, F, C', T)
        x = x.permute(0, 2, 3, 1)[..., :-1]                           # (B, C', T, F - 1)

        # The backbone, on as many frames as its pooling divides.
        frames = x.shape[2]
        x = F.pad(x, (0, 0, 0, -frames % self.backbone.frame_multiple))
        features = self.backbone(x).to(X.real.dtype)                  # (B, D, T', F - 1)

        # Heads, the rule, synthesis: in float32, under autocast too.
        with torch.autocast(mixture.device.type, enabled=False):
            heads = {}
            for name, head in self.heads.items():
                maps = head(features)[:, :, :frames]                  # (B, S C, T, F - 1)
                heads[name] = maps.unflatten(1, (-1, c.channels))     # (B, S, C, T, F - 1)
            Y = self.rule(X[:, None, ..., :-1], **heads)              # X: (B, 1, C, T, F - 1)
            Y = F.pad(Y, (0, 1))                                      # (B, S, C, T, F)
            return istft(Y, mixture.shape[-1], c.window, c.hop)       # (B, S, C, L)

def unet(config):
    return UNet(config.channels, config.width, residual=False)

def resunet(config):
    return UNet(config.channels, config.width, residual=True)

MODELS = {              # Config -> Model
    # Table 3                                  backbone    rule           J (stereo, one target)
    "UNetPhase":        lambda c: Separator(c, unet(c),    complex_mask),     # 4
    "UNet":             lambda c: Separator(c, unet(c),    magnitude_mask),   # 2
    "UNetDecouple":     lambda c: Separator(c, unet(c),    decouple),         # 6
    "UNetDecouple+":    lambda c: Separator(c, unet(c),    decouple_plus),    # 8
    "ResUNet":          lambda c: Separator(c, resunet(c), magnitude_mask),   # 2
    "ResUNetDecouple":  lambda c: Separator(c, resunet(c), decouple),         # 6
    "ResUNetDecouple+": lambda c: Separator(c, resunet(c), decouple_plus),    # 8
}

# ---- Relatives: the systems of other papers, to compare with ------------------------------------

def hops(frames, shared, hop):
    """(segment, overlap) in samples of blocks of so many frames: n - 1 hops make n frames."""
    return (frames - 1) * hop, (shared - 1) * hop

def residual_target(targets):
    """The index of the target that is the mixture minus the others; None if they don't add up."""
    if set(targets) == set(SOURCES):
        return targets.index("other")
    if set(targets) == {"vocals", "accompaniment"}:
        return targets.index("accompaniment")
    return None

class WaveformModel(Model):
    """A network of baselines.py from waveforms (B, C, L) to waveforms (B, S, C, L)."""

    def __init__(self, config, network):
        residual = residual_target(config.targets)
        backbone = network(config.channels, len(config.targets), config.width, residual)
        super().__init__(config, backbone.STRIDE, backbone.residual)  # stride in samples
        self.backbone = backbone

    def forward(self, mixture):
        return self.backbone(mixture)

class SpectrogramModel(Model):
    """A network of baselines.py from spectrograms (B, C, T, F) to spectrograms (B, S, C, T, F)."""

    def __init__(self, config, network, padding="constant", blocks=None):
        bins = config.window // 2 + 1
        residual = residual_target(config.targets)
        backbone = network(config.channels, bins, len(config.targets), config.width, residual)
        super().__init__(config, backbone.STRIDE * config.hop, backbone.residual, blocks)
        self.backbone = backbone
        # Where phases matter not "reflect": a frame whose middle is the mirror would be real but
        # for rounding errors.
        self.padding = padding

    def forward(self, mixture):
        c = self.config
        X = stft(mixture, c.window, c.hop, self.padding)              # (B, C, T, F)
        return istft(self.backbone(X), mixture.shape[-1], c.window, c.hop)

# The authors' later, faster networks: one on four bands, each sampled at a quarter of the rate.

BANDS = 4

def bounded_decouple_plus(X, mask, q, p_r, p_i):
    """decouple_plus with q in [-1, 1], as these networks have it."""
    return decouple_plus(X, mask, q.tanh(), p_r, p_i)

HEADS[bounded_decouple_plus] = HEADS[decouple_plus]

class FilterBank(nn.Module):
    """Four bands of a waveform, each at a quarter of its rate, and back: a pseudo-QMF bank.

    Published weights bring filters of their own, optimised, which give back the waveform up to an
    error of -103 dB. These are made by formula: -83 dB.
    """

    def __init__(self):
        super().__init__()
        # Half a cosine as a low-pass filter's frequency response, from 0 to the width of a band,
        # pi / 4: squared, it and that of the next band sum to 1. It begins and ends smoothly.
        u = (np.arange(4096) + 0.5) / 4096
        response = np.cos(np.pi / 2 * (u - np.sin(2 * np.pi * u) / (2 * np.pi)))
        t = np.arange(16 * BANDS) - (16 * BANDS - 1) / 2              # samples from the middle
        waves = np.cos(np.pi / BANDS * u[:, None] * t)
        low_pass = (response[:, None] * waves).mean(axis=0) / BANDS

        # Moved to the middle of each band, with phases that cancel what neighbours alias.
        k = np.arange(BANDS)[:, None]
        phase = np.pi / BANDS * (k + 0.5) * t - np.pi / 4 * (-1.0) ** k
        filters = torch.from_numpy(2 * low_pass * np.cos(phase)).float()  # (4, 64)
        self.register_buffer("analysis", filters[:, None])

        # For each of four samples in a row: (4, 4, 16).
        polyphase = BANDS * filters.unflatten(1, (16, BANDS)).flip(1)
        self.register_buffer("synthesis", polyphase.permute(2, 0, 1).contiguous())

    def split(self, x):
        """(B, C, L) -> (B, 4 C, L / 4 + 16), L being rounded up."""
        padded = F.pad(x, (60, 64 + -x.shape[-1] % BANDS)).flatten(0, 1)
        bands = F.conv1d(padded[:, None], self.analysis, stride=BANDS)
        return bands.unflatten(0, x.shape[:2]).flatten(1, 2)

    def join(self, bands, length):
        """(B, S, 4 C, L / 4 + 16) -> (B, S, C, L)"""
        x = bands.unflatten(2, (-1, BANDS))                           # (B, S, C, 4, L / 4 + 16)
        y = F.conv1d(F.pad(x.flatten(0, 2), (0, 15)), self.synthesis)
        y = y.transpose(1, 2).flatten(1).unflatten(0, x.shape[:3])    # samples interleaved
        return y[..., :length]

class Subbands(Model):
    """The paper's system on bands: they are the channels of a Separator, C * 4 of them.

    Window and hop are those of a band. A fourth of the frames' work for about the same result.
    """

    def __init__(self, config, backbone):
        hop = BANDS * config.hop
        super().__init__(config, hop, blocks=hops(640, 64, hop))      # as of SEGMENT, OVERLAP
        inner = dataclasses.replace(config, channels=BANDS * config.channels)
        self.bank = FilterBank()
        self.separator = Separator(inner, backbone(inner), bounded_decouple_plus)

    def forward(self, mixture):
        with torch.autocast(mixture.device.type, enabled=False):
            bands = self.bank.split(mixture)                          # (B, 4 C, L / 4 + 16)
        estimates = self.separator(bands)                             # (B, S, 4 C, L / 4 + 16)
        with torch.autocast(mixture.device.type, enabled=False):
            return self.bank.join(estimates, mixture.shape[-1])       # (B, S, C, L)

def mobile_unet(config):
    return baselines.MobileUNet(config.channels, config.width)

# The same on bands of the spectrogram, without filters: the better ones to train from scratch, as
# far as was measured (docs/results.md).

class Bands(nn.Module):
    """A backbone on four bands of its input, which lie side by side as channels.

    (B, C, T, F) -> (B, width, T, F / 4), where F is without the highest bin. BandsHead puts the
    bands together again.
    """

    def __init__(self, config, backbone):
        super().__init__()
        if config.window % (128 * BANDS):
            raise UserError(f"Config: window: for {config.model} a multiple of {128 * BANDS} "
                            f"expected, found {config.window}")
        self.backbone = backbone(dataclasses.replace(
            config, channels=BANDS * config.channels,
            window=config.window // BANDS, hop=config.hop // BANDS))
        self.frame_multiple = self.backbone.frame_multiple

    def forward(self, x):
        x = x.unflatten(-1, (BANDS, -1)).movedim(-2, 1).flatten(1, 2)  # (B, 4 C, T, F / 4)
        return self.backbone(x)                                       # (B, width, T, F / 4)

class BandsHead(nn.Conv2d):
    """A head for each of four bands: (B, width, T, F / 4) -> (B, maps, T, F)."""

    def __init__(self, width, maps, kernel_size):
        super().__init__(width, BANDS * maps, kernel_size)

    def forward(self, x):
        y = super().forward(x)                                        # (B, 4 maps, T, F / 4)
        return y.unflatten(1, (BANDS, -1)).movedim(1, -2).flatten(-2)

def with_middle_and_sides(X):
    """(B, C, T, F) -> (B, 2 C, T, F): of stereo the magnitudes of left, right, middle and side.

    A voice is mostly in the middle, the mean of the channels. In general: the magnitudes of the
    channels, of their mean, and of each channel but the first minus that mean.
    """
    middle = X.mean(dim=1, keepdim=True)
    sides = X[:, 1:] - middle
    return magnitude_of(torch.cat([X, middle, sides], dim=1))

def unet_with_tdf(config):
    """The paper's UNet with a TDF after each block, through which a bin sees all others.

    Its features grow less than the paper's, for most weights are in the inner encoders and decoders
    and most work in the outer ones. Its input is with_middle_and_sides.
    """
    growth = (1, 1.5, 3, 5, 7, 8)                                     # 32, 48, 96, 160, 224, 256
    network = UNet(2 * config.channels, config.width, residual=False, growth=growth)
    bins = config.window // 2
    for i, encoder in enumerate(network.encoders):
        features = encoder[0].out_channels
        decoder = network.decoders[-1 - i]                            # of the same resolution
        network.encoders[i] = nn.Sequential(encoder, baselines.TDF(features, bins >> i))
        decoder.block = nn.Sequential(decoder.block, baselines.TDF(features, bins >> i))
    return network

MODELS |= {
    "Wave-U-Net":       lambda c: WaveformModel(c, baselines.WaveUNet),
    "Wave-U-Net-12":    lambda c: WaveformModel(c, baselines.WaveUNet12),
    "DPRNN":            lambda c: SpectrogramModel(c, baselines.DPRNN),
    "PM-Unet":          lambda c: SpectrogramModel(c, baselines.PMUnet),
    "PM-Unet-conv":     lambda c: SpectrogramModel(c, baselines.PMUnetConv),
    "Open-Unmix":       lambda c: SpectrogramModel(
                            c, baselines.OpenUnmix, "reflect", hops(2700, 300, c.hop)),
    "ResUNetDecouple+-subband": lambda c: Subbands(c, resunet),
    "MobileNet-subband":        lambda c: Subbands(c, mobile_unet),
    "ResUNetDecouple+-bands":   lambda c: Separator(
                                    c, Bands(c, resunet), decouple_plus, BandsHead),
    "UNet-TDF-bands":           lambda c: Separator(
                                    c, Bands(c, unet_with_tdf), complex_mask, BandsHead,
                                    with_middle_and_sides),
}

# ==== II. Using a model ==========================================================================
# Whole songs in constant memory, what is left over of a mixture, SDR, checkpoints, and weights
# that have names.

class UserError(ValueError):
    """Something the user can mend; the scripts print it as one line and exit with code 2."""

def one_line(error):
    return " ".join(str(error).split())[:300] or type(error).__name__

# ---- What people have ---------------------------------------------------------------------------

def whole(value, name, lowest=0):
    """A number without a fraction, from `lowest` on -> int; or UserError."""
    with contextlib.suppress(TypeError, ValueError, OverflowError):
        if int(value) == value and value >= lowest:
            return int(value)
    raise UserError(f"{name}: a whole number from {lowest} on expected, found "
                    f"{reprlib.repr(value)}")

def as_floats(samples, dtype=torch.float32):
    """Samples as people have them, arrays or tensors -> a tensor of floats on the CPU.

    Integers of 16 and 32 bits, as soundfile and scipy read them, become -1 to 1. UserError for
    anything else.
    """
    try:
        if not isinstance(samples, torch.Tensor):
            array = np.asarray(samples)
            samples = np.require(array, array.dtype.newbyteorder("="), "CW")
        x = torch.as_tensor(samples, device="cpu").detach()
    except (TypeError, ValueError, RuntimeError) as error:
        raise UserError(f"an array of samples expected, found {type(samples).__name__}: "
                        f"{one_line(error)}") from error

    full_scale = {torch.int16: 1 << 15, torch.int32: 1 << 31}.get(x.dtype)
    if x.dim() == 0 or not (x.is_floating_point() or full_scale):
        raise UserError("samples as floats, int16 or int32 expected, found "
                        f"{x.dtype}, shape {tuple(x.shape)}")
    return x.to(dtype) / full_scale if full_scale else x.to(dtype)

def as_audio(samples):
    """What as_floats takes, as (C, L) -> (C, L) float32. UserError for other shapes."""
    x = as_floats(samples)
    if x.dim() != 2 or not 1 <= len(x) <= max(8, x.shape[1]):         # or more likely (L, C)
        raise UserError("audio as (C, L), channels first, such as (2, 44100), expected, found "
                        f"shape {tuple(x.shape)}")
    return x

def check_config(config):
    """Raise UserError unless models can be made of what a Config holds; it may be a stranger's.

    Targets become names of files, so only those known here are taken. Lists become tuples.
    """
    def require(holds, name, expected):
        if not holds:
            found = reprlib.repr(getattr(config, name))[:80]          # of any size and depth
            raise UserError(f"Config: {name}: {expected} expected, found {found}")

    known = (*SOURCES, "accompaniment")
    if type(config.targets) is list:
        config.targets = tuple(config.targets)
    targets = config.targets if type(config.targets) is tuple else ()
    named = all(type(name) is str and name in known for name in targets)
    require(targets and named and len(set(targets)) == len(targets), "targets",
            f"a tuple of some of {', '.join(known)}, each once,")
    require(type(config.model) is str and config.model in MODELS, "model",
            f"one of {', '.join(MODELS)}")

    limits = {
        "sample_rate": range(1000, 384_001),                          # Hz
        "channels": range(1, 9),
        "width": range(1, 10_001),
        "window": range(128, 65_537, 128),                            # pooling divides it by 128
    }
    for name, allowed in limits.items():
        value = getattr(config, name)
        steps = f" in steps of {allowed.step}" if allowed.step > 1 else ""
        require(type(value) is int and value in allowed, name,
                f"an int from {allowed[0]} to {allowed[-1]}{steps}")

    # Up to a third of the window, what istft makes is right to the end.
    lowest, highest = config.window // 64, config.window // 3
    require(type(config.hop) is int and lowest <= config.hop <= highest, "hop",
            f"an int from {lowest} to {highest} for a window of {config.window}")

# ---- Whole tracks: blocks in, blocks out --------------------------------------------------------

# 6.39 and 0.63 s. 639 hops make 640 frames, and starts lie 576 apart, which both the pooling's 32
# and 64 divide: all segments are pooled alike, and without padding.
SEGMENT, OVERLAP = 639 * 441, 63 * 441

class Lookahead:
    """A stream of (..., n) tensors, joined; what has been dropped is forgotten."""

    def __init__(self, blocks):
        self.blocks = iter(blocks)
        self.ahead = next(self.blocks)

    def peek(self, n):
        """The next n samples; fewer only where the stream ends."""
        while self.ahead.shape[-1] < n:
            block = next(self.blocks, None)
            if block is None:
                break
            self.ahead = torch.cat([self.ahead, block], dim=-1)
        return self.ahead[..., :n]

    def drop(self, n):
        self.ahead = self.ahead[..., n:]

def device_of(model):
    return next((parameter.device for parameter in model.parameters()), torch.device("cpu"))

def windows_at_once(device):
    """How many fill a device: one a CPU; a GPU 4, or fewer where too little memory is free.

    More gained nothing on an H200. 1.25 GiB for each is what the paper's network needs, in float32.
    """
    if device.type != "cuda":
        return 1
    free, _ = torch.cuda.mem_get_info(device)
    free += torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
    return min(max(free // (5 << 28), 1), 4)

def separate_windows(model, windows, bf16):
    """(B, C, n) on the CPU -> (B, S, C, n) on the CPU; None if the device runs out of memory."""
    device = device_of(model)

    try:
        with torch.inference_mode(), torch.autocast(device.type, torch.bfloat16, enabled=bf16):
            return model(windows.to(device)).float().cpu()
    except RuntimeError as error:
        # torch.OutOfMemoryError, and what the CPU's and MPS's allocators say.
        words = "out of memory|(can't allocate|not enough) memory|ALLOC_FAILED"
        if not re.search(words, str(error)):
            raise

    torch.cuda.empty_cache()                                          # nothing without CUDA
    return None

def check_finite(windows, estimates):
    """Raise UserError, which says whose fault it is, where estimates are NaN or infinite."""
    if torch.isfinite(estimates).all():
        return
    if not torch.isfinite(windows).all():
        raise UserError("finite samples expected in the mixture, found NaN or infinity")
    raise UserError("the model gives NaN or infinite samples: weights that are damaged or have "
                    f"diverged? The mixture is finite, its peak {windows.abs().max():.3g}")

def grid_hop(segment, overlap, stride, fade):
    """Samples between the starts of segments: a multiple of the model's stride if one fits."""
    hop = segment - overlap
    on_grid = hop - hop % stride
    return on_grid if on_grid > fade else hop

def smaller(segment, overlap, count, fade):
    """(windows at once, samples) to try after `count` windows of `segment` were too much."""
    if count > 1:
        return count // 2, segment
    shorter = (segment - overlap) // 2
    if shorter < max(fade, 1):
        raise UserError(f"out of memory even with {segment} samples at once: try a lower "
                        "--overlap, --bf16 or --device cpu")
    return 1, overlap + shorter

def block_lengths(model, segment=None, overlap=None):
    """(segment, overlap) in samples, the model's where None; UserError where they don't fit.

    Of a segment that is shorter than the model's, neighbours share as large a part.
    """
    usual_segment, usual_overlap = model.blocks
    segment = usual_segment if segment is None else whole(segment, "segment", 1)
    if overlap is None:
        overlap = min(usual_overlap, segment * usual_overlap // usual_segment)
    overlap = whole(overlap, "overlap")

    if segment - overlap < max(overlap // 2, 1):
        rate = model.config.sample_rate
        raise UserError(f"--segment of at least 1.5 times --overlap expected, found "
                        f"{segment / rate:g} and {overlap / rate:g} s")
    return segment, overlap

def separate_blocks(model, blocks, segment=None, overlap=None, batch_size=None, bf16=False):
    """Separate a stream of (C, n) blocks -> a stream of (S, C, n') blocks, as long in all.

    The model sees windows of `segment` samples, `batch_size` at once, of which two neighbours
    share `overlap` samples; None: see block_lengths, and as many windows as fill the device.

        a window      ...==========~~~~~~~~~~-----
        the next one          -----~~~~~~~~~~==========...

        = taken from this window   ~ cross-faded   - context for the network only

    If memory runs out, fewer windows go at once, then shorter ones. UserError if that doesn't help,
    for what isn't audio, and where the model's estimates aren't finite.
    """
    segment, overlap = block_lengths(model, segment, overlap)
    batch_size = windows_at_once(device_of(model)) if batch_size is None else batch_size
    batch_size = whole(batch_size, "batch_size", 1)
    fade = overlap // 2
    context = (overlap - fade) // 2

    # ramp + (1 - ramp) = 1: there is nothing to normalise.
    ramp = (torch.arange(fade, dtype=torch.float32, device="cpu") + 0.5) / max(fade, 1)
    channels = model.config.channels
    blocks = (to_channels(as_audio(block), channels) for block in blocks)
    mixture = Lookahead(blocks)                                       # begins with the next window
    tail = None                                                       # (S, C, fade): to fade out
    last = False
    while not last:
        # The next windows; the last one ends where the stream does.
        hop = grid_hop(segment, overlap, model.stride, fade)
        ahead = mixture.peek(segment + (batch_size - 1) * hop + 1)    # (C, n)
        last = ahead.shape[-1] <= segment
        if last:
            windows = ahead[None]                                     # (1, C, n)
        else:
            count = math.ceil((ahead.shape[-1] - segment) / hop)
            windows = ahead.unfold(-1, segment, hop).transpose(0, 1)[:count]  # (B, C, segment)

        estimates = separate_windows(model, windows, bf16)            # (B, S, C, n)
        if estimates is None:
            batch_size, segment = smaller(segment, overlap, len(windows), fade)
            print(f"notice: out of memory; going on with {batch_size} x {segment} samples at once",
                  file=sys.stderr)
            last = False
            continue
        check_finite(windows, estimates)

        # The fade with the window before, what is this window's own, and the next fade's half.
        for y in estimates:                                           # (S, C, n)
            end = y.shape[-1] if last else hop + context
            if tail is None:
                yield y[..., :end]
            else:
                yield torch.lerp(tail, y[..., context:context + fade], ramp)
                yield y[..., context + fade:end]
            tail = y[..., end:end + fade]
        mixture.drop(len(windows) * hop)

def separate_track(model, mixture, segment=None, overlap=None, batch_size=None, bf16=False):
    """(C, L) at the model's rate -> (S, C, L), for any L from 0 on; see separate_blocks.

    The mixture is a tensor or an array, of floats, int16 or int32. Mono is doubled for a stereo
    model, C being the model's channels.
    """
    blocks = separate_blocks(model, [mixture], segment, overlap, batch_size, bf16)
    return torch.cat(list(blocks), dim=-1)

def fold_batch_norms(model):
    """Merge each batch norm that follows a convolution into it -> model, for inference only.

    Faster, and equal up to rounding.
    """
    for module in model.modules():
        if not isinstance(module, (ResBlock, nn.Sequential)):         # their children run in order
            continue
        for (name, conv), (next_name, norm) in itertools.pairwise(module.named_children()):
            is_conv = isinstance(conv, nn.modules.conv._ConvNd)
            if is_conv and isinstance(norm, nn.modules.batchnorm._BatchNorm):
                folded = torch.nn.utils.fusion.fuse_conv_bn_eval(conv, norm, conv.transposed)
                setattr(module, name, folded)
                setattr(module, next_name, nn.Identity())
    return model

# ---- What is left over --------------------------------------------------------------------------

def complement(target):
    """The name of mixture - target."""
    pair = {"vocals": "accompaniment", "accompaniment": "vocals"}
    return pair.get(target, f"no_{target}")

def leftovers(targets, two_stems=None):
    """What else to write: {name: i} for mixture - estimate of targets[i].

    By default (None) only if there is just one target. What is a target itself is left out.
    """
    if not (len(targets) == 1 if two_stems is None else two_stems):
        return {}
    names = {complement(target): i for i, target in enumerate(targets)}
    return {name: i for name, i in names.items() if name not in targets}

def fill_residual(estimates, mixture, residual):
    """Make estimates (S, C, n) add up to the mixture (C, n) by changing the residual target.

    They do at the model's rate, but resampling to the file's loses the highest frequencies. If
    residual is None they are returned as they are.
    """
    if residual is None:
        return estimates
    missing = mixture - estimates.sum(0)
    stems = list(estimates)
    stems[residual] = missing + stems[residual]
    return torch.stack(stems)

def with_complements(mixture, estimates):
    """{target: (C, L)}, with the accompaniment, or the vocals, if that follows from the others."""
    names = tuple(estimates)
    if names in (("vocals",), ("accompaniment",)):
        return {**estimates, complement(names[0]): mixture - estimates[names[0]]}
    if set(SOURCES) <= set(names) and "accompaniment" not in names:
        return {**estimates, "accompaniment": sum(estimates[name] for name in SOURCES[1:])}
    return estimates

# ---- SDR ----------------------------------------------------------------------------------------

def decibels(signal, error):
    """The ratio of two energies in dB: inf without error, -inf without signal, NaN without both."""
    with np.errstate(divide="ignore", invalid="ignore"):
        return 10 * np.log10(np.divide(signal, error))

def sdr(reference, estimate, epsilon=0.0):
    """10 log10(|s|^2 / |y - s|^2) in dB, over all samples and channels of two arrays of one shape.

    `epsilon` is added to both energies. UserError for two shapes.
    """
    s = as_floats(reference, torch.float64).numpy()
    y = as_floats(estimate, torch.float64).numpy()
    if s.shape != y.shape:
        raise UserError(f"two arrays of one shape expected, found {s.shape} and {y.shape}")
    signal = np.vdot(s, s)
    error = np.vdot(y - s, y - s)
    return float(decibels(signal + epsilon, error + epsilon))         # eq. 5

# ---- Checkpoints: one file of plain dicts and tensors -------------------------------------------

@contextlib.contextmanager
def replacing(path):
    """Yield a temporary name that becomes `path` if all goes well: nobody ever sees half a file."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    # Of a long name the end, with its suffix: it must not become longer.
    temporary = path.with_name(f"{partial_prefix()}{path.name[-50:]}")
    try:
        yield temporary
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)

def partial_prefix(pid=None):
    """How the names of this process's unfinished files and folders begin, or of another's."""
    host = re.sub(r"\W", "", socket.gethostname())[:30]               # disks are shared
    return f".partial-{host}-{pid or os.getpid()}-"

def is_running(pid):
    """Whether a process is, or may be; on Windows open files can't be removed anyway."""
    if os.name != "posix":
        return False
    try:
        os.kill(pid, 0)                                               # sends nothing
    except (OSError, OverflowError) as error:
        return not isinstance(error, ProcessLookupError)              # another user's, say
    return True

def remove_partials(folder):
    """Remove from a folder what processes of this machine left there that were killed.

    To be called before this process writes: what has its number was left by an earlier one.
    """
    names = os.listdir(folder) if os.path.isdir(folder) else ()
    for name in names:
        pid = re.match(partial_prefix("PID").replace("PID", r"(\d+)"), name)
        if pid and (int(pid[1]) == os.getpid() or not is_running(int(pid[1]))):
            path = Path(folder, name)
            with contextlib.suppress(OSError):
                shutil.rmtree(path) if path.is_dir() else path.unlink()

def in_8_bits(model):
    """A model's {name: tensor}, in about a fourth of the bytes: for weights to be given away.

    Filters and matrices become whole numbers from -127 to 127, to be multiplied by NAME.unit, one
    float32 for each index of the first axis. The rest, a few numbers, stays.
    """
    parameters = dict(model.named_parameters())
    weights = {}
    for name, value in model.state_dict().items():
        if name not in parameters or value.dim() < 2:
            weights[name] = value
            continue
        value = value.float()
        largest = value.abs().amax(dim=tuple(range(1, value.dim())), keepdim=True)
        unit = largest.clamp(min=1e-30) / 127
        weights[name] = (value / unit).round().to(torch.int8)
        weights[f"{name}.unit"] = unit
    return weights

def units_in(weights):
    """Take NAME.unit out of the weights for each that is in_8_bits -> {NAME: unit}.

    UserError where one is missing or doesn't fit.
    """
    units = {}
    for name in [name for name, value in weights.items() if value.dtype == torch.int8]:
        unit = weights.pop(f"{name}.unit", None)
        expected = [1 if axis else size for axis, size in enumerate(weights[name].shape)]
        if unit is None or unit.dtype != torch.float32 or list(unit.shape) != expected:
            raise UserError(f"{reprlib.repr(name)}: a unit for each first index expected")
        units[name] = unit
    return units

def save_checkpoint(path, config, model, small=False, **state):
    """Write config, weights, and what else a run needs (plain dicts, numbers, tensors) to a file.

    `small`: the weights in_8_bits. All or nothing: where it can't be written, as on a full disk,
    the file that was there stays, and a UserError says why.
    """
    weights = in_8_bits(model) if small else model.state_dict()
    content = {"config": dataclasses.asdict(config), "model": weights, **state}

    try:
        with replacing(path) as temporary, open(temporary, "wb") as file:
            torch.save(content, file)
            file.flush()
            os.fsync(file.fileno())
    except (OSError, RuntimeError) as error:
        while error.__context__:                                      # torch hides the disk's error
            error = error.__context__
        raise UserError(f"{path}: not saved, an older file stays: {one_line(error)}") from error

LOOKALIKES = (          # how files begin that are saved as weights by mistake, and what they are
    (rb"\Z", "an empty file"),
    (rb"(\xef\xbb\xbf)?\s*<(!doctype html|html|!--)", "an HTML page"),
    (rb"version https://git-lfs", "a Git LFS pointer, not the file itself"),
    (rb"\x1f\x8b|BZh|\xfd7zXZ|7z\xbc\xaf|Rar!|\x28\xb5\x2f\xfd", "a compressed file: unpack it"),
    (rb".{8}\{\"", "a file of safetensors"),
    (rb"[\t\n\r -~]+\Z", "a text"),
    (rb"(?!PK|\x80.\x8a)", "no PyTorch file"),      # torch.save writes a zip, or pickles a number
)

def check_kind(path):
    """Raise UserError where the file at `path` is, by its beginning, of another kind."""
    with open(path, "rb") as file:
        head = file.read(200)
    for beginning, kind in LOOKALIKES:
        if re.match(beginning, head, re.DOTALL | re.IGNORECASE):
            raise UserError(kind)

def check_zip(path):
    """Raise UserError where a bit of a checkpoint has changed: torch does not look at checksums.

    Also where its parts claim to be larger than the file, and so could fill the memory.
    """
    with open(path, "rb") as file:
        if file.read(2) != b"PK":                                     # before torch 1.6: no sums
            return
    try:
        with zipfile.ZipFile(path) as file:
            parts = file.infolist()
            names = [part.filename for part in parts]
            if not any(name.endswith("data.pkl") for name in names):  # what torch.save writes
                raise UserError(f"a zip archive of {reprlib.repr(names)}: unpack it")
            if sum(part.file_size for part in parts) > os.path.getsize(path):
                raise UserError("a compressed zip archive: its parts are larger than the file")
            damaged = file.testzip()                                  # 0.2 s for 461 MB
    except zipfile.BadZipFile as error:
        raise UserError("it begins as one, but is cut or damaged") from error
    if damaged:
        raise UserError(f"{reprlib.repr(damaged)} in it is not what was saved")

def weights_in(content):
    """What torch.load gives, anything -> {name: tensor}, or UserError with what it is instead.

    Some files hold more than the weights, some have the prefix of torch's DataParallel.
    """
    for key in ("model", "state_dict"):
        if isinstance(content, dict) and isinstance(content.get(key), dict):
            content = content[key]
    if not isinstance(content, dict):
        raise UserError(f"no weights but one {type(content).__name__}")
    strange = [name for name, value in content.items()
               if type(name) is not str or not isinstance(value, torch.Tensor)]
    if strange or not content:
        found = reprlib.repr(strange) if strange else "nothing"
        raise UserError(f"weights by their names expected, found {found}")
    return {name.removeprefix("module."): value for name, value in content.items()}

def check_weights(weights, path):
    """Raise UserError unless all are plain tensors, no larger together than the file.

    Otherwise a view that repeats a few numbers could claim, and take, any memory.
    """
    for name, value in weights.items():
        plain = value.layout == torch.strided and value.device.type == "cpu"
        counter = value.dim() == 0
        rounded = value.dtype == torch.int8                           # in_8_bits
        if not plain or not (value.is_floating_point() or counter or rounded):
            raise UserError(f"{reprlib.repr(name)}: {value.dtype}, {value.layout}, {value.device}")
    if sum(value.nbytes for value in weights.values()) > os.path.getsize(path):
        raise UserError("its tensors are larger than the file")

def check_names(weights, model):
    """Raise UserError unless the weights have the names and the shapes of the model's."""
    expected = model.state_dict()
    missing = [name for name in expected if name not in weights]
    unexpected = [name for name in weights if name not in expected]
    misshapen = [name for name in expected
                 if name in weights and weights[name].shape != expected[name].shape]
    found = len(expected) - len(missing)
    kinds = {"missing": missing, "unexpected": unexpected, "of another shape": misshapen}
    told = [f"{kind}: {names[0][:80]}{', ...' if len(names) > 1 else ''}"
            for kind, names in kinds.items() if names]
    if told:
        raise UserError(f"{found} of {len(expected)} weights of {model.config.model} found; "
                        f"{'; '.join(told)}")

def config_of(content):
    """A checkpoint's "config", anything -> Config, or UserError with what it is instead."""
    try:
        return Config(**content)
    except TypeError as error:
        raise UserError(f"another program's config: {reprlib.repr(content)}") from error

@contextlib.contextmanager
def reading(path):
    """Whatever fails within is the file's fault, and becomes a UserError that names it."""
    try:
        yield
    except Exception as error:
        # There are a dozen ways for a truncated, foreign or unsafe file to fail here.
        downloaded = Path(path).parent == download_folder()
        advice = "; delete it, and its name downloads it anew" if downloaded else ""
        objects = re.search(r"Unsupported global: GLOBAL (\S+)", str(error))
        reason = f"{type(error).__name__}; --debug tells more"
        if objects:
            reason = f"not weights only, but objects such as {reprlib.repr(objects[1])}"
        if isinstance(error, UserError):
            reason = one_line(error)
        raise UserError(f"{path}: a checkpoint of this program or a file of published weights "
                        f"expected, found a damaged or foreign file ({reason}){advice}"
                        ) from error

def load_checkpoint(path, device="cpu"):
    """Read a checkpoint of ours or published weights (see LAYOUTS) -> (config, model, state).

    The model is in eval mode, on the device. `state` holds all else, such as "step". Raises
    UserError for anything that is no such file. It may be a stranger's: no code in it runs, and
    its sizes are compared with the file's and the model's before memory is taken.
    """
    if not Path(path).is_file():
        near = nearest_name(path)
        meant = f"; {near} is a name" if near else ""
        raise UserError(f"{path}: a checkpoint expected, or a name that separate.py --list-models "
                        f"prints, found no file{meant}")
    with reading(path):
        check_kind(path)
        check_zip(path)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")                           # torch's advice on pickles
            content = torch.load(path, map_location="cpu", weights_only=True)
        weights = weights_in(content)
        check_weights(weights, path)
        units = units_in(weights)
        published = "config" not in content
        if published:
            step = content.get("step")
            sizes, weights = convert_published(weights)
            content = {"config": sizes, "step": step}

    if published:
        content["config"]["targets"] = (target_of(path),)
    with reading(path):
        config = config_of(content.pop("config"))
        with torch.device("meta"):                                    # takes no memory
            model = MODELS[config.model](config)
        check_names(weights, model)
        with torch.no_grad():
            for name, unit in units.items():
                weights[name] = weights[name] * unit
        model.load_state_dict(weights, assign=True)
        content.pop("model", None)

    model = model.to(pick_device(device), torch.float32, memory_format=torch.channels_last)
    return config, model.eval(), content

# ---- Published files: the keys of their weights say which network they are of -------------------

# Their names, ours, and the first number in each of theirs; ours count from 0. In the bottleneck it
# is a letter, read as a hexadecimal digit: a is 10.
RESUNET_NAMES = (
    (r"^bn0", "norm", ()),
    (r"^encoder_block(\d)\.conv_block(\d)", "backbone.encoders.{}.{}", (1, 1)),
    (r"^conv_block7([a-f])\.conv_block(\d)", "backbone.bottleneck.{}.{}", (10, 1)),
    (r"^decoder_block(\d)\.bn1", "backbone.decoders.{}.up.0", (1,)),
    (r"^decoder_block(\d)\.conv1", "backbone.decoders.{}.up.2", (1,)),
    (r"^decoder_block(\d)\.conv_block(\d)", "backbone.decoders.{}.block.{}", (1, 2)),
    (r"^after_conv_block1\.conv_block(\d)", "backbone.after.{}", (1,)),
    (r"\.abn2\.", ".bn2.", ()),
)
MOBILENET_NAMES = (
    (r"^bn0", "norm", ()),
    (r"^encoder_block(\d)\.conv_block", "backbone.encoders.{}", (1,)),
    (r"^conv_block7", "backbone.bottleneck", ()),
    (r"^decoder_block(\d)\.bn1", "backbone.up.{}.0", (1,)),
    (r"^decoder_block(\d)\.conv1", "backbone.up.{}.2", (1,)),
    (r"^decoder_block(\d)\.conv_block2", "backbone.decoders.{}", (1,)),
    (r"^after_conv_block1", "backbone.after", ()),
    (r"\.bn(\d)a\.", ".parts.{}.0.", (1,)),
    (r"\.conv(\d)a\.", ".parts.{}.2.", (1,)),
    (r"\.bn(\d)b\.", ".parts.{}.3.", (1,)),
    (r"\.conv(\d)b\.", ".parts.{}.5.", (1,)),
    (r"\.bn(\d)c\.", ".parts.{}.6.", (1,)),
    (r"\.conv(\d)c\.", ".parts.{}.8.", (1,)),
)

def our_name(name, names):
    """The name of a published parameter, and the network's table of them -> its name here."""
    for pattern, ours, first in names:
        found = re.search(pattern, name)
        if found:
            numbers = [int(digit, 16) - start for digit, start in zip(found.groups(), first)]
            name = name.replace(found[0], ours.format(*numbers))
    return name

def convert_separator(weights, names, bands=1):
    """Of a Separator's network: {published name: value} -> {our name: value}."""
    ours = {}
    for name, value in weights.items():
        if name.startswith(("stft.", "istft.")):                      # Fourier matrices
            continue
        if name.endswith("abn2.weight"):                              # as InPlaceABN uses it
            value = value.abs() + 1e-5
        if name.startswith("after_conv2.") and value.dim():           # the heads, interleaved
            kind = name.removeprefix("after_conv2.")
            number = torch.arange(len(value), device="cpu") // bands % 4
            for k, head in enumerate(("mask", "p_r", "p_i", "q")):
                ours[f"heads.{head}.{kind}"] = value[number == k]
        else:
            ours[our_name(name, names)] = value
    return ours

def convert_subbands(weights, names):
    """Of a Separator's network on four bands, whose filters the file brings."""
    filters = {"pqmf.ana_conv_filter.weight": "bank.analysis",
               "pqmf.syn_conv_filter.weight": "bank.synthesis"}
    inner = {name: value for name, value in weights.items() if name not in filters}
    ours = {f"separator.{name}": value
            for name, value in convert_separator(inner, names, BANDS).items()}
    return ours | {filters[name]: weights[name] for name in filters if name in weights}

def convert_open_unmix(weights):
    """Of one target's network of Open-Unmix; older files hold their STFT's window, too."""
    return {f"backbone.networks.0.{name}": value for name, value in weights.items()
            if name not in ("sample_rate", "stft.window", "transform.0.window")}

class Layout(typing.NamedTuple):
    """How the files of a row of MODELS are read."""
    convert: typing.Callable                    # their {name: value} -> our {name: value}
    sizes: dict                                 # what all of them have in their Config
    wide: str                                   # our name of a weight of (n, width, ...) numbers

BAND = {"window": 512, "hop": 110}
LAYOUTS = {
    "MobileNet-subband": Layout(
        lambda weights: convert_subbands(weights, MOBILENET_NAMES), BAND,
        "separator.heads.q.weight"),
    "Open-Unmix": Layout(
        convert_open_unmix, {"window": 4096, "hop": 1024}, "backbone.networks.0.fc3.weight"),
    "ResUNetDecouple+-subband": Layout(
        lambda weights: convert_subbands(weights, RESUNET_NAMES), BAND,
        "separator.heads.q.weight"),
    "ResUNetDecouple+": Layout(
        lambda weights: convert_separator(weights, RESUNET_NAMES), {}, "heads.q.weight"),
}

@functools.cache
def names_of(row):
    """Our names of the weights in a row's published files."""
    with torch.device("meta"):                                        # takes no memory
        return MODELS[row](Config(row, **LAYOUTS[row].sizes)).state_dict().keys()

def convert_published(weights):
    """A published file's {name: value} -> (what its Config has, but the target; our {name: value}).

    Of the row that most of its names are of; UserError where none is.
    """
    known = {}
    for row, layout in LAYOUTS.items():
        known[row] = layout.convert(weights)
        if known[row].keys() == names_of(row):
            break

    own = [name for name in weights for row in known if name in names_of(row)]
    if own:
        raise UserError("weights with this program's names, but without a config: "
                        f"{own[0][:80]}, ...; mss.save_checkpoint saves both")

    def likeness(row):
        """What is compared: how many names are shared and, of rows with as many, how few aren't."""
        found, expected = known[row].keys(), names_of(row)
        return len(found & expected), -len(found ^ expected)

    row = max(known, key=likeness)
    if not likeness(row)[0]:
        found = ", ".join(name[:80] for name in list(weights)[:3])
        raise UserError(f"weights of none of {', '.join(LAYOUTS)}: {found}, ...")
    ours, layout = known[row], LAYOUTS[row]
    sizes = {"model": row, **layout.sizes}
    if layout.wide in ours and ours[layout.wide].dim() > 1:
        sizes["width"] = ours[layout.wide].shape[1]
    return sizes, ours

def target_of(path):
    """The target of a published file, which its name alone tells; UserError where it doesn't."""
    words = re.split("[^a-z]+", Path(path).name.lower())
    targets = [name for name in (*SOURCES, "accompaniment") if name in words]
    if len(targets) != 1:
        raise UserError(f"{path}: a file name that tells the target expected, such as vocals.pth, "
                        f"found {' and '.join(targets) or 'none'} in it")
    return targets[0]

# ---- Weights by name ----------------------------------------------------------------------------

class File(typing.NamedTuple):
    name: str
    size: int | None = None                     # bytes, as far as known
    hash: str = ""                              # of its kind, or how it begins
    kind: str = "sha256"

@dataclasses.dataclass(frozen=True)
class Published:
    """Weights that are downloaded when they are first used, and what is known about them."""
    sdr: dict                                   # target -> dB (museval, MUSDB18 test), as is said
    said_by: str
    size: str                                   # of all files, for people
    licence: str
    record: int                                 # of zenodo.org
    files: tuple                                # of File: one, or one for each target

FILE_NAME = "the file's name"
BY_OTHERS = "CC BY 4.0 by two other projects' account, not seen here; trained on MUSDB18"
PUBLISHED = {
    "paper": Published(
        {"vocals": 8.9}, FILE_NAME, "461 MB", "for non-commercial use; trained on MUSDB18", 5513378,
        (File("resunet143_ismir2021_vocals_8.9dB_350k_steps.pth",
              hash="0fa735205731b9685c63ce5c83e9469eff934f1c20dfd2260b4182194afedb96"),)),
    "paper-accompaniment": Published(
        {"accompaniment": 16.8}, FILE_NAME, "461 MB", "for non-commercial use; trained on MUSDB18",
        5513378,
        (File("resunet143_ismir2021_accompaniment_16.8dB_350k_steps.pth", 461_250_888,
              "a81ecdb0095ae6bb4433d6b3e4e0a30e57a1fbf5c931c950c20247d14fa1efd5"),)),
    "paper-fast": Published(
        {"vocals": 8.7}, FILE_NAME, "414 MB", BY_OTHERS, 5804160,
        (File("resunet143_subbtandtime_vocals_8.7dB_500k_steps_v2.pth", 414_046_363),)),
    "paper-fast-accompaniment": Published(
        {"accompaniment": 16.4}, FILE_NAME, "414 MB", BY_OTHERS, 5804160,
        (File("resunet143_subbtandtime_accompaniment_16.4dB_500k_steps_v2.pth", 414_036_369),)),
    "paper-small": Published(
        {"vocals": 7.2}, FILE_NAME, "4.6 MB", BY_OTHERS, 5804160,
        (File("mobilenet_subbtandtime_vocals_7.2dB_500k_steps_v2.pth", 4_621_773,
              "197abd4c514fcc92bd22fb1fe77d5f3a", "md5"),)),
    "paper-small-accompaniment": Published(
        {"accompaniment": 14.6}, FILE_NAME, "4.6 MB", BY_OTHERS, 5804160,
        (File("mobilenet_subbtandtime_accompaniment_14.6dB_500k_steps_v2.pth", 4_621_773),)),
    "umxl": Published(
        {"vocals": 7.21, "bass": 6.02, "drums": 7.15, "other": 4.89}, "its authors",
        "4 files of 113 MB", "CC BY-NC-SA 4.0: for non-commercial use; trained on extra data",
        5069601,
        (File("vocals-bccbd9aa.pth", hash="bccbd9aa"),
         File("bass-2ca1ce51.pth", hash="2ca1ce51"),
         File("drums-69e0ebd4.pth", hash="69e0ebd4"),
         File("other-c8c5b3e6.pth", hash="c8c5b3e6"))),
    "umxhq": Published(
        {"vocals": 6.25, "bass": 5.07, "drums": 6.04, "other": 4.28}, "its authors",
        "4 files of 36 MB", "MIT by a copy's card, not seen here; trained on MUSDB18-HQ", 3370489,
        (File("vocals-b62c91ce.pth", hash="b62c91ce"),
         File("bass-8d85a5bd.pth", hash="8d85a5bd"),
         File("drums-9619578f.pth", hash="9619578f"),
         File("other-b52fbbf7.pth", hash="b52fbbf7"))),
}
NAMES = ("default", *PUBLISHED, "bundled")      # of weights; the first is one of the others
ZENODO = "https://zenodo.org/records"

def nearest_name(word):
    """The name of weights that a mistyped word may stand for, or None."""
    near = difflib.get_close_matches(str(word).lower(), NAMES, n=1)
    return near[0] if near else None

def zenodo_url(record, file_name):
    return f"{ZENODO}/{record}/files/{file_name}?download=1"

def download_folder():
    return Path(torch.hub.get_dir(), "checkpoints")

def cached(file):
    """Where a published File lies, or would."""
    return download_folder() / file.name

def hash_of(path, kind="sha256"):
    """The hash of a file of any size, as hexadecimal digits."""
    digest = hashlib.new(kind)
    with open(path, "rb") as file:
        while block := file.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()

def check_file(path, file):
    """Raise UserError where the file at `path` isn't the File, as far as its size, hash are known.

    0.4 s of one slow core for 461 MB, a fourth of the time that loading it takes.
    """
    size = path.stat().st_size
    if file.size is not None and size != file.size:
        raise UserError(f"{file.size} bytes expected, found {size}")
    found = hash_of(path, file.kind) if file.hash else ""
    if not found.startswith(file.hash):
        raise UserError(f"{file.kind} {file.hash} expected, found {found}")

def download(file, url):
    """Put the File into the cache, whole, or raise what urllib does, or UserError."""
    remove_partials(download_folder())
    with replacing(cached(file)) as temporary:
        torch.hub.download_url_to_file(url, temporary, progress=on_terminal(sys.stderr))
        check_file(temporary, file)
        if not file.hash:
            print(f"notice: {file.name}: its {file.kind} is {hash_of(temporary, file.kind)}; "
                  "nothing is known to compare it with", file=sys.stderr)

def fetch(name, timeout):
    """The files of a name of PUBLISHED, downloaded unless they are in torch.hub's cache -> paths.

    `timeout`: s without a single byte. Raises UserError for files of another size or hash, and
    where the download fails: then nothing of the file stays.
    """
    published = PUBLISHED[name]
    for file in published.files:
        path = cached(file)
        if path.exists():
            try:
                check_file(path, file)
            except UserError as error:
                raise UserError(f"{name}: {path}: {error}; delete it to download it anew"
                                ) from error
            continue

        url = zenodo_url(published.record, file.name)
        print(f"downloading {url} ({published.size}) to {path}", file=sys.stderr)
        socket.setdefaulttimeout(timeout)
        try:
            download(file, url)
        except (OSError, RuntimeError, UserError, http.client.HTTPException) as error:
            known = f" ({file.kind} {file.hash})" if file.hash else ""
            raise UserError(f"{name}: not downloaded: {one_line(error)}; try again, or put "
                            f"{url}{known} at {path} by hand") from error
    return [cached(file) for file in published.files]

def checkpoint_paths(name):
    """A name or a path -> the files, several for the networks of several targets. See fetch."""
    if name == "default":
        name = choose_default()
    if name == "bundled":
        return [Path(__file__).resolve().with_name("weights") / "vocals.pt"]
    return fetch(name, timeout=60) if name in PUBLISHED else [Path(name)]

def checkpoint_path(name):
    """A name or a path -> the file. UserError for a name of several: checkpoint_paths has them."""
    path, *others = checkpoint_paths(name)
    if others:
        raise UserError(f"{name}: a name of one file expected, found {len(others) + 1}")
    return path

def within(seconds, work):
    """What work() returns or raises; TimeoutError if it takes longer, which goes on by itself.

    In a thread: name look-ups know no timeout, and a download's is for every read of it.
    """
    answer = queue.SimpleQueue()

    def do():
        try:
            answer.put((work(), None))
        except Exception as error:                                    # it's raised below
            answer.put((None, error))

    threading.Thread(target=do, daemon=True).start()
    try:
        result, error = answer.get(timeout=seconds)
    except queue.Empty:
        raise TimeoutError(f"no answer within {seconds:g} s") from None
    if error:
        raise error
    return result

PATIENCE = 6            # s until a server has to answer; its 4.6 MB may take ten times as long

def choose_default():
    """The name of the weights that are used without -m; stderr tells which they are, and why.

    The best of a few megabytes, if they are in the cache or can be had now; else the bundled ones.
    """
    name = "paper-small"
    published = PUBLISHED[name]
    try:
        file, = published.files
        if not cached(file).exists():
            url = zenodo_url(published.record, file.name)
            within(PATIENCE, lambda: urllib.request.urlopen(url, timeout=60).close())
        path, = within(10 * PATIENCE, lambda: fetch(name, timeout=10))
        load_checkpoint(path)
    except (UserError, OSError, http.client.HTTPException) as error:
        reason = re.sub("<urlopen error (.*)>", r"\1", one_line(error))
        print(f"notice: -m bundled is used: {name} can't be had ({reason})", file=sys.stderr)
        return "bundled"
    print(f"notice: -m {name}, by the paper's authors: vocals {published.sdr['vocals']} dB SDR by "
          f"{published.said_by}; better: -m paper, 461 MB", file=sys.stderr)
    return name

def without_default(names):
    """The names, with what "default" stands for now."""
    return [choose_default() if name == "default" else name for name in names]

def joint_config(models):
    """The Config of several models' targets. UserError where they don't fit."""
    configs = [model.config for model in models]
    targets = [target for config in configs for target in config.targets]
    formats = {f"{config.sample_rate} Hz {config.channels} ch" for config in configs}
    if len(set(targets)) < len(targets) or len(formats) > 1:
        found = ", ".join([*targets, *formats])
        raise UserError(f"-m: different targets, one format expected, found {found}")
    return dataclasses.replace(configs[0], targets=tuple(targets))

def check_targets(names, targets):
    """Raise UserError where two of the names have the same one of their targets."""
    givers = {}
    for name, of_name in zip(names, targets):
        for target in of_name:
            givers.setdefault(target, []).append(str(name))
    found = [f"{target} in {' and '.join(names)}" for target, names in givers.items()
             if len(names) > 1]
    if found:
        raise UserError(f"-m: each target in one model expected, found {', '.join(found)}")

class Together(Model):
    """Several models on the same mixture: (B, C, L) -> (B, S1 + S2 + ..., C, L)."""

    def __init__(self, models):
        # The longest stride, for a common multiple of all could be longer than a segment; the
        # shortest blocks, for longer ones could be too much for another model's memory.
        super().__init__(joint_config(models), stride=max(model.stride for model in models),
                         blocks=min(model.blocks for model in models))
        self.models = nn.ModuleList(models)

    def forward(self, mixture):
        return torch.cat([model(mixture) for model in self.models], dim=1)

def join_open_unmix(models):
    """Models of Open-Unmix -> one, whose targets' sum is known: it filters."""
    with torch.device("meta"):                                        # takes no memory
        joint = MODELS["Open-Unmix"](joint_config(models))
    joint.backbone.networks = nn.ModuleList(
        network for model in models for network in model.backbone.networks)
    return joint.eval()

def load_model(name, device="cpu"):
    """A checkpoint by path or name -> its model, of several files one for all targets."""
    models = [load_checkpoint(path, device)[1] for path in checkpoint_paths(name)]
    return models[0] if len(models) == 1 else join_open_unmix(models)

def load_models(names, device="cpu"):
    """Checkpoints by path or name -> one model for all their targets, ready for inference."""
    names = [names] if isinstance(names, (str, Path)) else names
    # What is known beforehand is checked before hundreds of megabytes are downloaded.
    named = [name for name in names if name in PUBLISHED]
    check_targets(named, [PUBLISHED[name].sdr for name in named])
    models = [fold_batch_norms(load_model(name, device)) for name in names]
    check_targets(names, [model.config.targets for model in models])

    open_unmix = [model for model in models if model.config.model == "Open-Unmix"]
    if len(open_unmix) > 1:
        others = [model for model in models if model.config.model != "Open-Unmix"]
        models = [join_open_unmix(open_unmix), *others]
    return models[0] if len(models) == 1 else Together(models)

# ==== III. Songs =================================================================================
# MUSDB18, MUSDB18-HQ and any data in their layout; augmentations; and training examples, which are
# a pure function of a seed and a number.

VALID = (                                       # the 14 songs of train that MUSDB18 validates with
    "Actions - One Minute Smile", "Clara Berry And Wooldog - Waltz For My Victims",
    "Johnny Lokke - Promises & Lies", "Patrick Talbot - A Reason To Leave", "Triviul - Angelsaint",
    "Alexander Ross - Goodbye Bolero", "Fergessen - Nos Palpitants", "Leaf - Summerghost",
    "Skelpolu - Human Mistakes", "Young Griffo - Pennies", "ANiMAL - Rockshow",
    "James May - On The Line", "Meaxic - Take A Step", "Traffic Experiment - Sirens")

SUMS = {                # a source without a file of its own -> those that may make it up
    "accompaniment": (SOURCES[1:],),
    "mixture": (SOURCES, ("vocals", "accompaniment")),
}
STEMS = (".wav", ".flac", ".ogg", ".mp3")       # what a stem's name may end in, the first first

@dataclasses.dataclass(frozen=True)
class Track:
    """One song: its files by source, and what these have in common."""
    name: str
    files: dict                                 # source -> path
    frames: int                                 # samples, of the longest file
    sample_rate: int                            # Hz
    channels: int                               # the most that a file has
    shortest: int                               # samples of the shortest file; silence follows it

    def parts(self, source):
        """The names of the files that are, or make up, a source; none where it can't be had."""
        for names in ((source,), *SUMS.get(source, ())):
            if all(name in self.files for name in names):
                return names
        return ()

    def load(self, source, start=0, frames=-1):
        """(C, L) float32 of a stem, "accompaniment" or "mixture"; UserError where it can't be had.

        The latter two are the sums of stems where they have no file. Where a file is shorter than
        the song, silence follows.
        """
        names = self.parts(source)
        if not names:
            raise UserError(f"{self.name}: {source} expected, found {', '.join(self.files)}")
        left = max(0, self.frames - start)
        count = left if frames < 0 else min(frames, left)

        total, *others = (self.load_file(name, start, count) for name in names)
        for audio in others:
            total += audio
        return total

    def load_file(self, name, start, count):
        audio, _ = read_audio(self.files[name], start, count)
        audio = to_channels(audio, self.channels)
        return F.pad(audio, (0, count - audio.shape[1]))

def find_stems(folder):
    """A folder's files named after a source, in capitals or not -> {source: path}."""
    found = {path.name.lower(): path for path in sorted(folder.iterdir()) if path.is_file()}
    files = {}
    for source in (*SOURCES, "accompaniment", "mixture"):
        paths = [found[source + suffix] for suffix in STEMS if source + suffix in found]
        if paths:
            files[source] = paths[0]
    return files

def open_track(folder, name=None):
    """A song's folder -> Track, named as the folder is by default.

    UserError where it has no stem, or where its files are of several sample rates.
    """
    files = find_stems(folder)
    if set(files) <= {"mixture"}:
        names = ", ".join(sorted(path.name for path in folder.iterdir())) or "an empty folder"
        raise UserError(f"{folder}: {', '.join(SOURCES)} or accompaniment expected (.wav, .flac, "
                        f".ogg or .mp3), found {names}")
    lengths, channels, rates = [], [], {}
    for path in files.values():
        with open_audio(path) as file:
            lengths.append(file.frames)
            channels.append(file.channels)
            rates[path.name] = file.samplerate
    if len(set(rates.values())) > 1:
        found = ", ".join(f"{name} {rate} Hz" for name, rate in rates.items())
        raise UserError(f"{folder}: files of one sample rate expected, found {found}")
    rate, = set(rates.values())
    return Track(name or folder.name, files, max(lengths), rate, max(channels), min(lengths))

@contextlib.contextmanager
def new_folder(folder):
    """Yield a temporary folder that becomes `folder` if all goes well: never half a song."""
    folder.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=partial_prefix(), dir=folder.parent) as temporary:
        work = Path(temporary, "song")
        work.mkdir()
        yield work
        if not folder.is_dir():                                       # made by another process
            work.rename(folder)

STEM_MP4 = ("mixture", "drums", "bass", "other", "vocals")            # its streams

def decode_stem_mp4(path, folder):
    """Decode the five streams of a .stem.mp4 to WAV: int16, as museval's own numbers were made."""
    outputs = []
    for i, source in enumerate(STEM_MP4):
        outputs += ["-map", f"0:a:{i}", "-c:a", "pcm_s16le", folder / f"{source}.wav"]
    run_ffmpeg(path, *outputs)

def decode_stems(song, folder):
    """Decode the flac or ogg stems of a song's folder to WAV, without any loss."""
    for source, path in find_stems(song).items():
        with open_audio(path) as file:
            is_int16 = file.subtype == "PCM_16"                       # stays so, to the bit
            subtype = "PCM_16" if is_int16 else "FLOAT"
            wav = folder / f"{source}.wav"
            with write_blocks(wav, file.samplerate, file.channels, file.frames, subtype) as write:
                for block in read_blocks(file):
                    write((block * 32768).short() if is_int16 else block)

def decoded(song, place):
    """A song's folder, or .stem.mp4, as a Track of WAV files in `place`: of now, or of earlier.

    The folder's name follows from the paths, sizes and times of the song's files: what has changed
    since, or is another dataset's song of that name, is decoded anew. So is a copy that is broken.
    """
    stems = find_stems(song) if song.is_dir() else dict.fromkeys(STEM_MP4, song)
    facts = [(str(path), path.stat().st_size, path.stat().st_mtime_ns) for path in stems.values()]
    key = hashlib.sha256(repr(facts).encode()).hexdigest()[:12]
    name = song.name if song.is_dir() else song.name[:-len(".stem.mp4")]
    folder = place / f"{name} {key}"

    with contextlib.suppress(UserError, OSError):
        track = open_track(folder, name)
        if set(track.files) == set(stems):
            return track

    shutil.rmtree(folder, ignore_errors=True)
    remove_partials(place)
    try:
        with new_folder(folder) as work:
            decode_stems(song, work) if song.is_dir() else decode_stem_mp4(song, work)
    except OSError as error:
        raise UserError(f"{folder}: not written: {error.strerror}; --cache says where else songs "
                        "may be decoded to") from error
    print(f"decoded {song.name} -> {folder}", file=sys.stderr)
    return open_track(folder, name)

def musdb_root(root):
    """The dataset's folder: `root`, or its parent where that is meant. UserError without one."""
    root = Path(os.path.realpath(os.path.expanduser(root)))
    if not root.is_dir():
        raise UserError(f"{root}: a folder that holds train/ and test/ expected, found no folder")
    subsets = ("train", "valid", "test")
    if root.name in subsets and not any((root / name).is_dir() for name in subsets):
        print(f"notice: {root} is a subset; using {root.parent} as the dataset", file=sys.stderr)
        return root.parent
    return root

def musdb_songs(root, subset):
    """The songs of a subset -> {name: its folder or .stem.mp4 file}. UserError without any."""
    by_title = subset != "test" and not (root / "valid").is_dir()     # MUSDB18 has no valid/
    folder = root / ("train" if by_title else subset)
    songs = {}
    for path in sorted(folder.iterdir()) if folder.is_dir() else ():
        is_stems = path.name.lower().endswith(".stem.mp4")
        name = path.name[:-len(".stem.mp4")] if is_stems else path.name
        is_song = path.is_dir() or is_stems
        if not is_song or name.startswith((".", "__MACOSX")):
            continue

        if not by_title or (name in VALID) == (subset == "valid"):
            songs[name] = path
    if songs:
        return songs

    place = folder if folder.is_dir() else root
    found = ", ".join(path.name for path in sorted(place.iterdir())[:5]) or "an empty folder"
    expected = (f"{subset}/Artist - Title/{{vocals,bass,drums,other}}.wav or "
                f"{subset}/Artist - Title.stem.mp4")
    if subset == "valid":
        expected += ", or some of MUSDB18's 14 validation songs in train/"
    raise UserError(f"{place}: no songs for '{subset}': {expected} expected, found {found}")

def check_rates(tracks, rate):
    """Raise UserError, with the names of all that are at fault, where songs have another rate."""
    others = [track for track in tracks if track.sample_rate != rate]
    if others:
        names = ", ".join(track.name for track in others)
        found = ", ".join(sorted({f"{track.sample_rate} Hz" for track in others}))
        raise UserError(f"{names}: {rate} Hz expected, found {found}")

def musdb_tracks(root, subset, cache=None):
    """The songs of `subset` ("train", "valid" or "test") below `root` -> list of Track, by name.

    ROOT/{train,test}/Artist - Title/vocals.wav ..., or ROOT/{train,test}/Artist - Title.stem.mp4,
    which are decoded once to `cache` (by default ROOT-wav beside ROOT). Where a cache is given,
    so are flac, ogg and mp3 stems, which take ten times as long to read as wav. Validation songs
    are those of ROOT/valid, or else the 14 official ones of train. Songs to train on may lack
    stems. Raises UserError for a wrong layout, or for all songs that can't be used, with what was
    expected and what was found.
    """
    root = musdb_root(root)
    songs = musdb_songs(root, subset)
    place = Path(cache) if cache else root.with_name(root.name + "-wav")
    tracks, errors = [], []
    for name, path in songs.items():
        try:
            is_wav = path.is_dir() and all(stem.suffix.lower() == ".wav"
                                           for stem in find_stems(path).values())
            as_it_is = is_wav or (path.is_dir() and not cache)
            track = open_track(path) if as_it_is else decoded(path, place / path.parent.name)
            if subset != "train" and not is_whole(track):
                raise UserError(f"{path}: vocals and accompaniment, or {', '.join(SOURCES)} "
                                f"expected, found {', '.join(track.files)}")
            tracks.append(track)
        except UserError as error:
            errors.append(one_line(error))

    if errors:
        raise UserError("; ".join(errors))
    notice_odd_songs(root / subset, tracks)
    return tracks

def is_whole(track):
    """Whether a song has vocals and accompaniment, so that it can be scored."""
    return bool(track.parts("vocals") and track.parts("accompaniment"))

def notice_odd_songs(place, tracks):
    """One line for each way in which songs are not as in MUSDB."""
    odd = {
        "lack stems: each source is drawn from the songs that have it":
            [track.name for track in tracks if not is_whole(track)],
        "have stems of unequal length: silence is added to the shorter ones":
            [track.name for track in tracks if track.shortest < track.frames],
    }
    for what, names in odd.items():
        if names:
            print(f"notice: {place}: {len(names)} of {len(tracks)} songs {what} (the first: "
                  f"{names[0]})", file=sys.stderr)

# ---- Augmentations: (C, L), random numbers -> (C, L') -------------------------------------------

def shift(x, rng):
    """Begin up to 8192 samples later."""
    return x[:, rng.integers(min(8192, x.shape[1]) + 1):]

def stretch(audio, percent):
    """(C, L) -> (C, L * percent / 100, or some more) of the same pitch: a phase vocoder."""
    window, hop = 2048, 512
    hann = torch.hann_window(window, dtype=audio.dtype, device=audio.device)
    padded = F.pad(audio, (0, window))
    X = torch.stft(padded, window, hop, window=hann, return_complex=True)         # (C, F, T)

    # Magnitudes between frames are interpolated.
    frames = (X.shape[2] - 1) * percent // 100
    t = torch.arange(frames, dtype=audio.dtype, device=audio.device)
    t = t * (100 / percent)                                           # where they lie in X
    i = t.long()
    size = X.abs()
    magnitude = torch.lerp(size[..., i], size[..., i + 1], t - i)

    # Phases advance from one new frame to the next as they do around it in X, in all channels
    # alike. In the middle they are X's own, for at the ends there are reflections.
    turns = (X[..., 1:] * X[..., :-1].conj()).sum(0).angle()          # (F, T - 1)
    advance = turns[:, i].cumsum(1) - turns[:, i]
    drift = advance - F.pad(turns, (1, 0)).cumsum(1)[:, i]
    phase = X.angle()[..., i] + drift - drift[:, frames // 2, None]
    return torch.istft(torch.polar(magnitude, phase), window, hop, window=hann)

def transpose(audio, percent):
    """(C, L) -> (C, L) at percent / 100 of the pitch."""
    return resample(stretch(audio, percent), percent, 100)[:, :audio.shape[1]]

def pitch(x, rng):
    """Up to 5 semitones down or up, in the same time."""
    return transpose(x, int(rng.integers(75, 134)))

def speed(x, rng):
    """0.8 to 1.3 times as fast, pitch too."""
    return resample(x, int(rng.integers(80, 131)), 100)

def second(x, rng):
    """A second voice: the same a third, fourth or fifth off, or in unison; later and softer."""
    semitones = int(rng.choice((-5, -4, -3, 0, 3, 4, 5)))
    voice = transpose(x, round(100 * 2 ** (semitones / 12)))
    late = min(int(rng.integers(441, 1764)), x.shape[1])
    return x + rng.uniform(0.3, 1) * F.pad(voice, (late, 0))[:, :x.shape[1]]

def transform_size(samples):
    """A size for an FFT of so many samples or some more: a multiple of a large power of two."""
    return math.ceil(samples / 4096) * 4096

def octaves(size):
    """How many octaves below the highest frequency each bin of an rfft of `size` samples is."""
    return -np.log2(np.linspace(1 / size, 1, size // 2 + 1))

def equalizer(x, rng):
    """A random gain for each octave, of up to 6 dB; in between it is interpolated."""
    size = transform_size(x.shape[1] + 1)
    decibels = np.interp(octaves(size), np.arange(10), rng.uniform(-6, 6, 10))
    response = torch.from_numpy(10 ** (decibels / 20)).to(x.dtype)
    return torch.fft.irfft(torch.fft.rfft(x, size) * response, size)[:, :x.shape[1]]

def room(x, rng):
    """A made-up room: what follows each sound is noise that decays by 60 dB in 0.2 to 1.5 s."""
    length = int(44100 * rng.uniform(0.2, 1.5))
    decay = 10 ** (-3 * np.arange(length, dtype="float32") / length)
    noise = torch.from_numpy(rng.standard_normal((len(x), length), "float32") * decay)
    size = transform_size(x.shape[1] + length)

    # The walls take the high frequencies first.
    dull = 1 / (1 + 2 ** (rng.uniform(1, 3) - octaves(size)))
    tail = torch.fft.rfft(noise, size) * torch.from_numpy(dull).float()
    tail *= 10 ** (rng.uniform(-24, -6) / 20) / tail.abs().square().mean().sqrt()
    return torch.fft.irfft(torch.fft.rfft(x, size) * (1 + tail), size)[:, :x.shape[1]]

def swap(x, rng):
    """Left and right exchanged."""
    return x.flip(0)

def flip(x, rng):
    """The sign inverted."""
    return -x

def gain(x, rng):
    return x * rng.uniform(0.25, 1.25)

def part(x, rng, low, high):
    """The indices of a random stretch of x, from `low` to `high` of its length."""
    length = int(x.shape[1] * rng.uniform(low, high))
    return torch.arange(length, device=x.device) + int(rng.integers(x.shape[1] - length + 1))

def mask(x, rng):
    """Silence for up to 2 s."""
    longest = min(1, 88200 / max(1, x.shape[1]))
    return x.index_fill(1, part(x, rng, 0, longest), 0)

def mono(x, rng):
    """The left or the right channel in both."""
    channel = int(rng.integers(len(x)))
    return x[[channel] * len(x)]

def reverse(x, rng):
    """20 to 40 % of it backwards."""
    places = part(x, rng, 0.2, 0.4)
    return x.index_copy(1, places, x[:, places.flip(0)])

def silence(x, rng):
    """Nothing of this source: songs without voice, and voices without a band."""
    return torch.zeros_like(x)

class Augmentation(typing.NamedTuple):
    function: typing.Callable
    probability: float                          # for each segment of each source
    vocals_only: bool = False
    before_cut: bool = False                    # needs, or leaves, more than a segment's length
    of_sum: bool = False                        # of the source's segments together, not of each

AUGMENTATIONS = {                               # optional; applied in this order
    "shift": Augmentation(shift, 0.5, before_cut=True),
    "pitch": Augmentation(pitch, 0.2, before_cut=True, vocals_only=True),
    "speed": Augmentation(speed, 0.2, before_cut=True),
    "second": Augmentation(second, 0.2, vocals_only=True),
    "equalizer": Augmentation(equalizer, 0.7),
    "room": Augmentation(room, 0.5, vocals_only=True),
    "swap": Augmentation(swap, 0.5),
    "flip": Augmentation(flip, 0.5),
    "gain": Augmentation(gain, 1.0),
    "mask": Augmentation(mask, 0.1),
    "mono": Augmentation(mono, 0.1),
    "reverse": Augmentation(reverse, 0.2, vocals_only=True),
    "silence": Augmentation(silence, 0.1, of_sum=True),
}

# ---- Training examples --------------------------------------------------------------------------

class Segments(torch.utils.data.Dataset):
    """Training examples without an end: [i] -> (mixture (C, L), targets (S, C, L)).

    A pure function of (seed, i). Each source comes from random songs of its own (random remix);
    `mix_audio` segments of it are summed, of bass only one (mix-audio, section 4.2); the mixture
    is the sum of the sources. Where a song turns out to be unreadable it is named, counted in
    `unreadable`, which all workers share, and the next draw stands in; UserError after ten in a
    row. Songs need not hold all sources.
    """

    def __init__(self, tracks, config, seconds=3.0, mix_audio=2, augment=(), seed=0):
        check_rates(tracks, config.sample_rate)
        self.tracks = tracks
        self.config = config
        self.mix_audio = mix_audio
        self.augment = augment
        self.seed = seed

        # `speed` and `shift` leave less than they are given.
        self.length = round(seconds * config.sample_rate)
        longer = self.length * (1.3 if "speed" in augment else 1)
        self.read_length = math.ceil(longer) + (8192 if "shift" in augment else 0)

        # As in the published code, these two are learned as a pair.
        pair = ("vocals", "accompaniment")
        self.sources = pair if set(config.targets) <= set(pair) else SOURCES

        # For each source, positions of all songs in a row, each song up to its end; none in a song
        # that lacks the source.
        self.ends = {}
        for source in self.sources:
            positions = [max(1, track.frames - self.read_length + 1) if track.parts(source) else 0
                         for track in tracks]
            self.ends[source] = np.cumsum(positions)
            if not any(positions):
                raise UserError(f"songs with {source} expected, found none in {len(tracks)}")
        self.unreadable = torch.zeros(len(tracks), dtype=torch.int64, device="cpu").share_memory_()

    def draw(self, source, rng):
        """A random (song's number, first sample): all positions of all songs are equally likely."""
        ends = self.ends[source]
        position = int(rng.integers(ends[-1]))
        k = int(np.searchsorted(ends, position, side="right"))
        first = int(ends[k - 1]) if k > 0 else 0
        return k, position - first

    def augmented(self, audio, source, rng, of_sum=False):
        """(C, read_length) -> (C, length); what a short song lacks is silence."""
        for name, augmentation in AUGMENTATIONS.items():
            if name not in self.augment or augmentation.of_sum != of_sum:
                continue
            drawn = rng.random() < augmentation.probability
            if drawn and (source == "vocals" or not augmentation.vocals_only):
                x = audio if augmentation.before_cut else audio[:, :self.length]
                audio = augmentation.function(x, rng)
        audio = audio[:, :self.length]
        return F.pad(audio, (0, self.length - audio.shape[-1]))

    def segment(self, source, rng):
        """A random segment of `source`, from a song that can be read -> (C, L)."""
        for attempt in range(1, 11):
            k, start = self.draw(source, rng)
            try:
                audio = self.tracks[k].load(source, start, self.read_length)
                break
            except (OSError, RuntimeError, UserError) as error:
                name = self.tracks[k].name
                if attempt == 10:
                    raise UserError(f"{name}: {one_line(error)}") from error

                if not self.unreadable[k]:
                    print(f"notice: another song instead of {name}: {one_line(error)}",
                          file=sys.stderr, flush=True)
                self.unreadable[k] += 1
        return self.augmented(to_channels(audio, self.config.channels), source, rng)

    def __getitem__(self, i):
        rng = np.random.default_rng((self.seed, i))
        sources = {}
        for name in self.sources:
            count = 1 if name == "bass" else self.mix_audio
            audio = sum(self.segment(name, rng) for _ in range(count))
            sources[name] = self.augmented(audio, name, rng, of_sum=True)

        mixture = sum(sources.values())
        sources.setdefault("accompaniment", mixture - sources["vocals"])
        targets = torch.stack([sources[name] for name in self.config.targets])
        return mixture, targets

# ==== IV. Files and scripts ======================================================================
# Audio files, resampling, and what the commands share. Arrays are (L, C) only inside read_samples
# and write_blocks; everywhere else audio is (C, L).

# Endings of the files that are read where a folder is searched: by soundfile, and by ffmpeg.
AUDIO = {"." + ending for ending in (
    "wav wave bwf rf64 w64 flac ogg oga opus spx mp3 mp2 mp1 mpga aif aiff aifc au snd caf voc svx "
    "8svx iff sf ircam paf pvf avr nist sph wve "
    "m4a m4b m4r m4v mp4 aac adts alac mka mkv weba webm mov qt wv ape tta tak mpc wma wmv asf avi "
    "flv mpg mpeg vob m2ts ogv 3gp 3ga 3g2 amr awb ac3 eac3 dts ra rm dsf dff shn gsm").split()}
# Endings of music and sound that neither of them reads.
OTHER_AUDIO = {"." + ending for ending in (
    "mid midi kar rmi xm s3m m4p aa aax aaxc ofr ofs la raw pcm sd2 vox band aup aup3").split()}

BLOCK = 1 << 18         # samples that are read at a time

def run_ffmpeg(path, *output, options=(), why=""):
    """Run `ffmpeg *options -i path *output`. UserError where the program is missing or fails.

    `why` soundfile does not do is told where the program is missing.
    """
    program = shutil.which("ffmpeg")
    if program is None:
        why = why or "not a wav, flac, ogg, mp3 or aiff file that soundfile reads"
        raise UserError(f"{path}: {why}, and the program ffmpeg, which might read it, was not "
                        "found on PATH")

    command = [program, "-nostdin", "-v", "error", "-y", *options, "-i", f"file:{path}", *output]
    done = subprocess.run(
        list(map(str, command)), capture_output=True, text=True, errors="replace")
    told = re.sub(r" @ 0x\w+", "", done.stderr)                       # addresses, of no use
    whole = all(word.is_file() for word in output if isinstance(word, Path))
    if done.returncode or not whole:
        reason = one_line(told or f"no output, exit code {done.returncode}")
        raise UserError(f"{path}: readable neither by soundfile nor by ffmpeg: {reason}")
    if done.stderr:                                                   # such as of a truncated file
        print(f"notice: {path}: ffmpeg: {one_line(told)}", file=sys.stderr)

def encoded(path):
    """A path as soundfile takes it: in bytes where they aren't the file system's encoding."""
    return os.fsencode(path) if re.search("[\udc80-\udcff]", str(path)) else path

class AudioFile(soundfile.SoundFile):
    """An open audio file. `frames` is what its header says, or what read_to_end found instead."""
    frames = 0                                                        # samples

    def __init__(self, path):
        super().__init__(encoded(path))
        self.path = path                                              # what errors speak of
        self.frames = super().frames

def read_to_end(path):
    """Decode a whole file -> (the samples that come, whether more sound seems to follow them).

    What a header says of the length is a claim. What can be decoded, and whether the decoder has
    then come to the end of the file, are facts. Raises soundfile.SoundFileError for damaged files.
    """
    with open(path, "rb", buffering=0) as raw:
        with soundfile.SoundFile(raw.fileno(), closefd=False) as file:
            counts = []
            while count := len(file.read(BLOCK, dtype="float32")):
                counts.append(count)
            rest = raw.read(1024)
    if any(count < BLOCK for count in counts[:-1]):                   # Ogg: pages are missing
        raise soundfile.SoundFileError("samples are missing in the middle")

    # Chunks and tags behind the sound begin with a word, such as LIST, TAG or APETAGEX; a joined
    # file with that of its kind. Behind bare samples there may also be ID3 tags and padding.
    is_tag = re.match(rb"\0?[\w ]{4}", rest)
    if file.format not in ("MP3", "FLAC", "OGG"):
        is_tag = is_tag or re.match(rb"ID3|\(c\) ", rest) or not any(rest)
    is_joined = rest.startswith((b"RIFF", b"FORM", b"caff", b"fLaC", b"OggS"))
    return sum(counts), len(rest) == 1024 and bool(is_joined or not is_tag)

def length_is_a_guess(file, path):
    """Whether an MP3 lacks the header that states its length."""
    if file.format != "MP3":
        return False
    first = np.fromfile(path, "u1", 1 << 20).tobytes()
    return not re.search(rb"(Xing|Info)\0\0\0|VBRI", first)

def open_soundfile(path, whole):
    """Open a file with soundfile -> (AudioFile or None, why ffmpeg should read it or "")."""
    try:
        file = AudioFile(path)
    except (soundfile.LibsndfileError, TypeError):                    # TypeError: headerless .raw
        return None, ""
    if not file.seekable() or file.frames > 1 << 48:                  # streamed
        file.close()
        return None, ""
    if not whole:
        return file, ""

    stated = file.frames
    try:
        file.frames, more = read_to_end(path)
    except soundfile.SoundFileError as error:
        file.close()
        return None, f"damaged, perhaps truncated: {error}"

    missing = (stated - file.frames) / file.samplerate
    if missing > 0.1 and not length_is_a_guess(file, path):
        print(f"notice: {path}: truncated? {stated / file.samplerate:.1f} s expected, found "
              f"{file.frames / file.samplerate:.1f} s", file=sys.stderr)
    return file, "longer than its header says" if more else ""

def decode(path, folder, options, why):
    """Decode any file with sound to a WAV in `folder` by ffmpeg -> AudioFile."""
    wav = Path(folder, "decoded.wav")
    run_ffmpeg(path, "-map", "0:a:0", "-c:a", "pcm_f32le", "-rf64", "auto", wav,
               options=options, why=why)
    file, _ = open_soundfile(wav, whole=False)
    if file is None or not file.frames:
        raise UserError(f"{path}: sound expected, found none by soundfile or ffmpeg")
    file.path = path
    return file

def ogg_is_cut(path):
    """Whether an Ogg file ends without a whole page that says it is the last one."""
    with open(path, "rb") as file:
        is_ogg = file.read(4) == b"OggS"
        file.seek(max(0, Path(path).stat().st_size - (1 << 16)))      # no page is longer
        end = file.read()
    page = end[end.rfind(b"OggS"):]
    segments = page[26] if len(page) > 26 else 0
    size = 27 + segments + sum(page[27:27 + segments])
    is_last = len(page) >= size and page[5] & 4
    return is_ogg and not is_last

def holds_another(path):
    """Whether a second WAV or AIFF follows the first: neither soundfile nor ffmpeg reads on."""
    with open(path, "rb") as file:
        word, size = file.read(4), file.read(4)
        order = {b"RIFF": "little", b"FORM": "big"}.get(word)
        if order is None:
            return False
        file.seek(8 + int.from_bytes(size, order))
        return file.read(4) == word

SHORTER = (             # what libsndfile notes of headers that state more than there is
    r"^ *(?:data|SSND|BODY|Data Size|riff) *: (?P<stated>\d+) \(should be (?P<found>\d+)\)",
    r"frame count (?P<found>\d+) does not match value from 'ds64' chunk of (?P<stated>\d+)")

def check_whole(file, path, tolerance):
    """Raise UserError where over `tolerance` seconds are missing of what the header states."""
    for pattern in SHORTER:
        for match in re.finditer(pattern, file.extra_info, re.MULTILINE):
            stated, found = int(match["stated"]), int(match["found"])
            seconds = max(file.frames, 1) / file.samplerate
            missing = seconds * (stated / max(found, 1) - 1)

            # Programs that stream don't know the length; they state about 2^31 or 2^32 bytes.
            off = min(stated % (1 << 31), -stated % (1 << 31))
            is_unknown = stated > 1 << 30 and off <= 1 << 24
            if missing > tolerance and not is_unknown:
                raise UserError(
                    f"{path}: truncated: a length of {stated} expected, found {found}")

@contextlib.contextmanager
def open_audio(path, whole=False):
    """Open a mono or stereo audio file of any format for reading -> AudioFile.

    With `whole` it is read to its end beforehand: `frames` is then true, ffmpeg, where it is on
    PATH, decodes what soundfile can't, and up to a tenth of a second may be missing. Raises
    UserError for what is no such file.
    """
    if not Path(path).is_file():
        found = "a folder without any" if Path(path).is_dir() else "no file"
        raise UserError(f"{path}: an audio file expected, found {found}")

    with contextlib.ExitStack() as stack:
        file, why = open_soundfile(path, whole)
        if file:
            stack.enter_context(file)
        by_ffmpeg = not file or why and (not file.frames or shutil.which("ffmpeg"))
        if by_ffmpeg:
            # Past the length that a WAV's header states ffmpeg reads only if told to.
            wav = file and file.format in ("WAV", "WAVEX", "RF64")
            options = ("-ignore_length", 1) if wav else ()
            folder = stack.enter_context(tempfile.TemporaryDirectory())
            before = file.frames if file else 0
            file = stack.enter_context(decode(path, folder, options, why))
            how = "read by ffmpeg" if file.frames > before else "left out, for ffmpeg reads no more"
        elif why:
            how = "the rest is left out without ffmpeg"
        if why:
            print(f"notice: {path}: {why}; {how}", file=sys.stderr)

        check_whole(file, path, tolerance=0.1 if whole else 0.0)
        if whole and ogg_is_cut(path):
            print(f"notice: {path}: truncated? its last page is missing", file=sys.stderr)
        if whole and holds_another(path):
            print(f"notice: {path}: another file follows in it and is left out", file=sys.stderr)
        if file.channels > 2:
            raise UserError(f"{path}: 1 or 2 channels expected, found {file.channels}; to mix "
                            "them down: ffmpeg -i FILE -ac 2 STEREO.wav")
        if file.samplerate < 1000:                                    # damage: days of sound
            raise UserError(f"{path}: 1000 Hz or more expected, found {file.samplerate} Hz")
        yield file

def read_samples(file, frames, start=None):
    """The next `frames` samples of an open file, or those from `start` on -> (C, frames) float32.

    Fewer come where the file ends up to a tenth of a second before its header says so, or an MP3,
    whose length is an estimate, at any time. UserError where more are missing.
    """
    is_int16 = file.subtype == "PCM_16"                               # converted faster here
    try:
        start = file.tell() if start is None else file.seek(start)
        audio = file.read(frames, dtype="int16" if is_int16 else "float32", always_2d=True)
    except soundfile.LibsndfileError as error:
        raise UserError(f"{file.path}: damaged, perhaps truncated, after sample {start}: {error}"
                        ) from error
    missing = file.frames - start - len(audio) if len(audio) < frames else 0
    if missing > file.samplerate / 10 and file.format != "MP3":
        raise UserError(f"{file.path}: truncated: {file.frames} samples expected, "
                        f"found {start + len(audio)}")

    if is_int16:
        return torch.from_numpy(audio.T.astype("float32", order="C")).mul_(1 / 32768)
    sound = np.abs(audio) < 1e12                                      # damaged floats: NaN, 1e30
    if not sound.all():
        place = start + int(np.argmin(sound.all(axis=1)))
        raise UserError(f"{file.path}: finite samples expected, found NaN or infinity at sample "
                        f"{place}, or one above 1e12")
    return torch.from_numpy(audio.T.copy())

def read_blocks(file, start=0, frames=None, block=BLOCK):
    """Yield `frames` samples from `start` on (default: all) as (C, <= block): one at least."""
    frames = file.frames - start if frames is None else frames
    for done in range(0, max(frames, 1), block):
        audio = read_samples(file, min(block, frames - done), None if done else start)
        yield audio
        if audio.shape[-1] < block:                                   # the file ends here
            return

def read_audio(path, start=0, frames=-1):
    """Read a file, or `frames` samples from `start` on -> ((C, L) float32, sample rate in Hz).

    Past the file's end there is nothing: fewer samples come back. UserError for unreadable files.
    """
    start, frames = whole(start, "start"), whole(frames, "frames", lowest=-1)
    with open_audio(path, whole=frames < 0) as file:
        left = max(0, file.frames - start)
        count = left if frames < 0 else min(frames, left)
        return read_samples(file, count, file.frames - left), file.samplerate

LIMITS = {              # channels and sample rates that a format can hold
    ".flac": (8, range(1, 655_351)),
    ".ogg": (255, range(1, 200_001)),
    ".mp3": (2, (8000, 11025, 12000, 16000, 22050, 24000, 32000, 44100, 48000))}

def check_limits(path, rate, channels):
    """Raise UserError for what a format can't hold; libsndfile has crashed there."""
    suffix = Path(path).suffix.lower()
    known = {".aif", ".mp3", *(f".{name.lower()}" for name in soundfile.available_formats())}
    if suffix not in known:
        raise UserError(f"{path}: not written: a name that ends in .wav, .flac, .ogg or .mp3 "
                        f"expected, found {suffix or 'none'}")
    most, rates = LIMITS.get(suffix, (1024, range(1, 1 << 31)))
    if channels > most:
        raise UserError(f"{path}: not written: {suffix} holds {most} channels, found {channels}")
    if rate not in rates:
        held = f"up to {rates[-1]}" if isinstance(rates, range) else ", ".join(map(str, rates))
        raise UserError(f"{path}: not written: {suffix} holds {held} Hz, found {rate} Hz")

def disk_error(path):
    """What the system says if no more can be written to a file, such as that the disk is full."""
    try:
        with open(path, "ab") as file:
            file.write(bytes(1 << 16))
    except OSError as error:
        return error.strerror

@contextlib.contextmanager
def write_blocks(path, rate, channels, frames=0, subtype=None):
    """Yield a function that appends (C, n) blocks to a new file, which gets its name at the end.

    `subtype` is soundfile's; by default WAV has float32, FLAC 24 bits, MP3 and OGG their best.
    `frames` to come decide on RF64, past 4 GB. The function raises UserError for samples that
    aren't finite: as PCM they would be loud noise.
    """
    check_limits(path, rate, channels)
    suffix = Path(path).suffix.lower()
    large = frames * channels * 4 > 4e9
    formats = {
        ".wav": dict(format="RF64" if large else "WAV", subtype=subtype or "FLOAT"),
        ".flac": dict(subtype=subtype or "PCM_24"),
        ".ogg": dict(compression_level=0.0),
        ".mp3": dict(compression_level=0.0, bitrate_mode="CONSTANT"),
    }
    options = formats.get(suffix, {})

    with replacing(path) as temporary:
        def write(block):
            if not torch.isfinite(block).all():
                raise UserError(f"{path}: not written: NaN or infinite samples")

            for piece in block.split(1 << 18, dim=-1):                # OGG: long blocks crash it
                file.write(piece.T.numpy())

        try:
            with soundfile.SoundFile(encoded(temporary), "w", rate, channels, **options) as file:
                yield write

            # What encoders still hold when a file is closed gets lost on a full disk, silently.
            if suffix in LIMITS and file.frames:
                found, _ = read_to_end(temporary)
                if found != file.frames:
                    raise soundfile.SoundFileError(f"{file.frames} samples expected, found {found}")
        except soundfile.SoundFileError as error:
            reason = disk_error(temporary) or error
            raise UserError(f"{path}: not written: {reason}") from error

def write_audio(path, audio, rate):
    """Write (C, L) samples, a tensor or an array; see write_blocks."""
    audio = as_audio(audio)
    with write_blocks(path, whole(rate, "rate", 1), *audio.shape) as write:
        write(audio)

def to_channels(audio, channels):
    """(..., 1 or 2, L) -> (..., channels, L): mono is doubled, stereo averaged; or UserError."""
    audio = as_floats(audio)
    found = audio.shape[-2] if audio.dim() > 1 else "none"
    if found == channels:
        return audio
    if found == 1:
        return audio.repeat_interleave(channels, dim=-2)
    if channels == 1 and found == 2:
        return audio.mean(dim=-2, keepdim=True)
    raise UserError(f"{channels} channels expected, or 1; found {found}")

# ---- Resampling: a polyphase filter -------------------------------------------------------------

ZEROS = 96              # zero crossings of the sinc on each side: it passes up to 0.92 Nyquist
ATTENUATION = 120       # dB, from the lower of both Nyquist frequencies on

@functools.lru_cache(maxsize=256)
def sinc_kernel(up, down):
    """The windowed sinc of each of the `up` output phases: ((up, 1, down + 2 half), half)."""
    scale = min(1.0, up / down)                                       # the lower rate / the input's
    half = math.ceil(ZEROS / scale)
    if up * (down + 2 * half) > 1 << 24:
        raise UserError(f"two sample rates in a simpler ratio than {up}:{down} expected")

    # Where each tap of each phase lies, in input samples, 0 being the output sample.
    phases = np.arange(up)[:, None] * down / up
    t = phases - (np.arange(down + 2 * half) - half)

    # Kaiser's window and his formula for its transition band, in units of the lower rate.
    transition = (ATTENUATION - 7.95) / (14.36 * 2 * ZEROS)
    beta = 0.1102 * (ATTENUATION - 8.7)
    inside = abs(t) * scale < ZEROS
    taper = np.i0(beta * np.sqrt(np.clip(1 - (t * scale / ZEROS) ** 2, 0, None))) * inside

    kernel = np.sinc(t * scale * (1 - transition)) * taper
    kernel /= kernel.sum(axis=1, keepdims=True)                       # gain 1 at 0 Hz
    return torch.from_numpy(kernel[:, None].astype("float32")), half

def resample_blocks(blocks, rate_in, rate_out):
    """Resample a stream of (..., n) blocks: n samples in all become ceil(n rate_out / rate_in)."""
    rate_in, rate_out = whole(rate_in, "rate_in", 1), whole(rate_out, "rate_out", 1)
    blocks = map(as_floats, blocks)
    divisor = math.gcd(rate_in, rate_out)
    up, down = rate_out // divisor, rate_in // divisor
    if up == down:
        yield from blocks
        return

    # Zeros before and after the stream, as much as the filter reaches.
    try:
        kernel, half = sinc_kernel(up, down)
    except UserError as error:
        raise UserError(f"{rate_in} Hz to {rate_out} Hz: {error}") from error
    first = next(blocks)
    margin = first.new_zeros(*first.shape[:-1], half)
    audio = Lookahead(itertools.chain([margin, first], blocks, [margin]))

    step = max(1, (1 << 17) // down) * down                           # input samples: whole phases
    last = False
    while not last:
        window = audio.peek(step + 2 * half + 1)
        last = window.shape[-1] <= step + 2 * half
        window = window[..., :step + 2 * half]
        audio.drop(step)

        n = window.shape[-1] - 2 * half
        x = F.pad(window, (0, down - n % down)).flatten(0, -2)        # (N, n')
        y = F.conv1d(x[:, None], kernel, stride=down)                 # (N, up, n' / down)
        y = y.transpose(1, 2).reshape(*window.shape[:-1], -1)         # phases interleaved
        yield y[..., :math.ceil(n * up / down)]

def resample(audio, rate_in, rate_out):
    """(..., L) at rate_in -> (..., ceil(L rate_out / rate_in)) at rate_out."""
    return torch.cat(list(resample_blocks([audio], rate_in, rate_out)), dim=-1)

# ---- What the scripts share ---------------------------------------------------------------------

class Parser(argparse.ArgumentParser):
    """It complains in one line, also of empty arguments, which would be taken for absent ones."""

    def parse_args(self, words=None):
        words = list(sys.argv[1:] if words is None else words)
        for i, word in enumerate(words):
            if re.fullmatch("(-[^=]*=)?", word):
                place = f"after {words[i - 1]}" if i and not word else word or "at the beginning"
                self.error(f"an empty argument {place}: an unset variable?")
            # Shells expand ~ at the beginning of a word only.
            flag, value = re.fullmatch("(--[^=]*=|-[a-z])?(.*)", word, re.DOTALL).groups()
            if flag and value.startswith("~"):
                words[i] = flag + os.path.expanduser(value)
        return super().parse_args(words)

    def error(self, message):
        self.exit(2, f"{self.prog}: error: {message}\n")

def parser(description):
    """A parser with the flags that all scripts share."""
    parser = Parser(
        description=description, formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False)
    parser.add_argument("-d", "--device", default="auto",
                        help="auto, cpu, cuda, cuda:1, mps; auto: cuda if there is")
    parser.add_argument("--bf16", action="store_true", help="run the backbone in bfloat16")
    parser.add_argument("--debug", action="store_true", help="show the traceback of an error")
    return parser

def pick_device(name):
    """The torch device of --device; under torchrun a GPU for each process. UserError without."""
    if name in ("auto", "cuda") and torch.cuda.is_available():
        rank = launcher_number("LOCAL_RANK", 0)
        name = f"cuda:{rank % torch.cuda.device_count()}"
    try:
        device = torch.device("cpu" if name == "auto" else name)
        torch.empty(1, device=device).cpu()
        return device
    except Exception as error:
        # Each kind of device that this build of torch lacks has an error of its own.
        raise UserError(f"--device {name}: no such device here: {one_line(error)}") from None

def pick_exact_device(name):
    """The same, to separate on: its convolutions shall be in float32 unless --bf16 says otherwise.

    By default torch lets a GPU round to 11 bits what they get (TF32), so that SDRs would differ
    from other machines' in the decimals that people compare.
    """
    torch.backends.cudnn.allow_tf32 = False
    return pick_device(name)

def launcher_number(name, default):
    """The number that torchrun, or a launcher like it, has put into an environment variable."""
    text = os.environ.get(name, "")
    return int(text) if text.isdecimal() else default

def check_launcher():
    """Raise UserError where only a part of what torchrun sets is set, or makes no sense."""
    names = "RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT"
    numbers = all(launcher_number(name, -1) >= 0 for name in names if name != "MASTER_ADDR")
    rank, world = launcher_number("RANK", 0), launcher_number("WORLD_SIZE", 1)
    if not numbers or not os.environ.get("MASTER_ADDR") or rank >= world:
        found = ", ".join(f"{name}={os.environ.get(name, '(unset)')}" for name in names)
        raise UserError(f"what torchrun sets, or no RANK and no TORCHELASTIC_RUN_ID, expected in "
                        f"the environment, found {found}")

@contextlib.contextmanager
def meeting():
    """Where processes look for each other, torch's errors become a UserError."""
    try:
        yield
    except (RuntimeError, ValueError) as error:
        raise UserError(f"torchrun's processes don't meet: {one_line(error)}") from error

def shared_store():
    """(what torchrun's processes share, this one's rank); without torchrun a store of its own."""
    if "TORCHELASTIC_RUN_ID" not in os.environ:
        return torch.distributed.HashStore(), 0
    check_launcher()
    with meeting():
        store, rank, _ = next(torch.distributed.rendezvous("env://"))
    return store, rank

def wait_for(store, keys):
    """Until other processes have set the keys; store.wait would hold up signals."""
    while not store.check(keys):
        time.sleep(0.2)

def turns(store, count):
    """Yield the numbers below `count` that no other process took before: a free one takes more."""
    while (i := store.add("turn", 1) - 1) < count:
        yield i

def peak_memory(device):
    """The most memory that this process has held so far, on the GPU if it uses one, in GiB."""
    if device.type == "cuda":
        return torch.cuda.max_memory_reserved(device) / 2 ** 30
    with contextlib.suppress(ImportError):                            # Windows
        import resource
        unit = 2 ** 30 if sys.platform == "darwin" else 2 ** 20
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / unit
    return math.nan

def keep_memory():
    """Let glibc keep freed memory; by default it unmaps each large tensor: twice the time."""
    with contextlib.suppress(OSError, AttributeError):                # another C library
        libc = ctypes.CDLL("libc.so.6")
        libc.mallopt(-4, 0)                                           # M_MMAP_MAX: map nothing
        libc.mallopt(-1, -1)                                          # M_TRIM_THRESHOLD: never trim

# What a terminal would obey rather than show, Unicode's changes of direction included.
CONTROL = re.compile(r"(?<=.)\r|[\0-\x08\x0b\x0c\x0e-\x1f\x7f-\x9f\u2028-\u202e\u2066-\u2069]")
CLEAR = "\033[K\r"      # ends a line of progress: to the terminal, clear the rest; go back

class Reports:
    """A stream that only reports: whatever happens to it, the work goes on.

    Control characters, as in a file's name, and what its encoding lacks are written as \\x1b. What
    can't be written, as on a full disk or into a closed pipe, is lost; `error` then says why.
    """

    def __init__(self, stream):
        # Programs without a console have none.
        self.stream = open(os.devnull, "w") if stream is None else stream
        self.error = None

    def __getattr__(self, name):
        return getattr(self.stream, name)

    def write(self, text):
        if text != CLEAR:
            text = CONTROL.sub(lambda found: found[0].encode("unicode_escape").decode(), text)
        encoding = getattr(self.stream, "encoding", None) or "utf-8"
        self.attempt("write", text.encode(encoding, "backslashreplace").decode(encoding))

    def flush(self):
        self.attempt("flush")

    def attempt(self, method, *arguments):
        try:
            getattr(self.stream, method)(*arguments)
        except Exception as error:
            self.error = error

def make_streams_safe():
    """Where a process starts: let nothing that happens to stdout or stderr end its work."""
    # A file that got the number of a closed stream would get what libraries print there.
    number = 0
    while number <= 2:
        number = os.open(os.devnull, os.O_RDWR)
    os.close(number)

    os.environ["PYTHON_COLORS"] = "0"                                 # their codes would be escaped
    sys.stdout = Reports(sys.stdout)
    sys.stderr = Reports(sys.stderr)

def on_terminal(stream):
    """Whether a stream is a terminal; neither None nor a program's text field is."""
    isatty = getattr(stream, "isatty", None)
    return isatty is not None and isatty()

def unwind_on_signals():
    """Let signals that end a process raise SystemExit, so that no temporary file stays."""
    def handler(number, frame):
        sys.exit(128 + number)

    for name in ("SIGTERM", "SIGHUP", "SIGUSR1", "SIGUSR2", "SIGXCPU"):
        number = getattr(signal, name, None)                          # Windows has SIGTERM only
        if number and signal.getsignal(number) == signal.SIG_DFL:     # ignored: under nohup
            signal.signal(number, handler)

def run(main):
    """Run a script: exit with main's code; what the user can mend is one line, and code 2."""
    make_streams_safe()
    keep_memory()
    unwind_on_signals()
    stdout = sys.stdout
    try:
        sys.exit(main())
    except KeyboardInterrupt:
        sys.exit(130)
    except (UserError, OSError, UnicodeError, MemoryError, torch.OutOfMemoryError) as error:
        if "--debug" in sys.argv:
            raise
        # From a loader's worker an error comes with its traceback.
        message = str(error).strip().split("mss.UserError: ")[-1] or type(error).__name__
        message = " ".join(message.splitlines())
        print(f"{Path(sys.argv[0]).name}: error: {message}", file=sys.stderr)
        sys.exit(2)
    finally:
        stdout.flush()
        # Who closed a pipe, such as head, wants no more.
        if isinstance(stdout.error, OSError) and not isinstance(stdout.error, BrokenPipeError):
            print(f"notice: not all of stdout was written: {stdout.error}", file=sys.stderr)
