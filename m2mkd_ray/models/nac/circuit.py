"""The whole circuit: images to logits through latents that are joined by a learned, sparse graph.

B = images, U = latents, V = senders, D = width = width of codes, S = width of signatures, K = classes

From kamanphoebe/m2mKD `nacs/neural_compilers/model/nc/{core,block}.py` (NeuralCompiler, LatentGraph), with its
configurations' settings.
"""

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from m2mkd_ray.blueprint import Nac, Prior
from m2mkd_ray.models.nac.attention import SignatureKernel
from m2mkd_ray.models.nac.ends import Noise, Seeder
from m2mkd_ray.models.nac.graph import initial_signatures, repulsion
from m2mkd_ray.models.nac.layers import Exchange, ReadIn, pooling, tokenizer
from m2mkd_ray.models.nac.modulated import noisy

EVALUATION_SEED = 0
"""Of the noise with `evaluation: sampled`."""


class Latents(nn.Module):
    """What a group of latents owns: signatures (U, S), their places in the graph, and codes (U, D), both learned."""

    def __init__(self, num_latents: int, signature_width: int, code_width: int, prior: Prior | None = None) -> None:
        super().__init__()
        self.signatures = nn.Parameter(
            torch.randn(num_latents, signature_width)
            if prior is None
            else initial_signatures(prior, num_latents, signature_width)
        )
        self.codes = nn.Parameter(torch.randn(num_latents, code_width))


class Circuit(nn.Module):
    """A neural attentive circuit: images (B, 3, H, W) to logits (B, K).

    Input latents read the image once. Every propagator then has the mediators hear input latents and mediators, along
    the graph; input latents stay as they are. Output latents hear both at the end and are pooled.

    In training it draws from torch's global generator: noise on codes and first states, edges, pooling, stochastic
    depth. In evaluation it draws nothing that is not the same for every image (`Nac.evaluation`).
    """

    def __init__(self, nac: Nac, num_propagators: int, drop_path: float = 0.0) -> None:
        """`drop_path` is that of every propagator; read-in and read-out have none."""
        super().__init__()
        self.nac, self.width = nac, nac.width
        self.tokenizer = tokenizer(nac)
        self.inputs = Latents(nac.num_inputs, nac.signature_width, nac.width)
        self.mediators = Latents(nac.num_mediators, nac.signature_width, nac.width, nac.prior)
        self.outputs = Latents(nac.num_outputs, nac.signature_width, nac.width)
        self.seeder = Seeder(nac.width, nac.width)
        self.read_in = ReadIn(nac)
        self.propagators = nn.ModuleList(
            Exchange(nac, kernel=SignatureKernel(nac.truncation, nac.temperature), drop_path=drop_path)
            for _ in range(num_propagators)
        )
        self.read_out = Exchange(nac, kernel=SignatureKernel(), is_read_out=True)
        self.pooling = pooling(nac)

    def forward(self, images: Tensor) -> Tensor:
        """Images (B, 3, H, W) to logits (B, K)."""
        if self.training:
            return self._logits(images, "each")
        if self.nac.evaluation == "mean":
            return self._logits(images, "none")
        with _own_noise(images.device):
            return self._logits(images, "shared")

    def regulariser(self) -> Tensor:
        """What is added to the loss in training end to end: signatures that are too near drive each other apart."""
        groups = (self.inputs, self.mediators, self.outputs)
        signatures = torch.cat([group.signatures for group in groups])
        with torch.autocast(signatures.device.type, enabled=False):
            return self.nac.repulsion * repulsion(signatures.float(), self.nac.hinge)

    def _logits(self, images: Tensor, noise: Noise) -> Tensor:
        inputs, mediators, outputs = (
            self.seeder(self._codes(group), len(images), noise=noise)
            for group in (self.inputs, self.mediators, self.outputs)
        )  # (B, U, D)
        inputs = self.read_in(inputs, self._codes(self.inputs), self.tokenizer(images))
        of_senders = torch.cat([self.inputs.signatures, self.mediators.signatures])  # (V, S)
        for propagator in self.propagators:
            mediators = propagator(
                mediators,
                self._codes(self.mediators),
                torch.cat([inputs, mediators], dim=1),
                self._codes(self.inputs, self.mediators),
                (self.mediators.signatures, of_senders),
            )
        outputs = self.read_out(
            outputs,
            self._codes(self.outputs),
            torch.cat([inputs, mediators], dim=1),
            self._codes(self.inputs, self.mediators),
            (self.outputs.signatures, of_senders),
        )
        return self.pooling(outputs, noise=noise)

    def _codes(self, *groups: Latents) -> Tensor:
        """Codes of the groups (U, D); in training with new noise each time."""
        codes = torch.cat([group.codes for group in groups])
        return noisy(codes, self.nac.code_noise) if self.training else codes


@contextmanager
def _own_noise(device: torch.device) -> Iterator[None]:
    """Noise that is the same each time, after which torch's generators are as they were."""
    with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
        torch.manual_seed(EVALUATION_SEED)
        yield
