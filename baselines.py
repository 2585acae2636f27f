"""The networks of the systems that the paper's are compared with.

The Wave-U-Nets map waveforms (B, C, L) to (B, S, C, L), DPRNN, PM-Unet and Open-Unmix complex
spectrograms (B, C, T, F) to (B, S, C, T, F). mss.MODELS gives them names, train.RECIPES says what
they are trained with. Each is made by Network(channels, [bins of a spectrogram,] sources, width,
residual), of which it may not need all, and has

    STRIDE    inputs that begin a multiple of it apart, in samples or frames, are sampled alike;
              DPRNN and PM-Unet also normalise over all that they see, so that all of it matters
    residual  the number of the source that is what the others leave of the mixture, or None

MobileUNet is none of them: it takes the place of the paper's UNet.

B batch, S sources, C audio channels, L samples, T frames, F bins, D features.
"""
import math

import torch
import torch.nn as nn
import torch.nn.functional as F

def exactly(layer, x, like):
    """layer(x) in the precision of `like`, under autocast too.

    For a network's last layer, and for LSTMs: autocast would run cuDNN's in float16, whatever it
    is told, and a float16 next to a bfloat16 is an error.
    """
    with torch.autocast(x.device.type, enabled=False):
        return layer(x.to(like.dtype))

def with_residual(estimates, mixture, residual):
    """(B, S - 1, C, L) -> (B, S, C, L): source number `residual` is what the others leave."""
    if residual is None:
        return estimates
    stems = list(estimates.unbind(1))                                 # of (B, C, L)
    stems.insert(residual, mixture - sum(stems))
    return torch.stack(stems, dim=1)

# ---- Wave-U-Net ---------------------------------------------------------------------------------

class WaveBlock(nn.Sequential):
    """(B, i, L) -> (B, o, L): two convolutions, normalised and rectified after each."""

    def __init__(self, i, o, kernel):
        super().__init__(
            nn.Conv1d(i, o, kernel, padding="same", bias=False),
            nn.BatchNorm1d(o),
            nn.ReLU(True),
            nn.Conv1d(o, o, kernel, padding="same", bias=False),
            nn.BatchNorm1d(o),
            nn.ReLU(True),
        )

class WaveUNet(nn.Module):
    """(B, C, L) -> (B, S, C, L) for any L: a U-Net of 1-D convolutions on the waveform.

    The network of github.com/bokoo/pytorch-stem-sep: four levels of width, 2 width, 4 width, ...
    features, of which each keeps the maximum of 4 samples. It is mono. Ours: each channel goes
    through it by itself; and it interpolates alike everywhere, where the original aligns the ends,
    by up to half a sample of a level, so that blocks of a song are separated as the whole.
    """
    STRIDE = 4096                                                     # samples

    def __init__(self, channels, sources, width, residual=None):
        super().__init__()
        self.residual = residual
        self.sources = sources - (residual is not None)               # that the network estimates
        *widths, deepest = [width * 2 ** i for i in range(5)]

        self.down = nn.ModuleList()
        for i, o in zip([1, *widths], widths):
            self.down.append(WaveBlock(i, o, 15))
        self.bottleneck = WaveBlock(widths[-1], deepest, 5)
        self.reduce = nn.ModuleList()
        self.up = nn.ModuleList()
        for o in reversed(widths):
            self.reduce.append(nn.Conv1d(2 * o, o, 1))
            self.up.append(WaveBlock(2 * o, o, 5))
        self.output = nn.Conv1d(width, self.sources, 1)

    def forward(self, mixture):
        B, C, length = mixture.shape
        pad = -length % 256 if length else 256                        # four levels, by 4 each
        x = mixture.flatten(0, 1)[:, None]                            # (B C, 1, L)
        x = F.pad(x, (0, pad))

        skips = []
        for block in self.down:
            skips.append(block(x))                                    # (B C, D_i, L / 4^i)
            x = F.max_pool1d(skips[-1], 4)
        x = self.bottleneck(x)

        for block, reduce in zip(self.up, self.reduce):
            x = F.interpolate(x, scale_factor=2, mode="linear")
            x = F.interpolate(reduce(x), scale_factor=2)              # the nearest
            x = block(torch.cat([skips.pop(), x], dim=1))             # (B C, D_i, L / 4^i)

        y = torch.tanh(exactly(self.output, x, mixture))
        y = y[..., :length].unflatten(0, (B, C))                      # (B, C, S, L)
        y = y.transpose(1, 2)
        return with_residual(y, mixture, self.residual)

class WaveBlock12(nn.Sequential):
    """(B, i, L) -> (B, o, L): one convolution, rectified."""

    def __init__(self, i, o, kernel):
        super().__init__(
            nn.Conv1d(i, o, kernel, padding="same"),
            nn.LeakyReLU(0.2, True),
        )

class WaveUNet12(nn.Module):
    """(B, C, L) -> (B, S, C, L) for any L: M4 of Stoller, Ewert, Dixon 2018.

    Twelve levels of width, 2 width, 3 width, ... features that drop every second sample. Ours:
    44.1 kHz, not 22.05; zeros around the input, not context, which separate_track's overlap has.
    """
    STRIDE = 4096                                                     # samples

    def __init__(self, channels, sources, width, residual=None):
        super().__init__()
        self.residual = residual
        self.sources = sources - (residual is not None)               # that the network estimates
        *widths, deepest = [width * i for i in range(1, 14)]

        self.down = nn.ModuleList()
        for i, o in zip([channels, *widths], widths):
            self.down.append(WaveBlock12(i, o, 15))
        self.bottleneck = WaveBlock12(widths[-1], deepest, 15)
        self.up = nn.ModuleList()
        for i, o in zip([deepest, *reversed(widths)], reversed(widths)):
            self.up.append(WaveBlock12(o + i, o, 5))
        self.output = nn.Conv1d(width + channels, self.sources * channels, 1)

    def forward(self, mixture):
        C, length = mixture.shape[1:]

        # 4096 n + 1 samples: both ends survive all twelve decimations.
        padded = F.pad(mixture, (0, (1 - length) % 4096))
        x = padded

        skips = []
        for block in self.down:
            skips.append(block(x))                                    # (B, D_i, L / 2^i)
            x = skips[-1][..., ::2]
        x = self.bottleneck(x)

        # 2 n - 1 samples of n: the new ones lie midway.
        for block in self.up:
            skip = skips.pop()
            x = F.interpolate(x, skip.shape[-1], mode="linear", align_corners=True)
            x = block(torch.cat([skip, x], dim=1))                    # (B, D_i, L / 2^i)

        x = torch.cat([padded, x], dim=1)
        y = torch.tanh(exactly(self.output, x, mixture))
        y = y[..., :length].unflatten(1, (self.sources, C))           # (B, S, C, L)
        return with_residual(y, mixture, self.residual)

# ---- DPRNN --------------------------------------------------------------------------------------

class GlobalNorm(nn.Module):
    """gLN: (B, ..., D) normalised over all axes but B, then scaled and shifted per feature."""

    def __init__(self, features):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(features))
        self.bias = nn.Parameter(torch.zeros(features))

    def forward(self, x):
        x = F.layer_norm(x, x.shape[1:], eps=1e-8)
        return x * self.weight + self.bias

class RecurrentBlock(nn.Module):
    """(N, K, D) -> (N, K, D): a BLSTM along K and a projection back to D."""

    def __init__(self, features, hidden):
        super().__init__()
        self.lstm = nn.LSTM(features, hidden, batch_first=True, bidirectional=True)
        self.linear = nn.Linear(2 * hidden, features)

    def forward(self, x):
        recurrent, _ = exactly(self.lstm, x, self.lstm.weight_ih_l0)
        return self.linear(recurrent)

class DPRNN(nn.Module):
    """(B, C, T, F) -> (B, S, C, T, F): the dual-path RNN of Luo, Chen, Yoshioka 2020.

    Six times an RNN within chunks of 100 frames that overlap by half, then one across them. The
    body is theirs (as in asteroid's masknn, but for half a chunk less padding at the ends). The
    poster that puts it on spectrograms publishes no code, so these are ours: real and imaginary
    parts in; for each source an unbounded complex mask out; and, unless `residual` is None,
    estimates that sum to the mixture: each gets an equal share of what is missing (Wisdom et al.
    2019), so that accompaniment = mixture - vocals.
    """
    STRIDE = 1                                                        # frame
    CHUNK = 100                                                       # frames

    def __init__(self, channels, bins, sources, width, residual=None):
        super().__init__()
        self.sources = sources
        self.residual = residual
        parts = 2 * channels * bins                                   # of a frame: real, imaginary
        self.norm = GlobalNorm(parts)
        self.reduce = nn.Linear(parts, width)

        self.within = nn.ModuleList(RecurrentBlock(width, width) for _ in range(6))
        self.across = nn.ModuleList(RecurrentBlock(width, width) for _ in range(6))
        self.norms = nn.ModuleList(GlobalNorm(width) for _ in range(12))

        self.split = nn.Sequential(
            nn.PReLU(),
            nn.Linear(width, sources * width),
        )
        self.value = nn.Linear(width, width)
        self.gate = nn.Linear(width, width)
        self.mask = nn.Linear(width, parts, bias=False)

    def forward(self, X):
        B, C, T, _ = X.shape
        hop = self.CHUNK // 2

        # Frames of D features, in N chunks of K frames.
        x = torch.view_as_real(X).transpose(1, 2).flatten(2)          # (B, T, 2 C F)
        x = self.reduce(self.norm(x))                                 # (B, T, D)
        end = hop + -T % hop
        x = F.pad(x, (0, 0, hop, end))
        x = x.unfold(1, self.CHUNK, hop).transpose(2, 3)              # (B, N, K, D)

        for i, (within, across) in enumerate(zip(self.within, self.across)):
            y = x.flatten(0, 1)                                       # (B N, K, D)
            y = within(y).view(x.shape)
            x = x + self.norms[2 * i](y)

            y = x.transpose(1, 2).flatten(0, 1)                       # (B K, N, D)
            y = across(y)
            y = y.unflatten(0, (B, -1)).transpose(1, 2)               # (B, N, K, D)
            x = x + self.norms[2 * i + 1](y)

        # Back to frames, each of which two chunks have.
        x = self.split(x)                                             # (B, N, K, S D)
        x = (x[:, 1:, :hop] + x[:, :-1, hop:]) / 2
        x = x.flatten(1, 2)[:, :T].unflatten(2, (self.sources, -1))   # (B, T, S, D)

        # A gate, then the masks' real and imaginary parts.
        gate = torch.sigmoid(self.gate(x))
        x = torch.tanh(self.value(x)) * gate
        x = exactly(self.mask, x, X.real)                             # (B, T, S, 2 C F)
        x = x.unflatten(3, (C, -1, 2)).contiguous()                   # (B, T, S, C, F, 2)
        M = torch.view_as_complex(x).permute(0, 2, 3, 1, 4)           # (B, S, C, T, F)
        Y = M * X[:, None]
        if self.residual is None:
            return Y
        missing = X[:, None] - Y.sum(1, keepdim=True)
        return Y + missing / self.sources

# ---- PM-Unet ------------------------------------------------------------------------------------

def activate(x):
    # A group for each feature is what instance_norm does. But that one loses the channels_last
    # layout, and torch 2.13's gradients of it are wrong on a CPU if a batch of one has that layout.
    return F.gelu(F.group_norm(x, x.shape[1]))

class Inception(nn.Module):
    """(B, i, T, F) -> (B, 3 o, T, F): convolutions of three sizes, side by side."""

    def __init__(self, i, o):
        super().__init__()
        self.convs = nn.ModuleList()
        for kernel in (1, 3, 5):
            self.convs.append(nn.Conv2d(i, o, kernel, padding="same", bias=False))

    def forward(self, x):
        x = activate(x)                                               # the same for all three
        return torch.cat([conv(x) for conv in self.convs], dim=1)

class Bottleneck(nn.Module):
    """(B, D, T, F) -> (B, D, T, F): convolutions only."""

    def __init__(self, features, bins):
        super().__init__()
        self.conv3 = nn.Conv2d(features, features, 3, padding=1, bias=False)
        self.conv2 = nn.Conv2d(features, features, 2, bias=False)
        self.conv1 = nn.Conv2d(features, features, 1, bias=False)

    def forward(self, x):
        x = activate(x)
        first = self.conv3(x)
        x = F.pad(x, (0, 1, 0, 1))                                    # for an even kernel
        second = self.conv2(x) + first
        return self.conv1(activate(second)) + first

class RecurrentBottleneck(nn.Module):
    """(B, D, T, F) -> (B, D, T, F): two BLSTMs along time, with a shortcut.

    On D features made of D F. Ours: over all frames at once; the public code takes 200 at a time.
    """

    def __init__(self, features, bins):
        super().__init__()
        everything = features * bins

        self.norm1 = nn.InstanceNorm1d(everything, affine=True)
        self.reduce = nn.Conv1d(everything, features, 3, padding="same")
        self.lstm = nn.LSTM(features, features, 2, batch_first=True, bidirectional=True)
        self.linear = nn.Linear(2 * features, features)
        self.norm2 = nn.InstanceNorm1d(features, affine=True)
        self.expand = nn.Conv1d(features, everything, 1)

    def forward(self, x):
        x = x.transpose(2, 3)                                         # (B, D, F, T)
        y = F.gelu(self.norm1(x.flatten(1, 2)))                       # (B, D F, T)
        y = self.reduce(y)                                            # (B, D, T)
        recurrent, _ = exactly(self.lstm, y.transpose(1, 2), self.lstm.weight_ih_l0)
        y = y + self.linear(recurrent).transpose(1, 2)                # of (B, T, 2 D)
        y = self.expand(F.gelu(self.norm2(y)))                        # (B, D F, T)
        return y.view(x.shape).transpose(2, 3)

class PMBranch(nn.Module):
    """(B, C, T, F) -> (B, outputs, T, F), real: a U-Net of Inceptions that pools frequency only.

    F is a multiple of 256. github.com/deepvk/muse: four encoders and decoders; each takes a fourth
    of the bins to twice the features, 28 of them at first.
    """

    def __init__(self, channels, outputs, width, bins, bottleneck):
        super().__init__()
        if bins % 256:
            raise ValueError(f"a multiple of 256 bins expected, found {bins}")
        widths = [width * 2 ** i for i in range(5)]
        self.first = nn.Conv2d(channels, width, 1, bias=False)
        self.last = nn.Conv2d(width, outputs, 1, bias=False)
        self.encoders = nn.ModuleList()
        self.decoders = nn.ModuleList()
        for i, o in zip(widths, widths[1:]):
            down = nn.Conv2d(3 * o, o, (1, 4), (1, 4), bias=False)
            up = nn.ConvTranspose2d(3 * i, i, (1, 4), (1, 4), bias=False)
            self.encoders.append(nn.ModuleList([Inception(i, o), down]))
            self.decoders.insert(0, nn.ModuleList([Inception(2 * o, i), up]))
        self.bottleneck = bottleneck(widths[-1], bins // 256)

        for parameter in self.parameters():
            if parameter.dim() == 4:
                nn.init.xavier_uniform_(parameter)

    def forward(self, x):
        x = self.first(x)
        skips = []
        for inception, down in self.encoders:
            x = down(activate(inception(x)))                          # (B, D_i, T, F / 4^i)
            skips.append(x)

        x = self.bottleneck(x)

        for inception, up in self.decoders:
            x = inception(torch.cat([x, skips.pop()], dim=1))
            x = up(activate(x))                                       # (B, D_i, T, F / 4^i)
        return exactly(self.last, x, self.last.weight)

class PMUnet(nn.Module):
    """(B, C, T, F) -> (B, S, C, T, F): the sources' magnitudes and phases from two networks.

    github.com/deepvk/muse. Both are standardised for each example on the way in, and back on the
    way out, which also cancels the scale of that code's normalised STFT. The highest bin is left
    out. No estimate is what the others leave, whatever `residual` says.
    """
    STRIDE = 1                                                        # frame
    BOTTLENECK = RecurrentBottleneck                                  # of the magnitudes' branch

    def __init__(self, channels, bins, sources, width, residual=None):
        super().__init__()
        self.sources = sources
        self.residual = None
        outputs = sources * channels
        self.magnitude = PMBranch(channels, outputs, width, bins - 1, self.BOTTLENECK)
        self.phase = PMBranch(channels, outputs, width, bins - 1, Bottleneck)

    def standardised(self, branch, x):
        """(B, C, T, F - 1) -> (B, S, C, T, F - 1)"""
        std, mean = torch.std_mean(x, (1, 2, 3), keepdim=True)
        x = (x - mean) / (1e-5 + std)
        y = branch(x) * std + mean
        return y.unflatten(1, (self.sources, -1))

    def forward(self, X):
        X = X[..., :-1]
        magnitude = self.standardised(self.magnitude, X.abs())
        phase = self.standardised(self.phase, X.angle())

        real = magnitude * phase.cos()
        imaginary = magnitude * phase.sin()
        Y = torch.complex(real, imaginary)
        return F.pad(Y, (0, 1))                                       # (B, S, C, T, F)

class PMUnetConv(PMUnet):
    """The same, without LSTMs."""
    BOTTLENECK = Bottleneck

# ---- Open-Unmix ---------------------------------------------------------------------------------

class OpenUnmixTarget(nn.Module):
    """|X| (B, C, T, F) -> one source's mask (B, C, T, F), 0 or more: a BLSTM of three layers."""

    def __init__(self, channels, bins, width):
        super().__init__()
        self.bins_read = int(16000 / 22050 * (bins - 1)) + 1          # to 16 kHz: 1487 of 2049

        # Named as in the published files.
        self.input_mean = nn.Parameter(torch.zeros(self.bins_read))   # with a minus sign
        self.input_scale = nn.Parameter(torch.ones(self.bins_read))
        self.fc1 = nn.Linear(channels * self.bins_read, width, bias=False)
        self.bn1 = nn.BatchNorm1d(width)
        self.lstm = nn.LSTM(width, width // 2, 3, batch_first=True, dropout=0.4, bidirectional=True)
        self.fc2 = nn.Linear(2 * width, width, bias=False)
        self.bn2 = nn.BatchNorm1d(width)
        self.fc3 = nn.Linear(width, channels * bins, bias=False)
        self.bn3 = nn.BatchNorm1d(channels * bins)
        self.output_scale = nn.Parameter(torch.ones(bins))
        self.output_mean = nn.Parameter(torch.ones(bins))

    def forward(self, magnitude):
        B, C, T, _ = magnitude.shape
        x = (magnitude[..., :self.bins_read] + self.input_mean) * self.input_scale
        x = x.transpose(1, 2).reshape(B * T, -1)                      # (B T, C F')
        x = torch.tanh(self.bn1(self.fc1(x)))                         # (B T, D)
        recurrent, _ = exactly(self.lstm, x.view(B, T, -1), magnitude)
        x = torch.cat([x, recurrent.flatten(0, 1)], dim=1)            # (B T, 2 D)
        x = F.relu(self.bn2(self.fc2(x)))
        x = self.bn3(exactly(self.fc3, x, magnitude))                 # (B T, C F)
        x = x.view(B, T, C, -1).transpose(1, 2)
        return F.relu(x * self.output_scale + self.output_mean)

def wiener(X, Y, epsilon=1e-10):
    """Mixture (B, C, T, F), estimates (B, S, C, T, F) -> better ones: one iteration of EM."""
    # A source is a power for each bin times a covariance of the channels for each frequency.
    power = Y.abs().square().mean(2)                                  # (B, S, T, F)

    # Louder mixtures have larger epsilons: as if they were scaled to a highest magnitude of 10.
    scale = (X.abs().amax((1, 2, 3)) / 10).clamp(min=1)[:, None, None, None, None]
    R = torch.einsum("bsctf,bsdtf->bsfcd", Y, Y.conj())
    R = R / (scale ** 2 * epsilon + power.sum(2)[..., None, None])    # (B, S, F, C, C)

    # Y = power R (the sum of all power R)^-1 X
    covariance = torch.einsum("bstf,bsfcd->btfcd", power.to(R.dtype), R)
    ridge = scale ** 2 * math.sqrt(epsilon) * torch.eye(X.shape[1], device=X.device)
    x = torch.linalg.solve(covariance + ridge, X.permute(0, 2, 3, 1))  # (B, T, F, C)
    return power[:, :, None] * torch.einsum("bsfcd,btfd->bsctf", R, x)

class OpenUnmix(nn.Module):
    """(B, C, T, F) -> (B, S, C, T, F): Stoeter et al. 2019, a network for each source."""
    STRIDE = 300                                                      # frames: filtered at a time

    def __init__(self, channels, bins, sources, width, residual=None):
        super().__init__()
        self.residual = None
        self.filtered = residual is not None
        self.networks = nn.ModuleList(
            OpenUnmixTarget(channels, bins, width) for _ in range(sources))

    def forward(self, X):
        magnitude = X.abs()
        masks = [network(magnitude) for network in self.networks]
        Y = torch.stack(masks, dim=1) * X[:, None]                    # (B, S, C, T, F)

        # Where the sources make up the mixture a Wiener filter follows, but not in training.
        if self.filtered and not self.training:
            for start in range(0, X.shape[2], self.STRIDE):
                t = slice(start, start + self.STRIDE)
                Y[:, :, :, t] = wiener(X[:, :, t], Y[:, :, :, t])
        return Y

# ---- MobileNet ----------------------------------------------------------------------------------

def separable(i, o):
    """(B, i, T, F) -> (B, o, T, F): 1x1, 3x3 on each feature by itself, 1x1."""
    return nn.Sequential(
        nn.BatchNorm2d(i),
        nn.LeakyReLU(0.01, True),
        nn.Conv2d(i, o, 1, bias=False),
        nn.BatchNorm2d(o),
        nn.LeakyReLU(0.01, True),
        nn.Conv2d(o, o, 3, padding=1, groups=o, bias=False),
        nn.BatchNorm2d(o),
        nn.LeakyReLU(0.01, True),
        nn.Conv2d(o, o, 1, bias=False),
    )

class MobileBlock(nn.Module):
    """(B, i, T, F) -> (B, o, T, F): two separable convolutions, each with a shortcut."""

    def __init__(self, i, o):
        super().__init__()
        self.parts = nn.ModuleList([separable(i, o), separable(o, o)])
        self.shortcut = nn.Identity() if i == o else nn.Conv2d(i, o, 1)

    def forward(self, x):
        x = self.shortcut(x) + self.parts[0](x)
        return x + self.parts[1](x)

class MobileUNet(nn.Module):
    """(B, C, T, F) -> (B, width, T, F): a U-Net like the paper's, of 0.3 million parameters.

    MobileNet_Subbandtime of github.com/bytedance/music_source_separation. F is a multiple of 64,
    T of frame_multiple.
    """
    STRIDES = ((2, 2), (2, 2), (2, 2), (2, 2), (2, 2), (1, 2))        # of each pooling: (T, F)
    frame_multiple = 32

    def __init__(self, channels, width):
        super().__init__()
        widths = [width] + 5 * [2 * width]
        self.encoders = nn.ModuleList()
        for i, o in zip([channels, *widths], widths):
            self.encoders.append(MobileBlock(i, o))
        self.bottleneck = MobileBlock(widths[-1], widths[-1])
        self.up = nn.ModuleList()
        self.decoders = nn.ModuleList()
        for i, o, stride in zip([widths[-1], *reversed(widths)], reversed(widths),
                                reversed(self.STRIDES)):
            self.up.append(nn.Sequential(
                nn.BatchNorm2d(i, momentum=0.01),
                nn.LeakyReLU(0.01, True),
                nn.Conv2d(i, o, 1, bias=False),
                nn.Upsample(scale_factor=stride),                     # the nearest
            ))
            self.decoders.append(MobileBlock(2 * o, o))
        self.after = MobileBlock(width, width)

    def forward(self, x):
        skips = []
        for encoder, stride in zip(self.encoders, self.STRIDES):
            skips.append(encoder(x))                                  # (B, D_i, T / 2^i, F / 2^i)
            x = F.avg_pool2d(skips[-1], stride)
        x = self.bottleneck(x)
        for up, decoder in zip(self.up, self.decoders):
            x = decoder(torch.cat([up(x), skips.pop()], dim=1))
        return self.after(x)                                          # (B, width, T, F)

# ---- TDF ----------------------------------------------------------------------------------------

def along_frequency(linear, x):
    """linear(x) of (B, D, T, F), whose features stay last in memory, as convolutions like it."""
    return (linear.weight @ x.permute(0, 2, 3, 1)).permute(0, 3, 1, 2)

class TDF(nn.Module):
    """(B, D, T, F) -> (B, D, T, F): two linear layers along frequency, with a bottleneck; added.

    A time-distributed fully-connected network (Choi et al. 2020, Investigating U-Nets with various
    intermediate blocks): all frames and features share its weights.
    """

    def __init__(self, features, bins):
        super().__init__()
        hidden = max(bins // 8, 8)
        self.squeeze = nn.Linear(bins, hidden, bias=False)
        self.norm1 = nn.BatchNorm2d(features, momentum=0.01)
        self.expand = nn.Linear(hidden, bins, bias=False)
        self.norm2 = nn.BatchNorm2d(features, momentum=0.01)

    def forward(self, x):
        y = F.relu(self.norm1(along_frequency(self.squeeze, x)), inplace=True)  # (B, D, T, F / 8)
        return x + F.relu(self.norm2(along_frequency(self.expand, y)), inplace=True)

# What gradient checkpointing computes again (train.py --checkpoint-blocks).
BLOCKS = (
    WaveBlock,
    WaveBlock12,
    RecurrentBlock,
    Inception,
    MobileBlock,
)
