import logging
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from timm.layers import resample_abs_pos_embed
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor

from m2mkd_ray.blueprint import Vit
from m2mkd_ray.errors import FillError, UsageError
from m2mkd_ray.models.vit import create_vit
from m2mkd_ray.models.weights import load_weights, pretrained_vit

TINY = Vit(name="vit_tiny_patch16_224", img_size=16, patch_size=4, num_classes=5, width=16, depth=2, num_heads=2)


@pytest.fixture
def source() -> VisionTransformer:
    torch.manual_seed(7)
    return create_vit(TINY).eval()


def changed(**fields: int | str) -> Vit:
    return TINY.model_copy(update=fields)


@pytest.mark.parametrize("file", ["vit.safetensors", "vit.pth", "vit.pt"])
@pytest.mark.parametrize("nested_under", [None, "model", "state_dict"])
def test_a_file_of_weights_makes_the_same_vit(
    file: str, nested_under: str | None, source: VisionTransformer, images: Tensor, tmp_path: Path
) -> None:
    if file.endswith(".safetensors"):
        save_file(source.state_dict(), tmp_path / file)
    else:
        state = source.state_dict()
        torch.save({nested_under: state, "epoch": 3} if nested_under else state, tmp_path / file)
    assert torch.equal(pretrained_vit(TINY, str(tmp_path / file)).eval()(images), source(images))


def test_position_embeddings_of_another_grid_are_resampled_as_timm_does(
    source: VisionTransformer, tmp_path: Path
) -> None:
    save_file(source.state_dict(), tmp_path / "vit.safetensors")
    vit = create_vit(changed(img_size=32))
    assert load_weights(vit, tmp_path / "vit.safetensors") == ()
    expected = resample_abs_pos_embed(source.pos_embed, new_size=[8, 8], num_prefix_tokens=1)
    assert torch.equal(vit.pos_embed, expected)


def test_layer_scale_under_deit3s_own_names_is_found(tmp_path: Path) -> None:
    deit3 = create_vit(changed(name="deit3_small_patch16_224"))
    state = {name.replace("ls1.gamma", "gamma_1").replace("ls2.gamma", "gamma_2"): tensor
             for name, tensor in deit3.state_dict().items()}  # fmt: skip
    torch.save({"model": state}, tmp_path / "deit3.pth")
    assert load_weights(create_vit(changed(name="deit3_small_patch16_224")), tmp_path / "deit3.pth") == ()


def test_a_classifier_for_other_classes_starts_fresh_and_says_so(
    source: VisionTransformer, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    save_file(source.state_dict(), tmp_path / "vit.safetensors")
    vit = create_vit(changed(num_classes=3))
    start = vit.head.weight.clone()
    with caplog.at_level(logging.INFO):
        assert load_weights(vit, tmp_path / "vit.safetensors") == ("head.weight", "head.bias")
    assert "no classifier for 3 classes" in caplog.text
    assert torch.equal(vit.head.weight, start)
    assert torch.equal(vit.blocks[1].mlp.fc1.weight, source.blocks[1].mlp.fc1.weight)


def test_weights_without_a_classifier_leave_it_fresh(source: VisionTransformer, tmp_path: Path) -> None:
    state = {name: tensor for name, tensor in source.state_dict().items() if not name.startswith("head.")}
    save_file(state, tmp_path / "vit.safetensors")
    assert load_weights(create_vit(TINY), tmp_path / "vit.safetensors") == ("head.weight", "head.bias")


def test_all_that_does_not_fit_is_in_one_message_and_nothing_is_loaded(
    source: VisionTransformer, tmp_path: Path
) -> None:
    state = source.state_dict()
    state["norm.scale"] = state.pop("norm.weight")
    state["blocks.0.mlp.fc1.weight"] = torch.zeros(8, 16)
    save_file(state, tmp_path / "vit.safetensors")
    vit = create_vit(TINY)
    before = {name: tensor.clone() for name, tensor in vit.state_dict().items()}
    with pytest.raises(FillError) as error:
        load_weights(vit, tmp_path / "vit.safetensors")
    message = str(error.value)
    assert "norm.weight (16,): missing" in message
    assert "norm.scale (16,): the ViT has no such tensor" in message
    assert "blocks.0.mlp.fc1.weight: found (8, 16), expected (64, 16)" in message
    assert message.count("\n") == 3
    assert all(torch.equal(tensor, before[name]) for name, tensor in vit.state_dict().items())


def test_weights_of_a_deeper_vit_are_not_loaded_in_part(source: VisionTransformer, tmp_path: Path) -> None:
    save_file(source.state_dict(), tmp_path / "vit.safetensors")
    with pytest.raises(FillError, match=r"blocks.1.attn.qkv.weight \(48, 16\): the ViT has no such tensor"):
        load_weights(create_vit(changed(depth=1)), tmp_path / "vit.safetensors")


def test_a_file_that_would_run_code_is_refused(tmp_path: Path) -> None:
    torch.save({"model": Path("x")}, tmp_path / "vit.pth")
    with pytest.raises(UsageError, match=r"Cannot load weights from .*vit\.pth"):
        pretrained_vit(TINY, str(tmp_path / "vit.pth"))


@pytest.mark.parametrize(("name", "content"), [("a.pth", b"junk"), ("a.safetensors", b"junk"), ("a.npz", b"")])
def test_a_file_that_holds_no_weights_is_refused(name: str, content: bytes, tmp_path: Path) -> None:
    (tmp_path / name).write_bytes(content)
    with pytest.raises(UsageError, match=f"Cannot load weights from .*{name}"):
        pretrained_vit(TINY, str(tmp_path / name))


def test_a_missing_file_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="No such file"):
        pretrained_vit(TINY, str(tmp_path / "none.safetensors"))


def test_a_vit_without_weights_on_the_hub_is_refused() -> None:
    vit = changed(name="vit_small_patch16_36x1_224")
    with pytest.raises(UsageError, match="timm's hub has no weights for 'vit_small_patch16_36x1_224'"):
        pretrained_vit(vit, "timm")
