"""A bounded part of the random mixes: `python -m tests.fuzz` goes on where this ends."""

import pytest
from device_helpers import missing
from fuzz import difference, some_case

if missing("interpreter") and missing("gpu"):
    pytest.skip(f"{missing('interpreter')}, or {missing('gpu')}", allow_module_level=True)

CASES = 60


@pytest.mark.devices("interpreter", "gpu")
@pytest.mark.parametrize("start", range(0, CASES, 20))
def test_random_mixes_equal_the_references(device, start):
    for number in range(start, start + 20):
        case = some_case(number)
        assert difference(case, device.home) is None, f"case {number}: {case.describe()}"


@pytest.mark.devices("interpreter", "gpu")
def test_a_sample_that_is_its_own_partner_is_left_as_it_is_by_mixup_beside_rectangles(device):
    case = some_case(1017)
    assert difference(case, device.home) is None, case.describe()


def test_the_cases_reach_every_kind_of_mix():
    cases = [some_case(number) for number in range(CASES)]
    assert {case.settings.mask_type for case in cases} == {"block", "random", "grid", "cutmix", "given"}
    assert {case.in_place for case in cases} == {False, True}
    assert {case.images.storage_offset() % 8 != 0 for case in cases} == {False, True}
    assert any(case.evidence.affines is not None for case in cases)
    assert any(case.evidence.indices is not None and case.evidence.ids is not None for case in cases)
