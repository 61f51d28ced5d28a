"""Pictures of triggers: the difference around grey, and the share of heat on a network whose gaze is known."""

from __future__ import annotations

import io
import re

import pytest
import torch
from torch import Tensor, nn

from beniful_fast.evaluation.pictures import Shown, pictures_of, shown, trigger_picture
from beniful_fast.evaluation.protocol import Evaluation


class Corner(nn.Module):
    """Class 1 for what is bright in the lower right 2 x 2 pixels, else class 0 by the upper left ones."""

    def __init__(self) -> None:
        super().__init__()
        self.maps = nn.Conv2d(1, 2, 1, bias=False)
        nn.init.ones_(self.maps.weight)

    def forward(self, x: Tensor) -> Tensor:
        maps = self.maps(x)
        return torch.stack([maps[:, 0, :2, :2].mean((1, 2)), 9 * maps[:, 1, 6:, 6:].mean((1, 2))], 1)


def test_share_of_heat_inside_the_trigger() -> None:
    clean = torch.full((20, 1, 8, 8), 0.1)
    clean[:, :, :2, :2] = 0.9
    clean[:, :, 6:, 6:] = 0.0
    triggered = clean.clone()
    triggered[:, :, 6:, 6:] = 1.0
    # The gradient of a mean is spread evenly over a map, so the heat is the map of class 1's channel.
    inside = float(4 * 1.0 / triggered[0].sum())
    picture = shown(clean, triggered, {"backdoored network": Corner()}, count=3)
    assert len(picture.clean) == len(picture.triggered) == 3
    assert [name.replace("\n", " ") for name in picture.heat] == ["triggered, backdoored network", "clean, backdoored network"]
    assert all(len(images) == len(maps) == 3 for images, maps in picture.heat.values())
    assert f"{100 * inside:.0f} % of the backdoored network's lies on pixels that the trigger changes, which are 6 %" in picture.note
    assert "means of 20 images" in picture.note


def test_a_network_without_maps_is_named() -> None:
    x = torch.rand(4, 1, 8, 8)
    picture = shown(x, x + 0.1, {"backdoored network": nn.Sequential(nn.Flatten(), nn.Linear(64, 3))}, count=2)
    assert picture.heat == {} and "none of the backdoored network (layer: " in picture.note


def test_pictures_of_an_evaluation(tmp_path_factory: pytest.TempPathFactory) -> None:
    folder = str(tmp_path_factory.mktemp("run"))
    made = Evaluation("digits", ["badnets", "blend"], [], arch="resnet12w", clean_images=200, judged=100, epochs=1, folder=folder)
    assert pictures_of(made) == {}
    plan = made.plan()
    for cell in plan[:2]:
        made.cells.run(cell)
    found = pictures_of(made, 2)
    assert list(found) == ["badnets"]
    assert len(found["badnets"].heat) == 4 and "clean network's" in found["badnets"].note


def test_picture_shows_the_difference_around_grey() -> None:
    clean = torch.full((2, 3, 4, 4), 0.5)
    triggered = clean.clone()
    triggered[:, :, 3, 3] += 0.1
    drawn = [axes.images[0].get_array() for axes in trigger_picture(Shown(clean, triggered)).axes]
    assert len(drawn) == 6
    assert drawn[4][0, 0].tolist() == pytest.approx([0.5] * 3) and drawn[4][3, 3].tolist() == pytest.approx([0.75] * 3)
    figure = trigger_picture(Shown(clean, triggered, {"triggered": (triggered, torch.rand(2, 4, 4))}))
    assert len(figure.axes) == 8 and len(figure.axes[-1].images) == 2
    file = io.BytesIO()
    figure.savefig(file, format="png")
    assert file.getvalue().startswith(b"\x89PNG")


@pytest.mark.parametrize(
    ("shapes", "message"),
    [
        (((2, 3, 4, 4), (1, 3, 4, 4)), "takes (k, 1 or 3, H, W) twice"),
        (((2, 2, 4, 4), (2, 2, 4, 4)), "takes (k, 1 or 3, H, W) twice"),
        (((2, 1, 4, 4), (2, 1, 4, 4), (2, 4, 5)), "takes (2, 1, 4, 4) and (2, 4, 4)"),
    ],
)
def test_pictures_that_do_not_belong_together(shapes: tuple[tuple[int, ...], ...], message: str) -> None:
    clean, triggered, *heat = map(torch.zeros, shapes)
    with pytest.raises(ValueError, match=re.escape(message)):
        trigger_picture(Shown(clean, triggered, {"triggered": (clean, heat[0])} if heat else {}))
