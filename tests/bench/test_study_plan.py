"""The study: its plan, what decides a run's numbers, and its measures."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from study_helpers import BLOCKS, content, make_plan

from bench.study.__main__ import main
from bench.study.measure import evidence_first, replace_tokens, scores
from bench.study.plan import DEFAULT, load_plan, settings_digest
from train.config import parse
from train.flags import FIXED
from train.parser import RECIPES


def test_occluded_tokens_are_those_with_the_most_evidence() -> None:
    evidence = torch.rand(5, 3, 4, generator=torch.Generator().manual_seed(0))
    most = evidence_first(evidence, 4)
    assert most.flatten(1).sum(1).tolist() == [4] * 5
    for i in range(5):
        assert evidence[i][most[i]].min() >= evidence[i][~most[i]].max()
    images, others = torch.zeros(5, 3, 6, 8), torch.ones(5, 3, 6, 8)
    replaced = replace_tokens(images, others, most)
    assert torch.equal(replaced[:, 0, 1::2, 1::2].bool(), most) and replaced.sum() == 5 * 4 * 4 * 3


def test_scores_are_those_of_a_case_worked_by_hand() -> None:
    # Three of class 0, one of class 1; predicted 0, 0, 1, 1 with confidences 0.6, 0.8, 0.7 and 0.9.
    own = torch.tensor([0.6, 0.8, 0.3, 0.1])
    found = scores(torch.stack([own, 1 - own], 1).log(), torch.tensor([0, 0, 0, 1]))
    assert found["top1"] == 75
    assert found["balanced"] == pytest.approx(100 * (2 / 3 + 1) / 2)
    assert found["nll"] == pytest.approx(-torch.tensor([0.6, 0.8, 0.3, 0.9]).log().mean().item(), abs=1e-6)
    # Each falls into a bin of its own: |1 - 0.6|, |1 - 0.8|, |0 - 0.7| and |1 - 0.9|, a quarter of each.
    assert found["ece"] == pytest.approx(100 * (0.4 + 0.2 + 0.7 + 0.1) / 4, abs=1e-4)
    assert found["confusion"] == [[2, 1], [0, 1]]


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        ({"runs": [{"label_fraction": 1, "seeds": [0]}]}, "has no 'epochs', which its runs need"),
        ({"runs": [{**BLOCKS[0], "mixers": ["Cutmix"]}]}, "has no 'Cutmix', which its runs need"),
        ({"runs": [{**BLOCKS[0], "epochs": "ten"}]}, "is not a plan of a study: invalid literal"),
        ({"runs": []}, "must list at least one run"),
        ({"tasks": {}}, "is not a plan of a study"),
        ({"runs": [BLOCKS[0], BLOCKS[0]]}, "lists small-50pct-10ep-none-s0 twice"),
        ({"flags": ["--lr", "fast"]}, "small-50pct-10ep-none-s0 cannot be trained: argument --lr: invalid float"),
        ({"flags": ["--no-such-flag"]}, "cannot be trained: unrecognized arguments: --no-such-flag"),
    ],
)
def test_a_wrong_plan_gets_one_sentence_before_any_run(
    changes: dict[str, Any], sentence: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "plan.json").write_text(json.dumps(content(**changes)))
    assert main(["--plan", str(tmp_path / "plan.json"), "--results", str(tmp_path / "results")]) == 2
    printed = capsys.readouterr().err.strip()
    assert printed.startswith(f"study: error: --plan {tmp_path / 'plan.json'}") and sentence in printed
    assert "\n" not in printed and not (tmp_path / "results").exists()


def test_blocks_without_mixers_have_the_plans_default_ones(tmp_path: Path) -> None:
    blocks = [BLOCKS[1], {**BLOCKS[1], "mixers": ["CutMix"]}]
    plan = make_plan(tmp_path, default_mixers=["none", "Mixup"], runs=blocks)
    assert [spec.mixer for spec in plan.specs] == ["none", "Mixup", "CutMix"]
    assert plan.mixers == ("none", "Mixup", "CutMix")


def test_the_studys_mixers_differ_in_masks_and_evidence_only() -> None:
    plan = load_plan(DEFAULT)
    for task, mixers in {"cells": set(plan.mixers), "digits": set(plan.mixers) - {"TokenMix, teacher"}}.items():
        assert {spec.mixer for spec in plan.specs if spec.task == task} == mixers
    own = {"mixer", "evidence", "maps"}
    for spec in plan.specs:
        args = parse(list(spec.flags))
        assert (args.bce_loss, args.smoothing, args.mixup_prob) == (False, 0.1, 1.0)
        assert args.mixup == 0 or args.mixer in ("mixup", "none", "cutmix"), "no second branch"
        plain = next(s for s in plan.specs if s.setting == spec.setting and s.seed == spec.seed and s.mixer == "none")
        other = vars(parse(list(plain.flags)))
        differing = {name for name in FIXED if vars(args)[name] != other[name]}
        assert differing <= own | {"mixup", "mixup_switch_prob", "cutmix"}, differing


def test_a_digest_is_of_what_decides_the_numbers(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    def digest(*flags: str) -> str:
        return settings_digest(("--recipe", "demo", *flags))

    assert digest("--threads", "3", "--eval-every", "7", "--output", "elsewhere") == digest()
    assert digest("--lr", "0.001") == digest(), "the recipe's own value"
    changes = [["--lr", "2e-3"], ["--label-fraction", "0.5"], ["--seed", "1"], ["--mixer", "none"], ["--epochs", "3"]]
    assert len({digest(), *(digest(*flags) for flags in changes)}) == 1 + len(changes)
    recipe = tmp_path / "demo.json"
    recipe.write_text((RECIPES / "demo.json").read_text().replace('"clip_grad": 1.0', '"clip_grad": 2.0'))
    assert settings_digest(("--recipe", str(recipe))) != digest(), "a recipe that changed"
