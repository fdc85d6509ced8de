"""The transformer blocks of the small models that judge or guide: all of them read histories."""

from torch import nn


def encoder(hidden_size: int, *, layers: int, heads: int, dropout: float) -> nn.TransformerEncoder:
    """Pre-norm blocks with a last norm, four times as wide inside; batch first."""
    block = nn.TransformerEncoderLayer(
        hidden_size, heads, 4 * hidden_size, dropout, activation="gelu",
        batch_first=True, norm_first=True,
    )  # fmt: skip
    return nn.TransformerEncoder(
        block, layers, norm=nn.LayerNorm(hidden_size), enable_nested_tensor=False
    )
