"""BeniFul's detection on real CIFAR-10 and real backdoored networks, and on clean ones with the same triggers."""

from __future__ import annotations

import pytest
import torch
from sklearn.metrics import roc_auc_score

import beniful_fast as bf

from .third_party import cifar10_test, load, predict

pytestmark = pytest.mark.data


@pytest.fixture(scope="module")
def cifar10(data_folder):
    return cifar10_test(data_folder)


@pytest.mark.parametrize(
    ("name", "clean_twin", "least"),
    [("wrn16_1_grid_trigger_target0", "resnet20_clean", 0.99), ("small_resnet_wanet_target0", "small_resnet_clean", 0.95)],
)
def test_triggered_inputs_are_found_and_only_where_there_is_a_backdoor(name, clean_twin, least, cifar10, data_folder):
    images, labels = cifar10
    clean, test, rest = images[:2500], images[2500:4500], images[6000:8000][labels[6000:8000] != 0]
    model, trigger = load(data_folder, name)
    before = {key: value.clone() for key, value in model.state_dict().items()}
    triggered = trigger(rest)
    reached = predict(model, triggered) == 0
    assert reached.float().mean() > 0.9

    def auroc(screener, bad):
        scores = torch.cat([screener.score(test), screener.score(bad)])
        return roc_auc_score([0] * len(test) + [1] * len(bad), scores.numpy())

    screener = bf.Screener(model).fit(clean)
    assert auroc(screener, triggered[reached]) >= least
    flagged = screener.predict(test).float().mean()
    assert abs(flagged - 0.05) <= 3 * (0.05 * 0.95 * (1 / screener.n_calibration + 1 / len(test))) ** 0.5
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())
    assert abs(auroc(bf.Screener(load(data_folder, clean_twin)[0]).fit(clean), triggered) - 0.5) <= 0.1
