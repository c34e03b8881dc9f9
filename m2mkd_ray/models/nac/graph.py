"""Signatures and the graph that they make: latents at a cosine distance below a threshold are joined.

U, V = latents, S = width of signatures

From kamanphoebe/m2mKD `nacs/neural_compilers/{model/nc/seeding.py,objectives/regularization.py}`
(preset_graph_signatures, SignatureHingeRepulsion).
"""

import networkx
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from m2mkd_ray.blueprint import Prior

FIT_LR = 1e-3
"""Adam's, when signatures are fitted to a graph."""


def distances(receivers: Tensor, senders: Tensor) -> Tensor:
    """1 - cos of signatures (U, S) and (V, S), in [0, 2]: (U, V)."""
    return 1 - F.normalize(receivers, dim=-1) @ F.normalize(senders, dim=-1).T


def sample_graph(prior: Prior, num_nodes: int, seed: int) -> Tensor:
    """A random graph as its adjacency (U, U), True for an edge; no node is joined to itself."""
    size = num_nodes // prior.num_groups
    if prior.kind == "scale_free":
        graph = networkx.barabasi_albert_graph(num_nodes, prior.new_edges, seed=seed)
    elif prior.kind == "planted_partition":
        graph = networkx.planted_partition_graph(prior.num_groups, size, prior.p_in, prior.p_out, seed=seed)
    elif prior.kind == "ring_of_cliques":
        graph = networkx.ring_of_cliques(prior.num_groups, size)
    else:
        graph = networkx.erdos_renyi_graph(num_nodes, prior.p, seed=seed)
    return torch.from_numpy(networkx.to_numpy_array(graph)) > 0


def fit_signatures(adjacency: Tensor, width: int, *, threshold: float, steps: int) -> Tensor:
    """Signatures (U, S) of which those of joined nodes (U, U) are nearer than `threshold`, and no others.

    From a random orthogonal start, drawn from torch's global generator, steps of Adam on the mean over all pairs of
    max(threshold, d) for edges and max(-threshold, -d) for others: each moves no further than it has to.
    """
    signatures = nn.init.orthogonal_(torch.empty(len(adjacency), width)).requires_grad_()
    optimizer = torch.optim.Adam([signatures], lr=FIT_LR)
    for _ in range(steps):
        signatures.grad = fit_gradient(signatures, adjacency, threshold)
        optimizer.step()
    return signatures.detach()


@torch.no_grad()
def fit_gradient(signatures: Tensor, adjacency: Tensor, threshold: float) -> Tensor:
    """The gradient (U, S) of what `fit_signatures` makes less; by hand, in a third of autograd's time.

    With unit vectors n_u = s_u / |s_u| and d = 1 - n n^T, dL/dd = G has 1 / U^2 for edges that are too long, -1 / U^2
    for others that are too short, and is symmetric. So dL/dn = -2 G n, of which what is along n_u falls out.
    """
    norms = signatures.norm(dim=-1, keepdim=True)  # (U, 1)
    units = signatures / norms
    signs = torch.where(adjacency, 1.0, -1.0) / adjacency.numel()
    moved = ((1 - units @ units.T) > threshold) == adjacency  # (U, U)
    of_units = -2 * (moved * signs) @ units
    return (of_units - units * (units * of_units).sum(-1, keepdim=True)) / norms


def initial_signatures(prior: Prior, num_latents: int, width: int) -> Tensor:
    """Signatures (U, S) that make a random graph, all drawn from torch's global generator.

    On the device `meta` there is nothing to fit, and it comes back at once.
    """
    signatures = torch.empty(num_latents, width)
    if signatures.is_meta:
        return signatures
    seed = int(torch.randint(2**31, ()))
    graph = sample_graph(prior, num_latents, seed)
    return fit_signatures(graph, width, threshold=prior.threshold, steps=prior.steps)


def repulsion(signatures: Tensor, hinge: float) -> Tensor:
    """-sum of the distances of all pairs among (U, S) that are nearer than `hinge`: drives them apart."""
    distance = distances(signatures, signatures)  # (U, U)
    return -distance.where(distance < hinge, 0).tril(-1).sum()
