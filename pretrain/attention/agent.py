"""Agent attention (Han et al., ECCV 2024, arXiv 2312.08874) on a 2-D grid of tokens.

    out = softmax(Q A^T) softmax(A K^T) V + conv(V),    A = Q averaged over the cells of a coarse grid

The agents A gather from all tokens, then every token asks the agents: Nystrom without the inverse. Both softmaxes are
scaled by 1/sqrt(d) and are calls of the fused kernel. What differs from the paper, and why:
 - prefix tokens are agents of their own: averaged into a cell of the grid, what only they know would drown;
 - no agent bias: it is a learned table tied to the size of the grid, which would neither move to another resolution
   nor let the fused kernels run; the decoder's tokens carry positions already.
"""

from __future__ import annotations

from torch import Tensor
from torch.nn import functional as F

from .base import Grid, recomputed
from .grid import GridAttention


class AgentAttention(GridAttention):
    """Attention through m agents, linear in N.

    Args:
        num_agents: m, at most; the grid of agents has the token grid's shape.
        conv_kernel: side of the depth-wise convolution on V, which gives back the variety that agents lose; 0: none.
    """

    def __init__(
        self,
        dim: int,
        num_heads: int,
        grid: Grid,
        prefix_tokens: int = 0,
        *,
        num_agents: int = 64,
        conv_kernel: int = 3,
    ):
        if num_agents < 1:
            raise ValueError("num_agents must be at least 1")
        super().__init__(dim, num_heads, grid, prefix_tokens, conv_kernel, num_agents)

    def mix(self, Q: Tensor, K: Tensor, V: Tensor) -> Tensor:
        """(B, H, N, d) -> (B, H, N, d)."""
        A = self.landmarks(Q)  # (B, H, m, d)
        return recomputed(self.broadcast, Q, A, F.scaled_dot_product_attention(A, K, V), V)

    def broadcast(self, Q: Tensor, A: Tensor, gathered: Tensor, V: Tensor) -> Tensor:
        """softmax(Q A^T) gathered + conv(V)."""
        return self.add_skip(F.scaled_dot_product_attention(Q, A, gathered), V)
