"""How alike the Grams of several models over the same tokens are: the centred kernel alignment.

    A(K_a, K_b) = ⟨H K_a H, H K_b H⟩ / (‖H K_a H‖_F ‖H K_b H‖_F),    H = I − 11ᵀ/N

1 where the gradients of one are those of the other up to a rotation, a scale and a shift; 0 where their similarities
between tokens have nothing in common. Axis order: results `(r, q)`, tokens `(n, m)`.

Sources: Cortes, Mohri and Rostamizadeh, "Algorithms for learning kernels based on centered alignment", JMLR 2012;
Kornblith, Norouzi, Lee and Hinton, "Similarity of neural network representations revisited", ICML 2019.
"""

import torch
from einops import einsum
from jaxtyping import Float
from torch import Tensor

from fisherfunc.linalg.gram import centred_matrix


def centred_alignment(grams: Float[Tensor, "r n n"]) -> Float[Tensor, "r r"]:
    """The centred kernel alignment of each pair of Grams over the same rows in the same order. Cost 2 r² N² operations.

    NaN where a centred Gram is zero up to the round-off of its centring, as for a single token.

    Args:
        grams: One a result.
    """
    centre = centred_matrix(grams.double())
    norms = torch.linalg.matrix_norm(centre)
    floor = grams.shape[-1] * torch.finfo(grams.dtype).eps * torch.linalg.matrix_norm(grams.double())
    norms = torch.where(norms > floor, norms, torch.nan)
    return einsum(centre, centre, "r n m, q n m -> r q") / (norms[:, None] * norms[None, :])
