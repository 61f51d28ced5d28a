"""What is claimed, and what is refused."""

from __future__ import annotations

import json

import pytest
import torch

from beniful_fast.privacy import Accountant, Guarantee, MetricPrivacy


def test_releases_compose() -> None:
    accountant = Accountant(8.0, 5.0)
    for m in (1, 2, 3):
        guarantee = accountant.spend("public")
        assert (guarantee.releases, guarantee.eps_total, guarantee.eps_ldp) == (m, 8.0 * m, 2 * 5.0 * 8.0 * m)
    assert accountant.guarantee == guarantee
    assert accountant.after("public").eps_total == 32.0
    assert accountant.releases == 3


def test_without_a_clip_there_is_no_local_number() -> None:
    guarantee = Accountant(8.0).spend("public")
    assert guarantee.eps_ldp is None
    assert "codes were not clipped" in str(guarantee)


def test_only_public_training_data_permit_an_end_to_end_claim() -> None:
    good = Accountant(1.0, 2.0).spend("public")
    assert good.end_to_end and good.why_not == () and good.claim() == str(good)
    for trained_on, reason in (("private", "trained on the private data"), (None, "nobody said")):
        refused = Accountant(1.0, 2.0).spend(trained_on)
        assert not refused.end_to_end
        with pytest.raises(ValueError, match=f"no end-to-end privacy can be claimed.*{reason}"):
            refused.claim()
        assert "NO end-to-end guarantee" in str(refused)


def test_the_worst_vae_counts() -> None:
    accountant = Accountant(1.0)
    accountant.spend("public")
    assert accountant.spend(None).trained_on is None
    assert accountant.spend("private").trained_on == "private"
    assert accountant.spend("public").trained_on == "private"


def test_a_seed_and_a_peek_at_the_data_void_the_claim() -> None:
    seeded = MetricPrivacy(1.0, seed=0).accountant.spend("public")
    assert not seeded.end_to_end and "whoever has the seed subtracts the noise" in str(seeded)
    assert MetricPrivacy(1.0).accountant.spend("public").end_to_end
    codes = torch.ones(4, 2)
    assert "depend on the data" in str(MetricPrivacy.for_ratio(1.0, codes).accountant.spend("public"))
    assert MetricPrivacy.for_ratio(1.0, codes, public=True).accountant.spend("public").end_to_end


def test_the_words() -> None:
    text = str(Accountant(8.0, 5.0).spend("public"))
    for words in (
        "eps 8 per release",
        "eps_LDP = 2 R eps = 80",
        "too large to mean anything",
        "labels (copied)",
        "Mironov 2012",
        "said to have",
    ):
        assert words in text
    assert "too large" not in str(Accountant(0.1, 5.0).spend("public"))


def test_as_dict_is_json() -> None:
    found = json.loads(json.dumps(Guarantee(2.0, 3, 1.5, None, True, False).as_dict()))
    assert (found["eps_total"], found["eps_ldp"], found["end_to_end"], found["seeded"]) == (6.0, 18.0, False, True)
    assert len(found["why_not"]) == 2


def test_an_unknown_word_is_refused() -> None:
    with pytest.raises(ValueError, match="trained_on: got 'open', takes 'public', 'private' or None"):
        Accountant(1.0).spend("open")
