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
