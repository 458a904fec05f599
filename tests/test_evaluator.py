"""Scores by hand, judges of both origins, and what is refused."""
import pytest
import torch
import torchvision
from torch import nn

import evaluator
from common.datasets import load_iclevr
from common.run import UserError

CPU = torch.device("cpu")


def course_checkpoint(path, n_classes=24):
    """A file laid out as the i-CLEVR course's evaluator loads it."""
    net = torchvision.models.resnet18(weights=None)
    net.fc = nn.Sequential(nn.Linear(512, n_classes), nn.Sigmoid())
    torch.save({"model": net.state_dict()}, path)
    return net.eval()


def test_count_objects_by_hand():
    labels = torch.tensor([[3, 24, 24], [1, 2, 24], [5, 6, 7], [0, 8, 9]])
    scores = torch.zeros(4, 24)
    scores[0, [3, 4]] = torch.tensor([0.2, 0.1])  # 1 of 1, however unsure
    scores[1, [1, 9, 2]] = torch.tensor([0.9, 0.8, 0.7])  # top 2 are 1 and 9: 1 of 2
    scores[2, [7, 6, 5]] = torch.tensor([0.9, 0.8, 0.7])  # 3 of 3
    scores[3, [1, 2, 9]] = 1.0  # 1 of 3
    result = evaluator.count_objects(scores, labels)
    assert result["accuracy"] == pytest.approx(6 / 9)
    assert result["exact"] == pytest.approx(2 / 4)
    assert (
        result["accuracy_1"] == 1
        and result["accuracy_2"] == 0.5
        and result["accuracy_3"] == pytest.approx(4 / 6)
    )


def test_score_sets_means_over_draws_of_z():
    sets = {"one": torch.tensor([[0, 24, 24], [1, 24, 24]])}
    seen = []

    def sample(z, labels):
        seen.append(z.clone())
        return z[:, :1, None, None] * torch.ones(1, 3, 64, 64)

    judge = evaluator.Judge(
        lambda x: torch.nn.functional.one_hot((x[:, 0, 0, 0] > 0).long(), 24).float(), "", None
    )
    state = torch.get_rng_state()
    result = evaluator.score_sets(sample, 4, judge, sets, draws=6, seed=1, device=CPU)["one"]
    assert torch.equal(torch.get_rng_state(), state)
    shown = torch.stack([(z[:, 0] > 0).long() == torch.tensor([0, 1]) for z in seen]).float().mean(1)
    assert result["accuracy"] == pytest.approx((shown.mean().item(), shown.std().item()))
    assert shown.std() > 0 and not torch.equal(seen[0], seen[1])
    first = [z.clone() for z in seen]
    seen.clear()
    evaluator.score_sets(sample, 4, judge, sets, draws=6, seed=1, device=CPU)
    assert all(torch.equal(a, b) for a, b in zip(first, seen))


def test_the_course_s_checkpoint_is_used_as_it_is(tmp_path):
    net = course_checkpoint(tmp_path / "checkpoint.pth")
    judge = evaluator.get_judge(str(tmp_path / "checkpoint.pth"), data_of(24), 64, 1, CPU)
    x = torch.rand(3, 3, 64, 64) * 2 - 1
    torch.testing.assert_close(judge(x), net(x))
    assert "not known" in judge.title and judge.held_out is None
    assert judge(torch.zeros(2, 3, 32, 32)).shape == (2, 24)  # brought to 64×64


def data_of(n_classes):
    class Data:
        classes = tuple(str(i) for i in range(n_classes))
    return Data()


def test_refused_judges(tmp_path):
    course_checkpoint(tmp_path / "23.pth", 23)
    torch.save({"weights": 1}, tmp_path / "other.pth")
    (tmp_path / "text.pth").write_text("no checkpoint")
    state = torch.load(tmp_path / "23.pth", weights_only=True)["model"]
    state = {k: v for k, v in state.items() if not k.startswith("layer3")}
    state["fc.0.weight"], state["fc.0.bias"] = torch.zeros(24, 512), torch.zeros(24)
    torch.save({"model": state}, tmp_path / "part.pth")
    for name, message in (
        ("23.pth", "23 classes"),
        ("other.pth", "is not a judge"),
        ("text.pth", "is not a judge"),
        ("part.pth", "is no ResNet-18"),
        ("none.pth", "no such file"),
    ):
        with pytest.raises(UserError, match=message):
            evaluator.get_judge(str(tmp_path / name), data_of(24), 64, 1, CPU)


def test_a_judge_learns_is_cached_and_leaves_the_random_state_alone(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    data = load_iclevr("drawn", 32, 30)
    torch.manual_seed(7)
    state = torch.get_rng_state()
    judge = evaluator.get_judge("auto", data, 8, 60, CPU)
    assert torch.equal(torch.get_rng_state(), state)
    asked = (data.labels < 24).sum(1)
    held = data.held_out()
    chance = (asked[held] ** 2).sum() / 24 / asked[held].sum()
    images = data.images[~held] / 127.5 - 1
    learnt = evaluator.count_objects(judge(images), data.labels[~held])["accuracy"]
    assert learnt > 2 * chance  # on its training images: that it learns at all
    assert f"{judge.held_out['accuracy']:.4f}" in judge.title
    monkeypatch.setattr(evaluator, "train_judge", None)
    again = evaluator.get_judge("auto", data, 8, 60, CPU)
    assert torch.equal(again(images), judge(images))


def test_too_few_scenes_for_a_judge_are_refused(iclevr):
    with pytest.raises(UserError, match="fewer than 10 scenes"):
        evaluator.train_judge(load_iclevr(str(iclevr), 32), 8, 2, CPU)


def test_augmentation_moves_whole_images():
    torch.manual_seed(0)
    x = torch.zeros(200, 3, 16, 16)
    x[:, :, 8, 5] = 1
    y = evaluator._augment(x)
    at = y[:, 0].flatten(1).argmax(1)
    rows, cols = at // 16, at % 16
    assert y.shape == x.shape and set(rows.tolist()) == set(range(4, 13))
    assert set(cols.tolist()) == set(range(1, 10)) | set(range(6, 15))  # 5 or, mirrored, 10; ± 4
    torch.testing.assert_close(y.amax(1) > 0.5, y.amin(1) > 0.5)  # all three channels alike


def test_the_narrow_judge_has_the_same_layers():
    wide, narrow = evaluator.JudgeNet(24), evaluator.JudgeNet(24, 16)
    assert narrow.fc[0].in_features == 128 and wide.fc[0].in_features == 512
    assert narrow(torch.zeros(2, 3, 64, 64)).shape == (2, 24)
    course = torchvision.models.resnet18()
    assert [k for k in course.state_dict() if not k.startswith("fc")] == \
        [k for k in wide.state_dict() if not k.startswith("fc")]
