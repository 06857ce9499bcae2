"""DTensors: a batch that is sharded over ranks, and errors for what cannot be mixed shard by shard."""

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
import torch.nn.functional as F
from mix_helpers import generator, random_boxes, random_images
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor, Replicate, Shard, distribute_tensor

from tokenmix_kernels import TokenMix, attention_targets, pool_targets, tokenmix

LABELS = torch.tensor([0, 3, 1, 1, 2, 0, 3])
OPTIONS = {"num_classes": 4, "patch_size": 8, "mode": "elem", "seed": 7}


def inputs():
    maps = torch.rand(7, 5, 6, generator=generator(1))
    return {"images": random_images((7, 3, 32, 48)), "labels": LABELS, "maps": maps, "boxes": random_boxes(7)}


def mix_in_shards(rank, folder):
    """What each of two ranks does, with four and three of seven images."""
    torch.set_num_threads(1)  # a forked process has no thread pool
    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=2)
    mesh = init_device_mesh("cpu", (2,))
    spread = {name: distribute_tensor(tensor, mesh, [Shard(0)]) for name, tensor in inputs().items()}
    mixed = tokenmix(**spread, **OPTIONS)
    assert all(isinstance(part, DTensor) and part.placements == (Shard(0),) for part in mixed)
    in_place = spread["images"].clone()
    result = tokenmix(**{**spread, "images": in_place}, out=in_place, **OPTIONS)
    assert result.images is in_place
    both = [part.full_tensor() for part in (*mixed, in_place)]

    spread["labels"] = distribute_tensor(F.one_hot(LABELS, 4), mesh, [Shard(0)])
    torch.testing.assert_close(tokenmix(**spread, **OPTIONS).targets.full_tensor(), both[1], rtol=0, atol=2e-7)

    replicated = {name: distribute_tensor(tensor, mesh, [Replicate()]) for name, tensor in inputs().items()}
    same = [part.full_tensor() for part in tokenmix(**replicated, **OPTIONS)]
    message = ""
    try:
        tokenmix(**replicated, **{**OPTIONS, "seed": None})
    except ValueError as error:
        message = str(error)
    torch.save((both, same, message), f"{folder}/{rank}.pt")
    dist.destroy_process_group()


def test_a_sharded_batch_is_mixed_shard_by_shard_as_ddp_would(tmp_path):
    mp.start_processes(mix_in_shards, (str(tmp_path),), nprocs=2, start_method="fork")
    whole = inputs()
    parts = []
    for part in (slice(0, 4), slice(4, 7)):
        own = {name: tensor[part] for name, tensor in whole.items()}
        parts.append(tokenmix(**own, **OPTIONS, sample_offset=part.start))
    expected = [torch.cat(fields) for fields in zip(*parts, strict=True)]
    for rank in (0, 1):
        both, same, message = torch.load(tmp_path / f"{rank}.pt")
        assert all(map(torch.equal, both, [*expected, expected[0]]))
        assert all(map(torch.equal, same, tokenmix(**whole, **OPTIONS)))
        assert message.startswith("seed must be given where images are replicated")


@pytest.fixture
def mesh(tmp_path):
    dist.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    yield init_device_mesh("cpu", (1,))
    dist.destroy_process_group()


def test_dtensors_that_do_not_fit_are_named(mesh):
    images, labels, maps, boxes = (distribute_tensor(tensor, mesh, [Shard(0)]) for tensor in inputs().values())
    mix = TokenMix(num_classes=4, patch_size=8)
    with pytest.raises(ValueError, match=r"images must be Shard\(0\).*got S.*1"):
        mix(images.redistribute(placements=[Shard(1)]), labels)
    with pytest.raises(ValueError, match="labels must be placed as images are"):
        mix(images, labels.redistribute(placements=[Replicate()]))
    with pytest.raises(ValueError, match="boxes must be placed as images are"):
        mix(images, labels, maps, boxes.redistribute(placements=[Replicate()]))
    with pytest.raises(TypeError, match="labels must be a plain tensor here, got a DTensor"):
        mix(images.to_local(), labels)
    with pytest.raises(TypeError, match="maps must be a plain tensor here, got a DTensor"):
        mix(images, labels, maps, ids=torch.arange(7))
    mask = torch.zeros(7, 4, 6, dtype=torch.bool)
    with pytest.raises(TypeError, match="maps must be a plain tensor here, got a DTensor"):
        pool_targets(maps, LABELS, mask)
    with pytest.raises(TypeError, match="attention must be a plain tensor here, got a DTensor"):
        attention_targets(distribute_tensor(torch.rand(7, 24), mesh, [Shard(0)]), mask, LABELS, num_classes=4)


def test_a_sharded_step_can_be_compiled(mesh):
    images, labels, maps, boxes = (distribute_tensor(tensor, mesh, [Shard(0)]) for tensor in inputs().values())
    mix = TokenMix(num_classes=4, patch_size=8)
    step = torch.compile(lambda *given: mix(*given, seed=5), backend="aot_eager", fullgraph=True)
    for one, other in zip(step(images, labels, maps, boxes), mix(images, labels, maps, boxes, seed=5), strict=True):
        assert torch.equal(one.full_tensor(), other.full_tensor())
