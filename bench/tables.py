"""The tables of result files, in Markdown: one function for each kind of file."""

from collections.abc import Callable, Iterable
from typing import Any

__all__ = ["markdown", "table"]


def markdown(columns: Iterable[str], rows: Iterable[Iterable[str]]) -> str:
    """A Markdown table; the first column is text, the others numbers."""
    columns = list(columns)
    lines = [columns, ["---", *["---:"] * (len(columns) - 1)], *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def source(record: dict[str, Any]) -> str:
    """Where the figures come from, in one line."""
    if "machine" not in record:  # the trainer's files name what matters to them themselves
        return f"`{record['command']}`, {record['device']}; torch {record['torch']}."
    machine = record["machine"]
    versions = ", ".join(f"{name} {number}" for name, number in machine["versions"].items())
    where = machine["gpu"] or f"{machine['cpu']}, {machine['threads']} threads"
    return f"`{record['command']}`, {where}; {versions}."


def cpu_table(record: dict[str, Any]) -> str:
    rows = []
    for row in record["rows"]:
        name = row["implementation"]
        if "wrong" in row:
            rows.append([name, "not timed: " + row["wrong"], "", "", ""])
            continue
        extra = row.get("extra_memory")
        rows.append(
            [
                name,
                row["text"],
                f"{row['ms_p50']:.1f}",
                f"{row['ratio_p50']:.2f} ({row['ratio_p20']:.2f} to {row['ratio_p80']:.2f})",
                "" if extra is None else f"{extra:.2f}",
            ]
        )
    case = record["case"]
    head = f"B = {case['batch']}, {case['channels']}x{case['height']}x{case['width']} {case['dtype']}"
    columns = ("", "call", "ms", "time / `clone()` (20 to 80 %)", "extra memory / input")
    text = f"{head}, medians of {record['rounds']} interleaved rounds.\n\n" + markdown(columns, rows)
    parts = [text, timm_table(record["beside_timm"])] + ([large_table(record["large"])] if record["large"] else [])
    return "\n\n".join(parts)


def timm_table(branches: list[dict[str, Any]]) -> str:
    """Our branches beside timm's counterparts."""
    rows = []
    for row in branches:
        name = f"{'x'.join(map(str, row['shape']))}, {row['branch']}"
        figures = [f"{row[key]:.2f}" for key in ("new_ms", "new_ratio", "in_place_ms", "in_place_ratio")]
        rows.append([name, f"{row['timm_ms']:.2f} ({row['counterpart']})", *figures])
    rounds = " and ".join(map(str, dict.fromkeys(row["rounds"] for row in branches)))
    return (
        f"Beside timm's branches, float32, one thread, CPU time: medians of {rounds} interleaved rounds. timm mixes in "
        "place.\n\n" + markdown(("", "timm, ms", "new images, ms", "/ timm", "in place, ms", "/ timm"), rows)
    )


def large_table(loops: list[dict[str, Any]]) -> str:
    """A token mix of a large batch, beside `clone()`."""
    keys = ("first_ratio", "ratio_p50", "ratio_p80")
    rows = [[row["before"], *(f"{row[key]:.2f}" for key in keys)] for row in loops]
    return (
        f"{'x'.join(map(str, loops[0]['shape']))} float32, tokens with targets, one thread, CPU time / `clone()`, in "
        "new processes; churned: another process had just filled half of the free memory.\n\n"
        + markdown(("", "first call", "in a loop, median", "80 %"), rows)
    )


def against(value: float, bar: float | None, text: str) -> str:
    """A figure with its bar, where it has one, and whether it holds."""
    if bar is None:
        return text
    return f"{text} {'≤' if value <= bar else '>'} {bar:,g}{'' if value <= bar else ' **fail**'}"


def count_table(record: dict[str, Any]) -> str:
    rows = []
    for row in record["rows"]:
        bars = row["bars"]
        narrowest = min(row["load_bytes_per_thread"] + row["store_bytes_per_thread"])
        held = narrowest >= bars["access"]
        traffic = round(row["traffic_ratio"], 3)
        good = row["images_and_masks_equal"] and row["target_error"] <= 1e-6 and not row["races"]
        rows.append([
            row["case"],
            str(row["sm"]),
            str(row["samples"]),
            against(row["registers"], bars["registers"], str(row["registers"])),
            str(row["spills"]) if row["spills"] == 0 else f"{row['spills']} **fail**",
            f"{row['shared_bytes']:,}",
            f"{narrowest} {'≥' if held else '<'} {bars['access']}{'' if held else ' **fail**'}",
            against(traffic, bars["traffic_ratio"], f"{traffic:.3f} of {row['traffic']}"),
            against(row["longest_warp_mean"], bars.get("longest_warp_mean"), f"{row['longest_warp_mean']:,.0f}"),
            f"{row['longest_warp_p95']:,.0f} / {row['longest_warp_max']:,}",
            against(
                row["warp_instructions_per_image"], bars.get("warp_instructions_per_image"),
                f"{row['warp_instructions_per_image']:,.0f}",
            ),
            "yes" if good else "**no**",
        ])  # fmt: skip
    columns = (
        "case", "sm", "masks", "registers", "spills", "shared bytes", "bytes per thread", "unique sectors",
        "longest warp, mean", "p95 / max", "warp instructions per image", "equal, no race",
    )  # fmt: skip
    text = markdown(columns, rows)
    by_classes = []
    for row in record["by_classes"]:
        pixels, targets = row["of_pixels"], row["of_targets"]
        start = next(one for one in record["by_classes"] if one["sm"] == row["sm"])
        more = row["classes"] - start["classes"]
        per_class = (targets - start["of_targets"]) / more if more else None
        by_classes.append([
            f"{row['classes']:,}", str(row["sm"]), f"{pixels:,.0f}", f"{targets:,.0f}",
            "" if per_class is None else f"{per_class:.3f}", f"{row['longest_warp_mean']:,.0f}",
        ])  # fmt: skip
    heads = ("K", "sm", "pixel programs", "target programs", "instructions per further class", "longest warp, mean")
    attention = [
        (
            str(row["sm"]), str(row["launches"]), f"{row['read_bytes'] / 1024:,.0f}",
            f"{row['written_bytes'] / 1024:,.0f}", f"{row['warp_instructions_per_image']:,.0f}", str(row["registers"]),
            str(row["spills"]),
        )
        for row in record.get("attention", [])
    ]  # fmt: skip
    of_attention = (
        "sm", "launches", "KiB to read", "KiB written", "warp instructions per image", "registers", "spills",
    )  # fmt: skip
    by_attention = (
        "\n\n`attention_targets` for DeiT-S (B = 128, 196 patches, K = 1,000, attention in fp16):\n\n"
        f"{markdown(of_attention, attention)}"
        if attention
        else ""
    )
    return (
        "Counted, not timed; warp instructions are PTX instructions of one warp.\n\n"
        f"{text}\n\nAgainst the number of classes (fp16, warp instructions per image):\n\n"
        f"{markdown(heads, by_classes)}{by_attention}"
    )


def host_table(record: dict[str, Any]) -> str:
    rows = [
        [row["path"], f"{row['us_p50']:.1f}", against(row["ratio"], row.get("bar"), f"{row['ratio']:.2f}")]
        for row in record["rows"]
    ]
    head = f"Time of the host alone; the bare launch has {record['arguments']} arguments.\n\n"
    return head + markdown(("path", "µs", "/ bare launch"), rows)


def loader_table(record: dict[str, Any]) -> str:
    rows = []
    for row in record["rows"]:
        ratio = f"{row['ratio_p50']:.3f} ({row['ratio_p20']:.3f} to {row['ratio_p80']:.3f})"
        times = f"{row['timm_ms']:.2f}", f"{row['ours_ms']:.2f}"
        rows.append([str(row["workers"]), *times, against(row["ratio_p50"], row["bar"], ratio)])
    columns = ("workers", "timm, ms an image", "with the geometry tracked", "ratio (20 to 80 %)")
    width, height = record["source"]
    head = f"DeiT's recipe on JPEG files of {width}x{height}, medians of {record['rounds']} interleaved epochs.\n\n"
    return head + markdown(columns, rows)


def growth_table(record: dict[str, Any]) -> str:
    rows = [
        [curve["against"], f"{point['at']:,}", f"{point['ms']:.2f}", f"{point['predicted_ms']:.2f}",
         f"{point['ms'] / point['predicted_ms']:.2f}"]
        for curve in record["curves"]
        for point in curve["points"]
    ]  # fmt: skip
    return markdown(("against", "at", "ms", "predicted", "ratio"), rows)


def growth_counts_table(record: dict[str, Any]) -> str:
    rows = [
        [curve["against"], str(curve["sm"]), f"{point['at']:,}", f"{point['instructions']:,.0f}",
         f"{point['predicted_instructions']:,.0f}", f"{point['instructions'] / point['predicted_instructions']:.2f}",
         f"{point['longest']:,.0f}", f"{point['sectors']:.2f}"]
        for curve in record["curves"]
        for point in curve["points"]
    ]  # fmt: skip
    columns = (
        "against", "sm", "at", "warp instructions per image", "predicted", "ratio", "longest warp of a pair",
        "sectors / copy",
    )  # fmt: skip
    return "Counted, not timed.\n\n" + markdown(columns, rows)


def gpu_table(record: dict[str, Any]) -> str:
    rows = []
    for row in record["rows"]:
        if "wrong" in row:
            rows.append([row["case"], row["implementation"], "not timed: " + row["wrong"], "", "", ""])
            continue
        kernel = row.get("kernel_us_p50")
        rows.append(
            [
                row["case"],
                row["implementation"],
                "" if kernel is None else f"{kernel:.1f} ({row['kernel_us_p20']:.1f} to {row['kernel_us_p80']:.1f})",
                f"{row['cold_us_p50']:.1f} ({row['cold_us_p20']:.1f} to {row['cold_us_p80']:.1f})",
                f"{row['call_us_p50']:.1f}",
                "" if row.get("share_of_copy") is None else f"{row['share_of_copy']:.2f}",
            ]
        )
    columns = ("case", "", "kernel µs", "cold L2 µs", "call on the host µs", "share of the copy's bandwidth")
    return markdown(columns, rows)


def fidelity_table(record: dict[str, Any]) -> str:
    rows = [
        (row["maps"], f"{row['mean_error']:.4f}", f"{row['p95_error']:.4f}", f"{row['kilobytes_per_image']:.2f}")
        for row in record["rows"]
    ]
    return f"{record['images']} photographs.\n\n" + markdown(
        ("maps", "mean error", "95 % below", "kilobytes an image"), rows
    )


def mixers_table(record: dict[str, Any]) -> str:
    rows = []
    for name, row in record["mixers"].items():
        peak = row["peak_memory_mb"]
        rows.append([
            name, f"{row['step_ms']:,.0f}", f"{row['mixing_ms']:.1f}", f"{100 * row['mixing_share']:.1f} %",
            f"{row['images_per_second']:.1f}", "" if peak is None else f"{peak:,.0f}",
        ])  # fmt: skip
    side = record["input_size"]
    head = (
        f"{record['model']}, {record['batch_size']} images of {side}x{side}, "
        f"medians of {record['rounds']} interleaved steps.\n\n"
    )
    columns = ("", "step, ms", "of it mixing, ms", "share", "images a second", "peak memory, MB")
    return head + markdown(columns, rows)


def simulated_table(record: dict[str, Any]) -> str:
    cards = list(dict.fromkeys(row["card"] for row in record["rows"]))
    rows = []
    for name in dict.fromkeys(row["case"] for row in record["rows"]):
        mine = {row["card"]: row for row in record["rows"] if row["case"] == name}
        first = next(iter(mine.values()))
        right = all(row["images_and_masks_equal"] and row["target_error"] <= 1e-6 for row in mine.values())
        batch = "" if " B " in name else f", B {first['batch']}"
        line = [f"{name}{batch}, against a {'copy' if first['against'] == 'copy' else 'conversion kernel'}"]
        for card in cards:
            if card not in mine:
                line += ["", ""]
                continue
            row = mine[card]
            ratio = round(row["ratio"], 3)
            line.append(against(ratio, row["bar"], f"{ratio:.3f}"))
            several = len(row["by_assumption"]) > 1
            line.append(f"{row['lowest']:.3f} to {row['highest']:.3f}" if several else "")
        rows.append([*line, "yes" if right else "**no**"])
    columns = ["cycles / best Triton kernel of the same batch, cold"]
    for card in cards:
        columns += [card, "range"]
    head = (
        "Simulated, not timed: ratios of cycles in a model. The range is over other assumptions: instruction cache "
        "warm or with 3 lines of prefetch, stores half or wholly absorbed by L2, 0.4 or 0.6 of L2 usable in place of "
        "0.8, all latencies 25 % lower or higher."
    )
    return f"{head}\n\n{markdown([*columns, 'equal to the reference'], rows)}"


def pipeline_table(record: dict[str, Any]) -> str:
    cards = list(record["simulated_us"])
    rows = []
    for row in record["rows"]:
        known = row["pipeline"] == "ours" and row["mix"] == "CutMix or tokens" and row["dtype"] == "float16"
        line = [
            f"{row['pipeline']}, {row['mix']}", row["dtype"], f"{row['launches']:.0f}", f"{row['bytes']:.1f}",
        ]  # fmt: skip
        for card in cards:
            line += [f"{row['us_of_bytes'][card]:.0f}", f"{record['simulated_us'][card]:.0f}" if known else ""]
        rows.append(line)
    columns = ["", "images", "launches", "bytes a value"]
    for card in cards:
        columns += [f"{card}: bytes alone, µs", "simulated, µs"]
    timed = []
    for row in record["cpu"]:
        ratio = f"{row['ratio_p50']:.2f} ({row['ratio_p20']:.2f} to {row['ratio_p80']:.2f})"
        timed.append([row["mix"], f"{row['timm_ms']:.1f}", f"{row['ours_ms']:.1f}", ratio])
    text = [shape_text(record[name]) for name in ("shape", "cpu_shape")]
    return (
        f"{text[0]}, uint8 in, counted: means of {record['draws']} batches (ours: of 4 images).\n\n"
        f"{markdown(columns, rows)}\n\n"
        f"{text[1]}, uint8 to float32, with erasing, CPU time: medians of {record['rounds']} interleaved batches.\n\n"
        + markdown(("mix", "timm, ms", "ours, ms", "ratio (20 to 80 %)"), timed)
    )


def shape_text(shape: Iterable[int]) -> str:
    batch, *sides = shape
    return f"B = {batch}, {'x'.join(map(str, sides))}"


TABLES: dict[str, Callable[[dict[str, Any]], str]] = {
    "cpu": cpu_table,
    "simulated": simulated_table,
    "counts": count_table,
    "host": host_table,
    "loader": loader_table,
    "growth": growth_table,
    "growth_counts": growth_counts_table,
    "gpu": gpu_table,
    "fidelity": fidelity_table,
    "pipeline": pipeline_table,
    "mixers": mixers_table,
}


def table(record: dict[str, Any]) -> str:
    """A record as Markdown, with its source below.

    Raises:
        SystemExit: there is no table for its kind.
    """
    kind = record.get("kind")
    if kind not in TABLES:
        raise SystemExit(f"the kind of a result file must be one of {', '.join(TABLES)}, got {kind!r}")
    return f"{TABLES[kind](record)}\n\n{source(record)}"
