"""Modules that no library knows: attention written in four ways, experts, gates, convolutions, recurrence."""

import copy

import pytest
import torch
from torch import nn
from torch.nn import functional

from rowscope import trace

WIDTH, HEADS = 24, 4


class Attention(nn.Module):
    """Self-attention with a fused projection, written in one of several ways."""

    def __init__(self, way):
        super().__init__()
        self.way = way
        self.qkv, self.out = nn.Linear(WIDTH, 3 * WIDTH), nn.Linear(WIDTH, WIDTH)

    def forward(self, x):
        """`x` is ``(batch, tokens, WIDTH)``."""
        batch, tokens, _ = x.shape
        if self.way == "unbind":
            q, k, v = self.qkv(x).reshape(batch, tokens, 3, HEADS, -1).permute(2, 0, 3, 1, 4).unbind(0)
            mixed = ((q @ k.transpose(-2, -1)).softmax(-1) @ v).transpose(1, 2)
        elif self.way == "einsum":
            q, k, v = (part.view(batch, tokens, HEADS, -1) for part in self.qkv(x).chunk(3, -1))
            weights = torch.einsum("bqhd,bkhd->bhqk", q, k).softmax(-1)
            mixed = torch.einsum("bhqk,bkhd->bqhd", weights, v)
        else:
            parts = self.qkv(x).split(WIDTH, dim=2)
            q, k, v = (part.view(batch, tokens, HEADS, -1).transpose(1, 2) for part in parts)
            mixed = functional.scaled_dot_product_attention(q, k, v, is_causal=True).transpose(1, 2)
        return self.out(mixed.reshape(batch, tokens, WIDTH))


class Transformer(nn.Module):
    """Embeddings, one list of two blocks, a head."""

    def __init__(self, way):
        super().__init__()
        self.tokens, self.positions = nn.Embedding(30, WIDTH), nn.Parameter(torch.randn(1, 16, WIDTH))
        self.blocks = nn.ModuleList(nn.Sequential(nn.LayerNorm(WIDTH), Attention(way)) for _ in range(2))
        self.head = nn.Linear(WIDTH, 30)

    def forward(self, token_ids):
        """`token_ids` is ``(batch, tokens)``."""
        x = self.tokens(token_ids) + self.positions[:, : token_ids.shape[1]]
        for block in self.blocks:
            x = x + block(x)
        return self.head(x)


class TorchEncoder(nn.Module):
    """torch's own encoder layers, whose attention has its weights outside of linear layers."""

    def __init__(self):
        super().__init__()
        self.first, self.last = nn.Linear(10, WIDTH), nn.Linear(WIDTH, 5)
        self.encoder = nn.TransformerEncoder(nn.TransformerEncoderLayer(WIDTH, HEADS, 40, batch_first=True), 2)

    def forward(self, x):
        """`x` is ``(batch, tokens, 10)``."""
        return self.last(self.encoder(self.first(x)))


class DenseExperts(nn.Module):
    """Every expert sees every token; weights with three dims, joined by einsum."""

    def __init__(self):
        super().__init__()
        self.first, self.router, self.last = nn.Linear(10, WIDTH), nn.Linear(WIDTH, 3), nn.Linear(WIDTH, 5)
        self.up, self.down = nn.Parameter(torch.randn(3, WIDTH, 20)), nn.Parameter(torch.randn(3, 20, WIDTH))

    def forward(self, x):
        """`x` is ``(batch, tokens, 10)``."""
        x = self.first(x)
        hidden = functional.silu(torch.einsum("btd,edf->btef", x, self.up))
        outputs = torch.einsum("btef,efd->bted", hidden, self.down)
        return self.last(x + (outputs * self.router(x).softmax(-1)[..., None]).sum(2))


class Mixer(nn.Module):
    """Mixes tokens with a linear layer over positions."""

    def __init__(self):
        super().__init__()
        self.first, self.last = nn.Linear(10, WIDTH), nn.Linear(WIDTH, 4)
        self.over_tokens, self.back = nn.Linear(6, 9), nn.Linear(9, 6)

    def forward(self, x):
        """`x` is ``(batch, 6, 10)``."""
        x = self.first(x)
        return self.last(x + self.back(functional.gelu(self.over_tokens(x.transpose(1, 2)))).transpose(1, 2))


class Recurrent(nn.Module):
    """An LSTM: four gates in one weight, and a loop over tokens."""

    def __init__(self):
        super().__init__()
        self.lstm, self.last = nn.LSTM(10, 12, batch_first=True), nn.Linear(12, 3)

    def forward(self, x):
        """`x` is ``(batch, tokens, 10)``."""
        return self.last(self.lstm(x)[0])


class Convolutions(nn.Module):
    """A gate per channel, grouped, transposed and shuffled convolutions, resizing, a join, a flattening."""

    def __init__(self):
        super().__init__()
        self.stem, self.squeeze, self.excite = nn.Conv2d(3, 16, 3, padding=1), nn.Conv2d(16, 8, 1), nn.Conv2d(8, 16, 1)
        self.grouped, self.wider = nn.Conv2d(16, 12, 3, 2, 1, groups=4), nn.ConvTranspose2d(12, 8, 2, 2)
        self.joined, self.last = nn.Conv2d(2 + 3, 6, 1), nn.Linear(6 * 8 * 8, 7)

    def forward(self, image):
        """`image` is ``(batch, 3, 16, 16)``."""
        x = functional.relu(self.stem(image))
        x = x * torch.sigmoid(self.excite(functional.relu(self.squeeze(x.mean((2, 3), keepdim=True)))))
        x = functional.pixel_shuffle(self.wider(functional.relu(self.grouped(x))), 2)
        x = torch.cat([functional.interpolate(x, size=(8, 8)), functional.adaptive_avg_pool2d(image, 8)], 1)
        return self.last(functional.relu(self.joined(x)).flatten(1))


class InPlace(nn.Module):
    """Writes parts of a tensor in place: a shift by one token of some channels."""

    def __init__(self):
        super().__init__()
        self.first, self.last = nn.Linear(10, 12), nn.Linear(12, 3)

    def forward(self, x):
        """`x` is ``(batch, tokens, 10)``."""
        hidden = self.first(x)
        out = torch.zeros_like(hidden)
        out[:, 1:, :4] = hidden[:, :-1, :4]
        out[:, :, 4:] = hidden[:, :, 4:]
        return self.last(out)


TOKENS, FEATURES = torch.arange(5).unsqueeze(0), torch.randn(1, 6, 10, generator=torch.Generator().manual_seed(0))
CASES = {
    "attention, split": (lambda: Transformer("split"), TOKENS, {"attention-vo", "attention-qk", "residual"}),
    "attention, unbind": (lambda: Transformer("unbind"), TOKENS, {"attention-vo", "attention-qk", "residual"}),
    "attention, einsum": (lambda: Transformer("einsum"), TOKENS, {"attention-vo", "attention-qk", "residual"}),
    "torch's encoder": (TorchEncoder, FEATURES, {"attention-vo", "attention-qk", "residual", "mlp"}),
    "dense experts": (DenseExperts, FEATURES, {"channels", "residual"}),
    "mixer": (Mixer, FEATURES, {"channels", "residual"}),
    "recurrent": (Recurrent, FEATURES, {"residual"}),
    "convolutions": (Convolutions, torch.randn(1, 3, 16, 16), {"channels"}),
    "in place": (InPlace, FEATURES, {"channels"}),
}


@pytest.mark.parametrize("case", CASES)
def test_what_is_not_read_does_not_matter(case):
    """Guards completeness: once a channel's readers are zero, its writers may hold anything; and nothing is missed.

    Groups through a norm are left out: a norm reads all its channels at once.
    """
    build, inputs, kinds = CASES[case]
    torch.manual_seed(0)
    model = build().eval()
    graph = trace(model, inputs)
    assert {group.kind for group in graph.groups} == kinds
    assert graph.unreached == ()
    with torch.no_grad():
        for group in graph.groups:
            readers = [m for m in group.members if m.axis == "column" and "tokens.weight" not in m.port.parameter]
            if not readers or group.kind == "residual":
                continue
            deaf = copy.deepcopy(model)
            channels = list(range(0, group.size, 2))
            for member in readers:
                deaf.get_parameter(member.port.parameter).index_fill_(member.port.dim, chosen(member, channels), 0)
            changed = copy.deepcopy(deaf)
            for member in group.members:
                if member not in readers:
                    parameter, indices = changed.get_parameter(member.port.parameter), chosen(member, channels)
                    noise = torch.randn_like(parameter.index_select(member.port.dim, indices))
                    parameter.index_add_(member.port.dim, indices, noise)
            before, after = deaf(inputs), changed(inputs)
            assert (model(inputs) - before).abs().max() > 1e-6, f"{group.id}: the mask must be visible"
            assert torch.equal(before, after), group.id


def chosen(member, channels):
    """Indices of some channels, each once."""
    return torch.tensor(member.index.table[channels].ravel()).unique()


def test_attention_heads_are_found():
    """Guards heads without any library's help: four in every way of writing attention."""
    for way in ("split", "unbind", "einsum"):
        graph = trace(Transformer(way), TOKENS)
        group = graph.group("blocks.1.1.vo")
        assert (group.heads, group.size, group.partners) == (HEADS, WIDTH, ("blocks.1.1.qk",)), way


class Meeting(nn.Module):
    """Two linear layers that meet in some way before a third."""

    def __init__(self, meet):
        super().__init__()
        self.first, self.second, self.last = nn.Linear(10, 16), nn.Linear(10, 16), nn.Linear(16, 3)
        self.free = nn.Parameter(torch.randn(16, 10))
        self.labels = nn.Embedding(16, 3)
        self.register_buffer("order", torch.arange(15, -1, -1))
        self.meet = meet

    def forward(self, x):
        """`x` is ``(batch, tokens, 10)``."""
        return self.meet(self, x)


def after(change):
    """The second layer's channels are changed before they meet the first's."""
    return lambda m, x: m.last(torch.relu(m.first(x) + change(m.second(x), m)))


def ranked(rank):
    """A rank of the first layer's channels reaches the output beside them."""
    return lambda m, x: m.last(torch.relu(m.first(x))) + rank(m.first(x), m)


FIXED = {
    "permuted": after(lambda h, m: h[..., m.order]),
    "selected": after(lambda h, m: h.index_select(-1, m.order)),
    "sorted": after(lambda h, m: h.sort(-1)[0]),
    "accumulated": after(lambda h, m: h.cumsum(-1)),
    "softmax": after(lambda h, m: h.softmax(-1)),
    "argmax": ranked(lambda h, m: m.labels(h.argmax(-1))),
    "logsumexp": ranked(lambda h, m: h.logsumexp(-1, keepdim=True)),
    "weight permuted": lambda m, x: m.last(torch.relu(m.first(x) + functional.linear(x, m.free[m.order]))),
}


@pytest.mark.parametrize("case", FIXED)
@pytest.mark.filterwarnings("ignore:the traced forward")
def test_what_competes_or_is_reordered_is_no_group(case):
    """Guards against groups with a member missing: where the order of channels is lost, none of them can vanish."""
    graph = trace(Meeting(FIXED[case]), FEATURES)
    members = {member.port.parameter for group in graph.groups for member in group.members}
    assert "last.weight" not in members


@pytest.mark.filterwarnings("ignore:the traced forward")
def test_a_reduction_over_channels_is_said():
    """Guards masking: a mean over channels reads them too, so to mask one is to zero what writes it."""
    graph = trace(Meeting(lambda m, x: m.last(m.first(x)) * m.first(x).mean(-1, keepdim=True)), FEATURES)
    assert [group.reduced for group in graph.groups] == [True]
    graph = trace(Meeting(lambda m, x: m.last(m.first(x))), FEATURES)
    assert [group.reduced for group in graph.groups] == [False]


class MergedUpdate(nn.Module):
    """A low-rank update that is added to the weight before it is used."""

    def __init__(self):
        super().__init__()
        self.first, self.base, self.last = nn.Linear(10, 16), nn.Linear(16, 12), nn.Linear(12, 3)
        self.down, self.up = nn.Parameter(torch.randn(2, 16)), nn.Parameter(torch.randn(12, 2))

    def forward(self, x):
        """`x` is ``(batch, tokens, 10)``."""
        weight = self.base.weight + self.up @ self.down
        return self.last(torch.relu(functional.linear(torch.relu(self.first(x)), weight)))


@pytest.mark.filterwarnings("ignore:the traced forward")
def test_a_merged_update_has_the_axes_of_its_weight():
    """Guards parametrised weights: rows stay rows, columns columns, and the rank is a group."""
    groups = {group.size: group for group in trace(MergedUpdate(), FEATURES).groups}
    axes = {size: {(m.port.parameter, m.axis) for m in group.members} for size, group in groups.items()}
    assert {("base.weight", "column"), ("down", "column"), ("first.weight", "row")} <= axes[16]
    assert {("base.weight", "row"), ("up", "row"), ("last.weight", "column")} <= axes[12]
    assert axes[2] == {("up", "column"), ("down", "row")}


class Registers(nn.Module):
    """Learned tokens before the computed ones, positions for all, and learned queries that look at them."""

    def __init__(self):
        super().__init__()
        self.embed, self.registers = nn.Linear(10, WIDTH), nn.Parameter(torch.randn(1, 4, WIDTH))
        self.positions, self.latents = nn.Parameter(torch.randn(1, 10, WIDTH)), nn.Parameter(torch.randn(7, WIDTH))
        self.query, self.key, self.value = (nn.Linear(WIDTH, WIDTH) for _ in range(3))
        self.last = nn.Linear(WIDTH, 3)

    def forward(self, x):
        """`x` is ``(batch, 6, 10)``."""
        x = torch.cat([self.registers.expand(len(x), -1, -1), self.embed(x)], 1) + self.positions
        parts = (self.query(self.latents)[None], self.key(x), self.value(x))
        q, k, v = (part.view(1, -1, HEADS, WIDTH // HEADS).transpose(1, 2) for part in parts)
        return self.last(functional.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))


def test_positions_and_latents_are_no_channels():
    """Guards learned tokens: their width is a channel, their number is none, and their queries are attention's."""
    graph = trace(Registers(), FEATURES)
    kinds = {group.kind: group for group in graph.groups}
    assert (kinds["attention-vo"].heads, kinds["attention-qk"].heads) == (HEADS, HEADS)
    stream = next(g for g in graph.groups if any(m.port.parameter == "embed.weight" for m in g.members))
    learned = {(m.port.parameter, m.port.dim, m.shared) for m in stream.members if m.module == ""}
    assert learned == {("registers", 2, False), ("positions", 2, False)}


@pytest.mark.parametrize("norm", ["batch", "instance", "frozen"])
def test_statistics_of_norms_are_members(norm):
    """Guards buffers per channel: a removed channel takes its mean and variance along."""
    layer = {"batch": nn.BatchNorm2d, "instance": lambda n: nn.InstanceNorm2d(n, track_running_stats=True)}
    model = nn.Sequential(nn.Conv2d(3, 8, 3), layer.get(norm, FrozenNorm)(8), nn.Conv2d(8, 2, 3))
    graph = trace(model, torch.randn(1, 3, 9, 9))
    members = {member.port.parameter for member in graph.groups[0].members}
    assert {"1.running_mean", "1.running_var"} <= members
    assert {"1.running_mean", "1.running_var"} <= graph.buffers


class FrozenNorm(nn.Module):
    """A batch norm of which everything is a buffer."""

    def __init__(self, channels):
        super().__init__()
        for name in ("weight", "bias", "running_mean", "running_var"):
            self.register_buffer(name, torch.ones(channels))

    def forward(self, x):
        """`x` is ``(batch, channels, height, width)``."""
        scale = self.weight * (self.running_var + 1e-5).rsqrt()
        return x * scale.view(1, -1, 1, 1) + (self.bias - self.running_mean * scale).view(1, -1, 1, 1)
