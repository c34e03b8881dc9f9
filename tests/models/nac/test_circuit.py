"""The whole circuit: sizes, randomness, who sees whom."""

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from m2mkd_ray.blueprint import Nac
from m2mkd_ray.models.nac.circuit import Circuit
from m2mkd_ray.models.nac.graph import distances
from m2mkd_ray.models.vit import num_parameters
from m2mkd_ray.training import Classification

TINY = Nac(num_classes=200)
IMAGENET = Nac(
    img_size=224, num_classes=1000, width=512, num_heads=8, num_inputs=192, num_mediators=768, mlp_ratio=1.0
)
PARTS = ("tokenizer", "read_in", "propagators.0", "read_out", "seeder", "pooling")


@pytest.mark.parametrize(
    ("nac", "total", "parts", "latents"),
    [
        (TINY, 26.70, (1.24, 2.32, 2.51, 2.51, 0.30, 0.08), 0.17),
        (IMAGENET, 37.59, (2.22, 3.02, 3.41, 3.41, 0.53, 0.51), 0.59),
    ],
    ids=["tiny", "imagenet"],
)
def test_a_circuit_has_the_references_size(nac: Nac, total: float, parts: tuple[float, ...], latents: float) -> None:
    """Millions of parameters, counted in the reference's own model."""
    with torch.device("meta"):
        circuit = Circuit(nac, 8)
    assert num_parameters(circuit) / 1e6 == pytest.approx(total, abs=0.006)
    found = [num_parameters(circuit.get_submodule(part)) / 1e6 for part in PARTS]
    assert found == pytest.approx(parts, abs=0.006)
    of_latents = sum(num_parameters(circuit.get_submodule(part)) for part in ("inputs", "mediators", "outputs"))
    assert of_latents / 1e6 == pytest.approx(latents, abs=0.006)
    assert circuit.tokenizer.grid.shape == (64, nac.img_size // 8, nac.img_size // 8)


def test_evaluation_is_the_same_each_time_and_for_each_image_alone(nac: Nac, images: Tensor) -> None:
    circuit = Circuit(nac, 2, drop_path=0.5).eval()
    state = torch.get_rng_state()
    together = circuit(images)
    assert torch.equal(together, circuit(images))
    torch.testing.assert_close(together, torch.cat([circuit(images[index : index + 1]) for index in range(3)]))
    assert torch.equal(torch.get_rng_state(), state)


def test_sampled_evaluation_is_the_same_for_each_image_alone_and_draws_from_nobodys_generator(
    nac: Nac, images: Tensor
) -> None:
    torch.manual_seed(0)
    sampled = Circuit(nac.model_copy(update={"evaluation": "sampled"}), 2).eval()
    state = torch.get_rng_state()
    found = sampled(images)
    assert torch.equal(found, sampled(images))
    assert torch.equal(torch.get_rng_state(), state)
    torch.testing.assert_close(sampled(images.flip(0)).flip(0), found)
    torch.testing.assert_close(torch.cat([sampled(images[index : index + 1]) for index in range(3)]), found)
    mean = Circuit(nac, 2).eval()
    mean.load_state_dict(sampled.state_dict())
    assert not torch.allclose(found, mean(images))


def test_training_draws_from_torchs_generator(nac: Nac, images: Tensor) -> None:
    circuit = Circuit(nac, 2)
    found = []
    for seed in (1, 1, 2):
        torch.manual_seed(seed)
        found.append(circuit(images))
    assert torch.equal(found[0], found[1])
    assert not torch.equal(found[0], found[2])


def test_a_mediator_sees_itself_however_lonely_it_is(nac: Nac, images: Tensor) -> None:
    circuit = Circuit(nac.model_copy(update={"truncation": 1e-4}), 2).eval()
    assert (distances(*(circuit.mediators.signatures,) * 2).diagonal().abs() < 1e-5).all()
    assert circuit(images).isfinite().all()


@torch.no_grad()
def test_mediators_that_nobody_sees_change_nothing(nac: Nac, images: Tensor) -> None:
    """Signatures decide who is heard: a group turned away from the others is cut off from read-in to read-out."""
    circuit = Circuit(nac, 2).eval()
    for group in (circuit.inputs, circuit.mediators, circuit.outputs):
        group.signatures.zero_()
        group.signatures[:, 0] = 1
    lonely = circuit.mediators
    lonely.signatures[0] = -lonely.signatures[0]
    circuit.read_out.attention.kernel.truncation = 0.9  # the reference's read-out hears everybody
    before = circuit(images)
    lonely.codes[0] = torch.randn_like(lonely.codes[0])
    torch.testing.assert_close(circuit(images), before)
    lonely.codes[1] = torch.randn_like(lonely.codes[1])
    assert not torch.allclose(circuit(images), before)


def test_all_parameters_learn_and_a_step_makes_the_loss_less(nac: Nac, images: Tensor) -> None:
    torch.manual_seed(0)
    circuit = Circuit(nac, 2)
    objective, targets = Classification(circuit), torch.eye(5)[:3]
    loss, logs = objective(images, targets)
    assert logs["loss"] == logs["ce"] + logs["regulariser"]
    assert torch.equal(logs["regulariser"], circuit.regulariser().detach())
    loss.backward()
    assert all(parameter.grad is not None for parameter in circuit.parameters())
    circuit.eval()
    before = objective(images, targets)[0]
    circuit.zero_grad()
    before.backward()
    with torch.no_grad():
        for parameter in circuit.parameters():
            if parameter.grad is not None:  # without noise the seeder's variance plays no part
                parameter -= 0.01 * parameter.grad
    assert objective(images, targets)[0] < before


def test_kernels_cut_and_sample_in_propagators_alone(nac: Nac) -> None:
    circuit = Circuit(nac, 3)
    found = [(part.attention.kernel.truncation, part.attention.kernel.temperature) for part in circuit.propagators]
    assert found == [(0.9, 0.5)] * 3
    of_outputs = circuit.read_out.attention
    assert (of_outputs.kernel.truncation, of_outputs.kernel.temperature) == (None, None)


def test_a_read_out_has_two_norms_and_adds_no_states_and_a_propagator_the_other_way_round(nac: Nac) -> None:
    circuit = Circuit(nac, 1)
    of_mediators, of_outputs = circuit.propagators[0].attention, circuit.read_out.attention
    assert (of_outputs.residual, of_mediators.residual) == (False, True)
    assert of_outputs.sender_norm is not None
    assert of_mediators.sender_norm is None


def test_a_read_ins_attention_alone_starts_with_all_of_its_message(nac: Nac) -> None:
    """docs/method.md: LayerScale starts at 1 there and at `layer_scale` everywhere else; a tokenizer has its own."""
    scales = {
        name.removesuffix(".layer_scale.gamma"): scale
        for name, scale in Circuit(nac, 2).named_parameters()
        if name.endswith("layer_scale.gamma")
    }
    layers = ("read_in", "propagators.0", "propagators.1", "read_out")
    assert set(scales) == {f"{layer}.{part}" for layer in layers for part in ("attention", "mlp")}
    for name, scale in scales.items():
        assert torch.equal(scale, torch.full_like(scale, 1.0 if name == "read_in.attention" else 0.1)), name


def test_codes_have_noise_in_training_alone(nac: Nac, images: Tensor) -> None:
    """What else is random is the same: noise of codes is drawn whatever it is multiplied with."""
    noisy = Circuit(nac, 2)
    plain = Circuit(nac.model_copy(update={"code_noise": 0.0}), 2)
    plain.load_state_dict(noisy.state_dict())

    def logits(circuit: Circuit) -> Tensor:
        torch.manual_seed(3)
        return circuit(images)

    assert not torch.allclose(logits(noisy), logits(plain))
    assert torch.equal(logits(noisy.eval()), logits(plain.eval()))


def test_the_regulariser_is_the_weighted_sum_of_too_small_distances_of_all_latents(nac: Nac) -> None:
    torch.manual_seed(0)
    circuit = Circuit(nac, 2)
    signatures = torch.cat([circuit.inputs.signatures, circuit.mediators.signatures, circuit.outputs.signatures])
    apart = 1 - F.cosine_similarity(signatures[:, None], signatures[None], dim=-1)  # (U, U)
    of_pairs = [apart[first, second].item() for first in range(len(apart)) for second in range(first)]
    near = [distance for distance in of_pairs if distance < 0.4]
    assert 0 < len(near) < len(of_pairs)
    assert circuit.regulariser().item() == pytest.approx(-0.1 * sum(near), rel=1e-4)


def test_the_regulariser_is_of_all_signatures(nac: Nac) -> None:
    circuit = Circuit(nac, 2)
    circuit.regulariser().backward()
    with torch.no_grad():
        circuit.outputs.signatures[0] = circuit.inputs.signatures[0] * 2 + 0.01
    circuit.zero_grad()
    circuit.regulariser().backward()
    assert circuit.inputs.signatures.grad[0].abs().sum() > 0
    assert circuit.outputs.signatures.grad[0].abs().sum() > 0
    none = Circuit(nac.model_copy(update={"repulsion": 0.0}), 2)
    assert none.regulariser() == 0
