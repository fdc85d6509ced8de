"""Build the transformer encoder that all scorers use to read histories."""

from torch import nn


def encoder(hidden_size: int, *, layers: int, heads: int, dropout: float) -> nn.TransformerEncoder:
    """Build pre-norm blocks with a final norm and a feed-forward width of 4; batch first."""
    block = nn.TransformerEncoderLayer(
        hidden_size, heads, 4 * hidden_size, dropout, activation="gelu",
        batch_first=True, norm_first=True,
    )  # fmt: skip
    return nn.TransformerEncoder(
        block, layers, norm=nn.LayerNorm(hidden_size), enable_nested_tensor=False
    )
