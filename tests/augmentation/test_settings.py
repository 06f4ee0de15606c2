"""How a run scores labels: settings given by flags, tuned and saved, or trained."""

import dataclasses
import json
import pathlib

import pytest
from absl import flags

from vixml_jax.augmentation import settings
from vixml_jax.augmentation.mixing import PUBLISHED, Mixing
from vixml_jax.augmentation.settings import Scoring
from vixml_jax.config import Config, FusionConfig, HeadConfig, KnnConfig
from vixml_jax.errors import InputError
from vixml_jax.search.fusion import Fusion

PLAIN = Config(data="data", workdir="run")
WITH_HEAD = dataclasses.replace(
    PLAIN, head=HeadConfig(refit=True), fusion=FusionConfig(head=2.0, frequency=0.2)
)


def given(**values):
    """Parsed flags, of which only these are given: fusion_head=1.0 is --fusion.head=1."""
    parsed = flags.FlagValues()
    for group, kind in (("knn", Mixing), ("fusion", Fusion)):
        for name in kind._fields:
            flags.DEFINE_string(f"{group}.{name}", None, "", flag_values=parsed)
    parsed(["command"])
    for name, value in values.items():
        parsed[name.replace("_", ".", 1)].value = value
    return parsed


def rows(*scorings):
    return [settings.to_row(scoring, 9.0 - i) for i, scoring in enumerate(scorings)]


def test_flags_override_tuned_settings_which_override_trained_ones(tmp_path, capsys):
    knn = KnnConfig(weight=0.3, k=7, temperature=0.2, joint=True)
    trained = dataclasses.replace(PLAIN, knn=knn)
    where = str(tmp_path)

    def mixing(config, step=5, **flags):
        scoring = settings.from_flags(config, given(**flags), where, step)
        assert scoring.fusion is None and scoring.fusion_alone is None
        return scoring.mixing

    assert mixing(trained) == Mixing(0.3, 7, 0.2, True)
    assert mixing(PLAIN) is None
    assert mixing(PLAIN, knn_weight=0.4) == Mixing(0.4, *PUBLISHED[1:])
    assert mixing(trained, knn_weight=0.0) is None
    with pytest.raises(InputError, match=r"--knn\.k: training neighbours are off; add --knn"):
        mixing(PLAIN, knn_k=3)
    settings.save_tuned(where, 5, ["P@1"], rows(Scoring(mixing=Mixing(0.5, 20, 0.1))))
    assert mixing(PLAIN) == Mixing(0.5, 20, 0.1)
    assert "training neighbours as tuned: --knn.weight=0.5 --knn.k=20" in capsys.readouterr().out
    assert mixing(trained, knn_k=3) == Mixing(0.5, 3, 0.1)
    assert mixing(trained, step=6) == Mixing(0.3, 7, 0.2, True)
    # Tuning found that neighbours do not help.
    settings.save_tuned(where, 5, ["P@1"], rows(Scoring(), Scoring(mixing=Mixing(0.5, 20, 0.1))))
    capsys.readouterr()
    assert mixing(trained) is None
    assert "training neighbours are off: they did not help" in capsys.readouterr().out
    # What the flags leave open is as in training, also where neighbours were off there.
    assert mixing(trained, knn_weight=0.3) == Mixing(0.3, 7, 0.2, True)
    off = dataclasses.replace(PLAIN, knn=dataclasses.replace(knn, weight=0.0))
    assert mixing(off, step=6, knn_weight=0.4, knn_k=9) == Mixing(0.4, 9, 0.2, True)
    assert settings.as_tuned(trained, where, 5) == Scoring()
    path = pathlib.Path(where, settings.TUNED)
    path.write_text('{"step": 5}')
    with pytest.raises(InputError, match=r"mixing.json: .*remove it, or run evaluate --tune again"):
        mixing(trained)


def test_weights_of_prototypes_and_head(tmp_path):
    where = str(tmp_path)

    def scoring(**flags):
        return settings.from_flags(WITH_HEAD, given(**flags), where, 5)

    assert scoring() == Scoring(Fusion(10.0, 2.0, 0.2)) == settings.as_trained(WITH_HEAD)
    assert scoring(fusion_prototypes=0.0) == Scoring(Fusion(0.0, 2.0, 0.2))
    assert scoring(fusion_head=0.0) == Scoring(Fusion(10.0, 0.0, 0.2))
    assert scoring(fusion_frequency=-0.5) == Scoring(Fusion(10.0, 2.0, -0.5))
    for frequency in (0.0, 0.6):  # It does not depend on the query.
        with pytest.raises(InputError, match="all scores would be equal"):
            scoring(fusion_head=0.0, fusion_prototypes=0.0, fusion_frequency=frequency)
    with pytest.raises(InputError, match=r"--fusion\.head: .* has no label head"):
        settings.from_flags(PLAIN, given(fusion_head=1.0), where, 5)
    with pytest.raises(InputError, match=r"--noknn\.joint"):
        scoring(knn_weight=0.2, knn_joint=True)
    mixing = Mixing(0.2, 20, 0.1)
    settings.save_tuned(
        where,
        5,
        ["P@1"],
        rows(
            Scoring(Fusion(5.0, 1.0, 0.6), mixing),
            Scoring(Fusion(20.0, 1.0)),
            Scoring(Fusion(0.0, 1.0)),
        ),
    )
    tuned = Scoring(Fusion(5.0, 1.0, 0.6), mixing, Fusion(20.0, 1.0))
    assert scoring() == tuned == settings.as_tuned(WITH_HEAD, where, 5)
    assert tuned.without_neighbours() == Scoring(Fusion(20.0, 1.0))
    assert scoring(knn_weight=0.0) == Scoring(Fusion(20.0, 1.0))
    assert scoring(fusion_prototypes=7.0, knn_k=3) == Scoring(
        Fusion(7.0, 1.0, 0.6), mixing._replace(k=3), Fusion(7.0, 1.0)
    )
    saved = json.loads(pathlib.Path(where, settings.TUNED).read_text())
    assert saved["fusion"] == {"prototypes": 5.0, "head": 1.0, "frequency": 0.6}
    assert saved["mixing"] == mixing._asdict()


def test_a_file_without_fusion_is_read(tmp_path):
    path = tmp_path / settings.TUNED
    path.parent.mkdir()
    mixing = {"weight": 0.5, "k": 20, "temperature": 0.1, "joint": False}
    path.write_text(json.dumps({"step": 5, "by": ["P@1"], "mixing": mixing, "tried": []}))
    expected = Mixing(0.5, 20, 0.1)
    assert settings.as_tuned(PLAIN, str(tmp_path), 5) == Scoring(mixing=expected)
    assert settings.as_tuned(WITH_HEAD, str(tmp_path), 5) == Scoring(
        Fusion(10.0, 2.0, 0.2), expected
    )


@pytest.mark.parametrize(
    "scoring,text",
    [
        (Scoring(), ""),
        (Scoring(mixing=Mixing(0.1, 5, 0.2, True)),
         "--knn.weight=0.1 --knn.k=5 --knn.temperature=0.2 --knn.joint"),
        (Scoring(Fusion(10.0, 1.0)),
         "--fusion.prototypes=10 --fusion.head=1 --fusion.frequency=0 --knn.weight=0"),
        (Scoring(Fusion(5.0, 1.0, -0.25), Mixing(0.1, 5, 0.2)),
         "--fusion.prototypes=5 --fusion.head=1 --fusion.frequency=-0.25 --knn.weight=0.1 "
         "--knn.k=5 --knn.temperature=0.2"),
    ],
)  # fmt: skip
def test_a_scoring_is_described_by_its_flags(scoring, text):
    assert settings.describe(scoring) == text
    assert settings.from_row(settings.to_row(scoring, 1.0)) == scoring
