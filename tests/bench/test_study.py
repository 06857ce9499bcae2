"""The study: its measures, its plan and its report."""

import torch

from bench.study.measure import evidence_first, replace_tokens


def test_occluded_tokens_are_those_with_the_most_evidence() -> None:
    evidence = torch.rand(5, 3, 4, generator=torch.Generator().manual_seed(0))
    most = evidence_first(evidence, 4)
    assert most.flatten(1).sum(1).tolist() == [4] * 5
    for i in range(5):
        assert evidence[i][most[i]].min() >= evidence[i][~most[i]].max()
    images, others = torch.zeros(5, 3, 6, 8), torch.ones(5, 3, 6, 8)
    replaced = replace_tokens(images, others, most)
    assert torch.equal(replaced[:, 0, 1::2, 1::2].bool(), most) and replaced.sum() == 5 * 4 * 4 * 3
