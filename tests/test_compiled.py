"""Every variant of the kernel, compiled ahead of time: no GPU is needed, and none of this says how fast it runs.

A stub driver names the target; `warmup` then specialises and compiles as a launch would. Tensors are on the meta
device, which has no memory and the best alignment.
"""

import os
import re
import subprocess
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from tokenmix_kernels.settings import Settings

if os.environ.get("TRITON_INTERPRET") == "1":
    pytest.skip("nothing is compiled under Triton's interpreter", allow_module_level=True)

import triton
from compiled_cases import ERASES, HALF, MOVES, OTHERS, TARGETS, case, on_targets
from triton.backends.compiler import GPUTarget

from tokenmix_kernels import kernels
from tokenmix_kernels.attention_inputs import AttentionMix
from tokenmix_kernels.inputs import Evidence
from tokenmix_kernels.kernels.groups import Results
from tokenmix_kernels.kernels.launch import Launch

META = torch.device("meta")
CARD = kernels.Card(multiprocessors=132, l2_bytes=50 << 20, ptx=True)


class StubDriver:
    """What the compiler asks a driver for. Each target is a device of its own to Triton's cache of kernels."""

    def __init__(self, target: GPUTarget) -> None:
        self.target = target

    def get_current_target(self) -> GPUTarget:
        return self.target

    def get_current_device(self) -> str:
        return str(self.target)

    def get_current_stream(self, device: Any) -> int:
        return 0


@pytest.fixture(params=TARGETS)
def target(request):
    """The name of the target that is compiled for."""
    config = triton.runtime.driver
    before = dict(vars(config))
    config.set_active(StubDriver(TARGETS[request.param]))
    yield request.param
    vars(config).update(before)


def pixels(batch: int, shape: tuple[int, int, int], dtype: torch.dtype, layout: str) -> Tensor:
    c, h, w = shape
    if layout == "channels_last":
        return torch.empty(batch, h, w, c, dtype=dtype, device=META).permute(0, 3, 1, 2)
    if layout == "batch innermost":
        return torch.empty(c, h, w, batch, dtype=dtype, device=META).permute(3, 0, 1, 2)
    if layout == "transposed":
        return torch.empty(batch, c, w, h, dtype=dtype, device=META).transpose(2, 3)
    if layout == "offset":
        return torch.empty(batch, c, h + 1, w + 3, dtype=dtype, device=META)[:, :, 1:, 3:]
    return torch.empty(batch, c, h, w, dtype=dtype, device=META)


def launch(
    dtype, out_dtype, shape, layout, in_place, partner, maps, boxes, ids, flips, seed, labels, settings
) -> Launch:  # fmt: skip
    batch, classes = 128, 1000
    options = Settings(**({"num_classes": classes, "mode": "elem"} | settings))
    grid = (shape[1] // options.patch_size, shape[2] // options.patch_size)
    images = pixels(batch, shape, dtype, layout)
    out = images if in_place else torch.empty_like(images, dtype=out_dtype or dtype)
    values = indices = places = affines = None
    box_format = "xyxy"
    if maps == "packed":
        packed = torch.empty(batch, 3, 5, 18, 18, device=META)
        values, indices, places = packed[:, 0], packed[:, 1], packed[:, 2, 0, 0, :4]
        box_format = boxes
    elif maps != "none":
        size = {"own": (18, 18), "bytes": (16, 16), "all": (classes, 7, 7), "topk": (5, 18, 18)}[maps]
        rows = 100_000 if ids else batch
        values = torch.empty(rows, *size, dtype=torch.uint8 if maps == "bytes" else HALF, device=META)
        indices = torch.empty(rows, *size, dtype=torch.int16, device=META) if maps == "topk" else None
    if boxes == "xyxy":
        places = torch.empty(batch, 4, device=META)
    elif boxes == "affines":
        affines = torch.empty(batch, 2, 3, device=META)

    def one_each(dtype: torch.dtype, wanted: bool = True) -> Tensor | None:
        return torch.empty(batch, dtype=dtype, device=META) if wanted else None

    mask = torch.empty(batch, *grid, dtype=torch.bool, device=META) if options.mask_type == "given" else None
    key = torch.empty((), dtype=torch.int64, device=META) if seed == "device" else torch.tensor(seed)
    evidence = Evidence(
        values, indices, one_each(torch.int64, ids), places, one_each(torch.bool, flips), affines, box_format
    )
    results = Results(
        torch.empty(batch, classes, device=META), torch.empty(batch, 2, device=META),
        torch.empty(batch, *grid, dtype=torch.bool, device=META), one_each(torch.uint8),
    )  # fmt: skip
    rows = torch.empty(batch, classes, dtype=labels, device=META)
    nvidia = triton.runtime.driver.active.get_current_target().backend == "cuda"
    return kernels.prepare(
        images, out, rows if labels else one_each(torch.int64), one_each(torch.int64, partner), evidence, mask, key, 0,
        options, results, tuple(images.shape), META, CARD if nvidia else None,
    )  # fmt: skip


def compiled(ready: Launch) -> Any:
    options = dict(ready.options)
    if triton.runtime.driver.active.get_current_target().backend == "hip":
        options.pop("maxnreg")  # as with a torch for ROCm
    return kernels.mix_kernel.warmup(grid=ready.grid, **ready.arguments, **options)


def resources(binary: Any, target: str, folder: Path) -> SimpleNamespace:
    """Registers and spilled bytes, as the vendor's tools have them."""
    if target.startswith("gfx"):
        listing = binary.asm["amdgcn"]
        numbers = {key: int(value) for key, value in re.findall(r"\.(\w+):\s+(\d+)\n", listing)}
        spilled = numbers["vgpr_spill_count"] + numbers["sgpr_spill_count"] + numbers["private_segment_fixed_size"]
        return SimpleNamespace(registers=numbers["vgpr_count"], spilled=spilled)
    cubin = folder / "kernel.cubin"
    cubin.write_bytes(binary.asm["cubin"])
    command = [triton.knobs.nvidia.cuobjdump.path, "--dump-resource-usage", str(cubin)]
    listing = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    numbers = {key: int(value) for key, value in re.findall(r"\b([A-Z]+):(\d+)", listing)}
    return SimpleNamespace(registers=numbers["REG"], spilled=numbers["STACK"] + numbers["LOCAL"])


def accesses(binary: Any, target: str) -> list[tuple[str, str, int]]:
    """(load or store, space, bytes a thread) of every memory instruction in the listing."""
    found = []
    if target.startswith("gfx"):
        sizes = {"ubyte": 1, "sbyte": 1, "byte": 1, "ushort": 2, "short": 2, "dword": 4, "b8": 1, "b16": 2, "b32": 4}
        sizes |= {
            "dwordx2": 8,
            "dwordx3": 12,
            "dwordx4": 16,
            "u8": 1,
            "i8": 1,
            "u16": 2,
            "i16": 2,
            "b64": 8,
            "b96": 12,
            "b128": 16,
        }
        for space, what, size in re.findall(
            r"^\s+(global|buffer|flat|ds)_(load|store|read|write)_([a-z]+(?:x\d|\d+)?)", binary.asm["amdgcn"], re.M
        ):
            what = {"read": "load", "write": "store"}.get(what, what)
            found.append((what, "shared" if space == "ds" else "global", sizes[size]))
        return found
    pattern = r"\b(ld|st)\.(?:volatile\.)?(global|shared)(?:::\w+)?((?:\.[\w:]+)*?)(?:\.v(\d))?\.[bfus](\d+)\b"
    for what, space, _, count, bits in re.findall(pattern, binary.asm["ptx"]):
        found.append(({"ld": "load", "st": "store"}[what], space, int(count or 1) * int(bits) // 8))
    return found


@on_targets([*MOVES, *OTHERS])
def test_compiles_without_spills(name, target, tmp_path):
    variant = (MOVES | OTHERS)[name]
    used = resources(compiled(launch(**variant)), target, tmp_path)
    assert used.spilled == 0
    # 65,536 registers of a multiprocessor over 64 a thread leave room for 1,024 threads.
    most = {"one channel, patch 14": 128, "label rows, top-k maps": 80, "label rows, maps of all classes": 80}
    assert used.registers <= (128 if target == "gfx942" else most.get(name, 64))


@on_targets(ERASES, "sm_90", "gfx942")
def test_erasing_compiles_without_many_spills(name, target, tmp_path):
    used = resources(compiled(launch(**ERASES[name])), target, tmp_path)
    # Of the rectangles: loops over the pixels of all images spill nothing.
    most = {"uint8 to fp16, mixup": 192, "fp16 channels_last in place, mixup": 168}
    assert used.spilled <= most.get(name, 128) and used.registers <= (128 if target == "gfx942" else 64)


@on_targets(["fp16"], "sm_90")
def test_settings_of_erasing_change_nothing_where_nothing_is_erased(name, target):
    plain, other = (launch(**case(**options)) for options in ({}, {"erase_mode": "pixel", "erase_count": (2, 3)}))
    names = ("GRID", "LAYOUT", "TILE", "RULE", "MAPS", "erasing", "plan")
    assert other.arguments["erasing"] is None
    assert all(plain.arguments[name] == other.arguments[name] for name in names)


@on_targets(MOVES)
def test_pixels_move_16_bytes_at_a_time(name, target):
    variant = MOVES[name]
    ready = launch(**variant)
    binary = compiled(ready)
    named = ready.arguments
    threads = ready.options["num_warps"] * TARGETS[target].warp_size
    channels, _, width = variant["shape"]
    lines = min(named["GRID"].P, named["TILE"].LINES)  # of a row of tokens, what one turn of the loop moves
    pixels = channels * lines * width
    twice = 2 if variant["in_place"] else 1
    in_bytes, out_bytes = named["images"].element_size(), named["out"].element_size()
    if target == "gfx942" and in_bytes == 1:
        pytest.skip("on gfx942 the compiler splits accesses of bytes where lanes beyond an edge repeat neighbours")
    seen = accesses(binary, target)
    for what, size, moved in (("load", in_bytes, 16 * in_bytes // out_bytes), ("store", out_bytes, 16)):
        wide = sum(1 for w, space, step in seen if w == what and space == "global" and step == moved)
        assert wide * moved * threads >= twice * pixels * size
    # Nothing is loaded value by value, but for a mask that is given.
    narrow = [step for what, space, step in seen if what == "load" and space == "global" and step < 4]
    assert len(narrow) <= (1 if named["mask"] is not None else 0)


@on_targets(MOVES, "sm_90", "gfx942")
def test_pixels_do_not_pass_through_shared_memory(name, target):
    ready = launch(**MOVES[name])
    shared = [
        sum(
            1
            for _, space, _ in accesses(compiled(ready._replace(arguments=ready.arguments | without)), target)
            if space == "shared"
        )
        for without in ({}, {"images": None, "out": None})
    ]
    # The draw reduces over a program's warps, in place twice. Moving adds at most the look-up of a row's bits; a tile
    # that changes its layout adds 12 and more.
    assert shared[0] <= shared[1] * (2 if MOVES[name]["in_place"] else 1) + 4


def test_the_listing_is_read_rightly():
    """The counts above would be 0, and pass or fail for the wrong reason, if these patterns did not match."""
    ptx = """
        @%p1 ld.global.v4.b32 { %r1, %r2, %r3, %r4 }, [ %rd1 + 0 ];
        ld.global.L1::evict_last.v2.b64 { %rd3, %rd4 }, [ %rd1 + 16 ];
        st.global.b16 [ %rd5 + 0 ], { %rs1 };
        st.shared::cta.b32 [ %r9 ], %r8;
        ld.shared.v2.b32 {%r1, %r2}, [%r9];
    """
    assert accesses(SimpleNamespace(asm={"ptx": ptx}), "sm_90") == [
        ("load", "global", 16), ("load", "global", 16), ("store", "global", 2), ("store", "shared", 4),
        ("load", "shared", 8),
    ]  # fmt: skip
    gcn = "\tglobal_load_dwordx4 v[1:4], v[5:6], off\n\tds_write_b32 v1, v2\n\tbuffer_store_byte v1, v2, s[0:3], 0\n"
    assert accesses(SimpleNamespace(asm={"amdgcn": gcn}), "gfx942") == [
        ("load", "global", 16), ("store", "shared", 4), ("store", "global", 1)
    ]  # fmt: skip


@on_targets(["fp16", "mixup and cutmix, as timm"], "sm_80", "sm_90")
def test_a_mask_of_shares_compiles_without_spills(name, target, tmp_path):
    ready = launch(**(MOVES | OTHERS)[name])
    results = ready.arguments["results"]._replace(mask=torch.empty(128, 14, 14, device=META))
    used = resources(compiled(ready._replace(arguments=ready.arguments | {"results": results})), target, tmp_path)
    assert used.spilled == 0 and used.registers <= (128 if target == "gfx942" else 64)


@pytest.mark.parametrize("classes", [10, 1000])
@pytest.mark.parametrize("form", ["plain", "all", "rows"])
def test_targets_by_attention_compile_without_spills(form, classes, target, tmp_path):
    def empty(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
        return torch.empty(*shape, dtype=dtype, device=META)

    mix = AttentionMix(empty(128, 196), empty(128, 14, 14, dtype=torch.bool))
    if form == "all":
        mix = AttentionMix(
            empty(128, 196, dtype=HALF), empty(128, 14, 14), empty(128, dtype=torch.uint8), empty(128), empty(128)
        )
    labels = empty(128, classes, dtype=HALF) if form == "rows" else empty(128, dtype=torch.int64)
    partner = labels if form == "all" else None
    grid, arguments = kernels.attention_arguments(empty(128, classes), mix, labels, partner, 0.1)
    used = resources(kernels.attention_kernel.warmup(grid=grid, **arguments), target, tmp_path)
    assert used.spilled == 0 and used.registers <= 64
