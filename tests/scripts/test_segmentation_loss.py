"""The loss of scripts/train_segmentation.py, against two independent implementations."""

import sys
import types
from importlib.util import find_spec

import pytest
import torch
import torch.nn.functional as F
from train_segmentation import LOSSES, VOID, segmentation_loss

SIZE = 2, 3, 5, 8, 9  # batch, frames, labels, height, width
SMP = "segmentation_models_pytorch"


def drawn(seed, void=0.0, labels=range(5)):
    """Random logits, with a gradient, and labels, of which a share is void."""
    draw = torch.Generator().manual_seed(seed)
    logits = (3 * torch.randn(SIZE, generator=draw)).requires_grad_()
    batch, frames, _, height, width = SIZE
    index = torch.randint(len(labels), (batch, frames, height, width), generator=draw)
    truth = torch.tensor(labels)[index]
    truth[torch.rand(truth.shape, generator=draw) < void] = VOID
    return logits, truth.to(torch.uint8)


def loss_and_gradient(loss, logits):
    (gradient,) = torch.autograd.grad(loss, logits)
    return loss.detach(), gradient


# ---- Without void: MONAI. It has the labels second: [batch, labels, frames, height, width].

DICE = {"to_onehot_y": True, "softmax": True, "batch": True}


def monai_focal(logits, labels):
    """MONAI's softmax focal loss is ours, but that its mean is over pixels times labels.

    Its include_background=False is not ours: it drops the logits of label 0 before the softmax.
    DiceFocalLoss(softmax=True) is not ours either: its focal part has a sigmoid for each label.
    """
    from monai.losses import FocalLoss

    loss = FocalLoss(use_softmax=True, to_onehot_y=True, gamma=2.0, include_background=True)
    return loss(logits, labels) * logits.shape[1]


def monai(loss, logits, labels):
    from monai.losses import DiceCELoss, DiceLoss

    logits, labels = logits.transpose(1, 2), labels.long()[:, None]
    if loss == "ce+dice":
        return DiceCELoss(**DICE)(logits, labels)
    parts = {
        "ce": lambda: DiceCELoss(**DICE, lambda_dice=0)(logits, labels),
        "dice": lambda: DiceLoss(**DICE)(logits, labels),
        "focal": lambda: monai_focal(logits, labels),
    }
    return sum(parts[part]() for part in loss.split("+"))


@pytest.mark.parametrize("loss", LOSSES)
def test_without_void_it_is_monais(loss):
    pytest.importorskip("monai", reason="needs: pip install --no-deps monai==1.6.1")
    for seed in range(5):
        logits, labels = drawn(seed)
        ours = loss_and_gradient(segmentation_loss(logits, labels, loss), logits)
        theirs = loss_and_gradient(monai(loss, logits, labels), logits)
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-6)


# ---- With void: segmentation-models-pytorch


@pytest.fixture
def smp_dice(monkeypatch):
    """Its DiceLoss. Its own __init__ would need timm and torchvision, which its losses do not."""
    spec = find_spec(SMP)
    if spec is None:
        pytest.skip("needs: pip install --no-deps segmentation-models-pytorch==0.6.0")
    package = types.ModuleType(SMP)
    package.__path__ = spec.submodule_search_locations
    monkeypatch.setitem(sys.modules, SMP, package)
    from segmentation_models_pytorch.losses import DiceLoss

    return DiceLoss("multiclass", ignore_index=VOID)


@pytest.mark.parametrize("present", [(0, 1, 2, 3, 4), (0, 2, 3)])
def test_with_void_dice_is_that_of_segmentation_models_pytorch(smp_dice, present):
    """Its mean is over all labels, 0 for one that does not occur; ours is over those that do."""
    for seed in range(5):
        logits, labels = drawn(seed, void=0.3, labels=present)
        ours = loss_and_gradient(segmentation_loss(logits, labels, "dice"), logits)
        theirs = smp_dice(logits.transpose(1, 2), labels.long()) * SIZE[2] / len(present)
        torch.testing.assert_close(ours, loss_and_gradient(theirs, logits), rtol=1e-4, atol=1e-6)


# ---- Properties


@pytest.mark.parametrize("loss", LOSSES)
def test_void_pixels_change_nothing(loss):
    logits, labels = drawn(0, void=0.4)
    void = (labels == VOID)[:, :, None].expand(SIZE)
    value, gradient = loss_and_gradient(segmentation_loss(logits, labels, loss), logits)
    assert (gradient[void] == 0).all() and (gradient[~void] != 0).any()
    for scale in (1, 1e4):
        changed = scale * torch.randn(SIZE, generator=torch.Generator().manual_seed(1))
        changed = changed.where(void, logits.detach()).requires_grad_()
        again = loss_and_gradient(segmentation_loss(changed, labels, loss), changed)
        torch.testing.assert_close(again, (value, gradient))


@pytest.mark.parametrize("loss", LOSSES)
def test_without_void_pixels_means_the_same_pixels_alone(loss):
    """A frame of void only: as if it were not there."""
    logits, labels = drawn(0)
    labels[:, 1] = VOID
    kept = [0, 2]
    alone = segmentation_loss(logits[:, kept], labels[:, kept], loss)
    torch.testing.assert_close(segmentation_loss(logits, labels, loss), alone)


@pytest.mark.parametrize("loss", LOSSES)
def test_a_batch_of_void_alone_gives_zero_and_teaches_nothing(loss):
    logits, labels = drawn(0, void=2.0)
    value, gradient = loss_and_gradient(segmentation_loss(logits, labels, loss), logits)
    assert value == 0 and (gradient == 0).all()


def test_a_label_that_does_not_occur_is_no_part_of_the_mean():
    """Else two labels of five, both right, would give a loss of 0.6."""
    _, labels = drawn(0, labels=(1, 4))
    right = 50 * F.one_hot(labels.long(), SIZE[2]).movedim(-1, 2).float()
    assert segmentation_loss(right, labels, "dice") < 1e-5
    wrong = right.roll(1, 2)  # predicts labels that do not occur
    assert segmentation_loss(wrong, labels, "dice") > 0.99


@pytest.mark.parametrize("loss", LOSSES)
def test_perfect_logits_have_no_loss_and_wrong_ones_a_large_one(loss):
    _, labels = drawn(0)
    right = 50 * F.one_hot(labels.long(), SIZE[2]).movedim(-1, 2).float()
    assert segmentation_loss(right, labels, loss) < 1e-5
    assert segmentation_loss(right.roll(1, 2), labels, loss) > 0.99


@pytest.mark.parametrize("loss", LOSSES)
def test_a_few_steps_of_descent_lower_it(loss):
    logits, labels = drawn(0, void=0.1)
    optimiser, values = torch.optim.Adam([logits], lr=0.5), []
    for _ in range(30):
        values.append(segmentation_loss(logits, labels, loss))
        optimiser.zero_grad()
        values[-1].backward()
        optimiser.step()
    assert values[-1] < 0.1 * values[0]


def test_focal_with_gamma_0_is_cross_entropy_and_with_more_it_looks_at_the_hard_pixels():
    logits, labels = drawn(0, void=0.2)
    ce = F.cross_entropy(logits.transpose(1, 2), labels.long(), ignore_index=VOID)
    torch.testing.assert_close(segmentation_loss(logits, labels, "ce"), ce)
    focal = loss_and_gradient(segmentation_loss(logits, labels, "focal", gamma=0.0), logits)
    torch.testing.assert_close(focal, loss_and_gradient(ce, logits))
    two = torch.zeros(1, 1, 2, 1, 2)
    two[0, 0, :, 0, 0] = torch.tensor([9.0, 1.0]).log()  # a true label's share of 0.9, and of 0.5
    both = torch.zeros(1, 1, 1, 2, dtype=torch.uint8)
    expected = -(0.1**2 * torch.tensor(0.9).log() + 0.5**2 * torch.tensor(0.5).log()) / 2
    torch.testing.assert_close(segmentation_loss(two, both, "focal"), expected)


def test_missing_a_small_label_costs_dice_as_much_as_missing_a_large_one():
    labels = torch.zeros(1, 1, 200, 200, dtype=torch.uint8)
    labels[..., :2, :2], labels[..., 50:60, :10] = 1, 2  # 4 and 100 pixels
    right = 50 * F.one_hot(labels.long(), 3).movedim(-1, 2).float()

    def missed(label, loss):
        logits = right.clone()
        logits[:, :, label] = 0
        logits[:, :, 0][labels == label] = 50  # background there
        return segmentation_loss(logits, labels, loss).item()

    assert missed(1, "dice") == pytest.approx(1 / 3, abs=0.01)
    assert missed(2, "dice") == pytest.approx(1 / 3, abs=0.01)
    assert missed(2, "ce") == pytest.approx(25 * missed(1, "ce"))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("loss", LOSSES)
def test_half_precision_logits_are_counted_in_full(loss, dtype):
    logits, labels = drawn(0, void=0.1)
    half = logits.detach().to(dtype)
    found = segmentation_loss(half, labels, loss)
    assert found.dtype == torch.float32
    assert found == segmentation_loss(half.float(), labels, loss)
    with torch.autocast("cpu", torch.bfloat16):  # where Trainer calls it
        assert found == segmentation_loss(half, labels, loss)


def test_no_number_of_pixels_is_too_large_to_be_counted():
    """A sum of ones in float32 ends at 2**24: 17 million background pixels would not fit in."""
    labels = torch.zeros(17, 16, 256, 256, dtype=torch.uint8)  # 17.8 million pixels
    logits = torch.zeros(17, 16, 2, 1, 1).expand(-1, -1, -1, 256, 256)
    # Shares of 0.5: the overlap is n / 2, the two sums n / 2 and n.
    assert segmentation_loss(logits, labels, "dice").item() == pytest.approx(1 / 3, abs=1e-4)
