"""The networks of the systems that the paper's are compared with: Wave-U-Net, DPRNN and PM-Unet, by themselves.

WaveUNet maps waveforms (B, C, L) to (B, S, C, L), the others complex spectrograms (B, C, T, F) to (B, S, C, T, F).
Inputs that begin a multiple of STRIDE, samples or frames, apart are sampled alike; the others also normalise over all
that they see, so that what they see matters everywhere.
B batch, S sources, C audio channels, L samples, T frames, F bins, D features. mss.MODELS gives them names, and
train.RECIPES what they are trained with.
"""
import torch
import torch.nn as nn
import torch.nn.functional as F

def exactly(layer, x, like):
    """layer(x) in the precision of `like`, under autocast too: for a network's last layer."""
    with torch.autocast(x.device.type, enabled=False):
        return layer(x.to(like.dtype))

# ---- Wave-U-Net ------------------------------------------------------------------------------------------------------

class WaveBlock(nn.Sequential):
    """(B, i, L) -> (B, o, L): one convolution, or two with batch norms."""
    def __init__(self, i, o, kernel, stoller):
        if stoller:
            super().__init__(nn.Conv1d(i, o, kernel, padding="same"), nn.LeakyReLU(0.2, True))
        else:
            super().__init__(
                nn.Conv1d(i, o, kernel, padding="same", bias=False), nn.BatchNorm1d(o), nn.ReLU(True),
                nn.Conv1d(o, o, kernel, padding="same", bias=False), nn.BatchNorm1d(o), nn.ReLU(True))

class WaveUNet(nn.Module):
    """(B, C, L) -> (B, S, C, L) for any L: a U-Net of 1-D convolutions on the waveform.

    With stoller, M4 of Stoller, Ewert, Dixon 2018: 12 levels of width, 2 width, ... features that drop every second
    sample. Ours: 44.1 kHz, not 22.05; zeros instead of context around the input, which separate_track's overlap has.
    Without, the smaller network of github.com/bokoo/pytorch-stem-sep: 4 levels of width, 2 width, 4 width, ...
    features, batch-normalised, that keep the maximum of 4 samples. It is mono: ours is that each channel goes through
    it by itself, and that it interpolates alike everywhere, where the original aligns the ends, by up to half a sample
    of a level, so that blocks of a song are separated as the whole.
    Source number `rest`, where there is one, is what the others leave of the mixture.
    """
    STRIDE = 4096                                                     # samples

    def __init__(self, channels, sources, width, rest=None, stoller=False):
        super().__init__()
        self.channels, self.rest, self.stoller = channels if stoller else 1, rest, stoller
        self.sources = sources - (rest is not None)                   # those that the network itself estimates
        widths = [width * i for i in range(1, 14)] if stoller else [width * 2 ** i for i in range(5)]
        *outs, deepest = widths
        self.down = nn.ModuleList(WaveBlock(i, o, 15, stoller) for i, o in zip([self.channels, *outs], outs))
        self.bottleneck = WaveBlock(outs[-1], deepest, 15 if stoller else 5, stoller)
        self.reduce, self.up = nn.ModuleList(), nn.ModuleList()
        for i, o in zip(widths[:0:-1], outs[::-1]):
            self.reduce.append(nn.Identity() if stoller else nn.Conv1d(i, o, 1))  # stoller: unused
            self.up.append(WaveBlock(o + (i if stoller else o), o, 5, stoller))
        self.output = nn.Conv1d(width + self.channels * stoller, self.sources * self.channels, 1)

    def forward(self, mixture):
        x = mixture.unflatten(1, (-1, self.channels)).flatten(0, 1)   # (B or B C, C or 1, L)
        length = x.shape[-1]
        pad = (1 - length) % 4096 if self.stoller else -length % 256 or 256 * (length == 0)
        x = waveform = F.pad(x, (0, pad))                             # 4096 n + 1: both ends survive 12 decimations
        skips = []
        for block in self.down:
            skips.append(block(x))
            x = skips[-1][..., ::2] if self.stoller else F.max_pool1d(skips[-1], 4)
        x = self.bottleneck(x)
        for block, reduce in zip(self.up, self.reduce):
            skip = skips.pop()
            if self.stoller:                                          # 2 n - 1 samples of n: those midway are new
                x = F.interpolate(x, skip.shape[-1], mode="linear", align_corners=True)
            else:                                                     # 2 n, then the nearest's 4 n
                x = F.interpolate(reduce(F.interpolate(x, scale_factor=2, mode="linear")), scale_factor=2)
            x = block(torch.cat([skip, x], dim=1))
        y = torch.tanh(exactly(self.output, torch.cat([waveform, x], dim=1) if self.stoller else x, mixture))
        y = y[..., :length].unflatten(1, (self.sources, -1)).unflatten(0, (len(mixture), -1))
        y = list(y.transpose(1, 2).flatten(2, 3).unbind(1))           # (B, 1 or C, S, C or 1, L) -> S of (B, C, L)
        if self.rest is not None:
            y.insert(self.rest, mixture - sum(y))
        return torch.stack(y, dim=1)

# ---- DPRNN -----------------------------------------------------------------------------------------------------------

class GlobalNorm(nn.Module):
    """gLN: (B, ..., D) normalised over all axes but B, then scaled and shifted for each feature."""
    def __init__(self, features):
        super().__init__()
        self.weight, self.bias = nn.Parameter(torch.ones(features)), nn.Parameter(torch.zeros(features))

    def forward(self, x):
        return F.layer_norm(x, x.shape[1:], eps=1e-8) * self.weight + self.bias

class RecurrentBlock(nn.Module):
    """(N, K, D) -> (N, K, D): a BLSTM along K and a projection back to D."""
    def __init__(self, features, hidden):
        super().__init__()
        self.lstm = nn.LSTM(features, hidden, batch_first=True, bidirectional=True)
        self.linear = nn.Linear(2 * hidden, features)

    def forward(self, x):
        return self.linear(self.lstm(x)[0])

def lstm_flops(factor, weights):
    """What FlopCounterMode needs to count LSTMs: each weight is used once for each example and each frame."""
    def count(x, *shapes, **_):                                       # shapes[weights]: those of the weights
        return 2 * factor * x[0] * x[1] * sum(shape.numel() for shape in shapes[weights] if len(shape) == 2)
    return count

LSTM_FLOPS = {torch.ops.aten.lstm: lstm_flops(1, 1), torch.ops.aten.mkldnn_rnn_layer: lstm_flops(1, slice(2)),
              torch.ops.aten.mkldnn_rnn_layer_backward: lstm_flops(2, slice(2)),
              torch.ops.aten._cudnn_rnn: lstm_flops(1, 0), torch.ops.aten._cudnn_rnn_backward: lstm_flops(2, 0)}

class DPRNN(nn.Module):
    """(B, C, T, F) -> (B, S, C, T, F) complex: the dual-path RNN of Luo, Chen, Yoshioka 2020 on spectrograms.

    Six times an RNN within chunks of 100 frames that overlap by half, then one across them. The body is theirs (as in
    asteroid's masknn, but for half a chunk less padding at the ends). The seed's poster publishes no code, so these are
    ours: real and imaginary parts in, for each source an unbounded complex mask out, and, unless `rest` is None,
    estimates that sum to the mixture: each gets an equal share of what is missing (Wisdom et al. 2019), so that
    accompaniment = mixture - vocals.
    """
    STRIDE, CHUNK = 1, 100                                            # frames

    def __init__(self, channels, bins, sources, width, rest=None):
        super().__init__()
        self.sources, self.rest, parts = sources, rest, 2 * channels * bins
        self.norm, self.reduce = GlobalNorm(parts), nn.Linear(parts, width)
        self.within, self.across = (nn.ModuleList(RecurrentBlock(width, width) for _ in range(6)) for _ in range(2))
        self.norms = nn.ModuleList(GlobalNorm(width) for _ in range(12))
        self.split = nn.Sequential(nn.PReLU(), nn.Linear(width, sources * width))
        self.value, self.gate = nn.Linear(width, width), nn.Linear(width, width)
        self.mask = nn.Linear(width, parts, bias=False)

    def forward(self, X):
        B, C, T, _ = X.shape
        hop = self.CHUNK // 2
        x = self.reduce(self.norm(torch.view_as_real(X).transpose(1, 2).flatten(2)))             # (B, T, D)
        x = F.pad(x, (0, 0, hop, hop + -T % hop)).unfold(1, self.CHUNK, hop).transpose(2, 3)      # (B, N, K, D)
        for within, across, norm1, norm2 in zip(self.within, self.across, self.norms[::2], self.norms[1::2]):
            x = x + norm1(within(x.flatten(0, 1)).view(x.shape))
            y = across(x.transpose(1, 2).flatten(0, 1))                                          # (B K, N, D)
            x = x + norm2(y.unflatten(0, (B, -1)).transpose(1, 2))
        x = self.split(x)                                                                        # (B, N, K, S D)
        x = (x[:, 1:, :hop] + x[:, :-1, hop:]).flatten(1, 2)[:, :T] / 2                          # two chunks for each
        x = x.unflatten(2, (self.sources, -1))                                                   # frame: (B, T, S, D)
        x = exactly(self.mask, torch.tanh(self.value(x)) * torch.sigmoid(self.gate(x)), X.real)
        M = torch.view_as_complex(x.unflatten(3, (C, -1, 2)).contiguous()).permute(0, 2, 3, 1, 4)
        Y = M * X[:, None]                                                                       # (B, S, C, T, F)
        return Y + (X[:, None] - Y.sum(1, keepdim=True)) / self.sources if self.rest is not None else Y

# ---- PM-Unet ---------------------------------------------------------------------------------------------------------

def activate(x):
    return F.gelu(F.instance_norm(x))

class Inception(nn.Module):
    """(B, i, T, F) -> (B, 3 o, T, F): convolutions of three sizes side by side, normalised and activated before."""
    def __init__(self, i, o):
        super().__init__()
        self.convs = nn.ModuleList(nn.Conv2d(i, o, k, padding="same", bias=False) for k in (1, 3, 5))

    def forward(self, x):
        x = activate(x)                                               # the same for all three: no parameters
        return torch.cat([conv(x) for conv in self.convs], dim=1)

class Bottleneck(nn.Module):
    """(B, D, T, F) -> (B, D, T, F): convolutions only."""
    def __init__(self, features):
        super().__init__()
        self.conv3, self.conv2, self.conv1 = (
            nn.Conv2d(features, features, k, padding=k // 2 * (k % 2), bias=False) for k in (3, 2, 1))

    def forward(self, x):
        x = activate(x)
        first = self.conv3(x)
        return self.conv1(activate(self.conv2(F.pad(x, (0, 1, 0, 1))) + first)) + first

class RecurrentBottleneck(nn.Module):
    """(B, D, T, F) -> (B, D, T, F): two BLSTMs along time, with a shortcut, on D features made of D F.

    Ours: over all frames at once, where the public code takes 200 at a time.
    """
    def __init__(self, features, bins):
        super().__init__()
        self.norm1, self.reduce = (nn.InstanceNorm1d(features * bins, affine=True),
                                   nn.Conv1d(features * bins, features, 3, padding="same"))
        self.lstm = nn.LSTM(features, features, 2, batch_first=True, bidirectional=True)
        self.linear = nn.Linear(2 * features, features)
        self.norm2, self.expand = (nn.InstanceNorm1d(features, affine=True), nn.Conv1d(features, features * bins, 1))

    def forward(self, x):
        y = self.reduce(F.gelu(self.norm1(x.transpose(2, 3).flatten(1, 2))))                     # (B, D, T)
        y = y + self.linear(self.lstm(y.transpose(1, 2))[0]).transpose(1, 2)
        return self.expand(F.gelu(self.norm2(y))).view(x.transpose(2, 3).shape).transpose(2, 3)

class PMBranch(nn.Module):
    """(B, C, T, F) -> (B, S C, T, F), real, F a multiple of 256: a U-Net of Inception blocks that pools only F.

    github.com/deepvk/muse; four encoders and decoders, each fourth of F twice the features, of 28 at first.
    """
    def __init__(self, channels, outputs, width, bins, lstm):
        super().__init__()
        widths = [width * 2 ** i for i in range(5)]
        self.first, self.last = nn.Conv2d(channels, width, 1, bias=False), nn.Conv2d(width, outputs, 1, bias=False)
        self.encoders, self.decoders = nn.ModuleList(), nn.ModuleList()
        for i, o in zip(widths, widths[1:]):
            self.encoders.append(nn.ModuleList(
                [Inception(i, o), nn.Conv2d(3 * o, o, (1, 4), (1, 4), bias=False)]))
            self.decoders.insert(0, nn.ModuleList(
                [Inception(2 * o, i), nn.ConvTranspose2d(3 * i, i, (1, 4), (1, 4), bias=False)]))
        self.bottleneck = RecurrentBottleneck(widths[-1], bins // 256) if lstm else Bottleneck(widths[-1])
        for parameter in self.parameters():
            if parameter.dim() == 4:
                nn.init.xavier_uniform_(parameter)

    def forward(self, x):
        x, skips = self.first(x), []
        for inception, down in self.encoders:
            x = down(activate(inception(x)))
            skips.append(x)
        x = self.bottleneck(x)
        for inception, up in self.decoders:
            x = up(activate(inception(torch.cat([x, skips.pop()], dim=1))))
        return exactly(self.last, x, self.last.weight)

class PMUnet(nn.Module):
    """(B, C, T, F) -> (B, S, C, T, F) complex: magnitudes and phases of the sources from two networks.

    github.com/deepvk/muse. Both are standardised for each example on the way in, and back on the way out, which also
    cancels the scale of that code's normalised STFT. The highest bin is left out, and `rest` makes no difference: no
    estimate is what others leave. With lstm the magnitude's bottleneck is recurrent.
    """
    STRIDE = 1                                                        # frame

    def __init__(self, channels, bins, sources, width, rest=None, lstm=True):
        super().__init__()
        self.sources = sources
        self.magnitude = PMBranch(channels, sources * channels, width, bins - 1, lstm)
        self.phase = PMBranch(channels, sources * channels, width, bins - 1, lstm=False)

    def forward(self, X):
        parts = []
        for branch, x in (self.magnitude, X[..., :-1].abs()), (self.phase, X[..., :-1].angle()):
            std, mean = torch.std_mean(x, (1, 2, 3), keepdim=True)
            parts.append(branch((x - mean) / (1e-5 + std)) * std + mean)
        magnitude, phase = (part.unflatten(1, (self.sources, -1)) for part in parts)             # (B, S, C, T, F - 1)
        return F.pad(torch.complex(magnitude * phase.cos(), magnitude * phase.sin()), (0, 1))

def stretch(audio, percent):
    """(C, L) -> (C, L percent or some more) of the same pitch, for PM-Unet's augmentation: a phase vocoder."""
    hann = torch.hann_window(2048, dtype=audio.dtype)
    X = torch.stft(F.pad(audio, (0, 2048)), 2048, 512, window=hann, return_complex=True)         # (C, F, T)
    frames = (X.shape[2] - 1) * percent // 100
    t = torch.arange(frames) * (100 / percent)                        # where in X the new frames lie
    i, middle = t.long(), frames // 2                                 # where phases stay; at the ends are reflections
    size = X.abs()
    magnitude = torch.lerp(size[..., i], size[..., i + 1], t - i)
    turns = (X[..., 1:] * X[..., :-1].conj()).sum(0).angle()          # (F, T - 1): between frames, of all channels
    drift = turns[:, i].cumsum(1) - turns[:, i] - F.pad(turns, (1, 0)).cumsum(1)[:, i]
    phase = X.angle()[..., i] + drift - drift[:, middle, None]        # as far from the last new frame as one of X is
    return torch.istft(torch.polar(magnitude, phase), 2048, 512, window=hann)
