"""Write attention_targets.npz: the formulas of TransMix and MixPro in plain loops over NumPy numbers.

TransMix (arXiv 2111.09833), eq. 2 and section 3.3 with the published code's constants: lambda is the mean of the area's
share and the attention's, labels are smoothed as timm does. MixPro (arXiv 2304.12043), progressive attention labeling:
lambda = alpha * lambda_attn + (1 - alpha) * lambda_area, alpha the cosine similarity of the softmax of the prediction
and the area's targets. Nothing of the library is used. lam is the share that is kept of the own image.
"""

from pathlib import Path

import numpy as np

PATCH, GRID, CLASSES, BATCH = 8, (6, 8), 11, 6


def attention_of(rng):
    """Softmax over a class token and the patches, without the class token: the rows sum to less than 1."""
    logits = rng.normal(0, 2, (BATCH, 1 + GRID[0] * GRID[1]))
    shares = np.exp(logits) / np.exp(logits).sum(1, keepdims=True)
    return shares[:, 1:].astype(np.float32)


def box_shares(top, bottom, left, right):
    """The share of each patch inside a rectangle of pixels, pixel by pixel."""
    shares = np.zeros(GRID)
    for y in range(top, bottom):
        for x in range(left, right):
            shares[y // PATCH, x // PATCH] += 1 / PATCH**2
    return shares


def cell_shares(rng, cell=2, keep=0.4):
    """A mask of MixPro: cells of cell x cell patches, ceil(keep * cells) of them kept of the own image."""
    rows, columns = GRID[0] // cell, GRID[1] // cell
    kept = rng.permutation(rows * columns)[: int(np.ceil(keep * rows * columns))]
    shares = np.ones(GRID)
    for number in kept:
        y, x = divmod(number, columns)
        shares[y * cell : (y + 1) * cell, x * cell : (x + 1) * cell] = 0
    return shares


def smoothed(label, epsilon):
    row = np.full(CLASSES, epsilon / CLASSES)
    row[label] += 1 - epsilon
    return row


def weights_of(attention, shares):
    """(lambda by area, lambda by attention) of one image."""
    kept = total = area = 0.0
    for n in range(GRID[0] * GRID[1]):
        y, x = divmod(n, GRID[1])
        kept += (1 - shares[y, x]) * float(attention[n])
        total += float(attention[n])
        area += 1 - shares[y, x]
    return area / (GRID[0] * GRID[1]), kept / total


def transmix(rng, box):
    attention, labels = attention_of(rng), rng.integers(0, CLASSES, BATCH)
    shares, targets = box_shares(*box), np.zeros((BATCH, CLASSES))
    for i in range(BATCH):
        area, by_attention = weights_of(attention[i], shares)
        lam = (area + by_attention) / 2
        targets[i] = lam * smoothed(labels[i], 0.1) + (1 - lam) * smoothed(labels[BATCH - 1 - i], 0.1)
    return {
        "attention": attention, "mask": np.repeat(shares[None], BATCH, 0).astype(np.float32), "labels": labels,
        "partner": np.arange(BATCH)[::-1].copy(), "targets": targets,
    }  # fmt: skip


def mixpro(rng):
    attention, labels = attention_of(rng), rng.integers(0, CLASSES, BATCH)
    partner, logits = rng.permutation(BATCH), rng.normal(0, 2, (BATCH, CLASSES)).astype(np.float32)
    masks, alphas = np.zeros((BATCH, *GRID)), np.zeros(BATCH)
    by_area, targets = np.zeros((BATCH, CLASSES)), np.zeros((BATCH, CLASSES))
    for i in range(BATCH):
        masks[i] = cell_shares(rng)
        area, by_attention = weights_of(attention[i], masks[i])
        own, other = labels[i], labels[partner[i]]
        by_area[i] = area * smoothed(own, 0.1) + (1 - area) * smoothed(other, 0.1)
        prediction = np.exp(logits[i].astype(float))
        prediction /= prediction.sum()
        alphas[i] = (prediction @ by_area[i]) / np.sqrt((prediction @ prediction) * (by_area[i] @ by_area[i]))
        lam = alphas[i] * by_attention + (1 - alphas[i]) * area
        targets[i] = lam * smoothed(own, 0.0) + (1 - lam) * smoothed(other, 0.0)
    return {
        "attention": attention, "mask": masks.astype(np.float32), "labels": labels, "partner": partner,
        "logits": logits, "area_targets": by_area, "ratio": alphas, "targets": targets,
    }  # fmt: skip


def main():
    rng = np.random.default_rng(14)
    cases = {
        "transmix": transmix(rng, (8, 40, 16, 48)),
        "transmix_cut_patches": transmix(rng, (3, 37, 11, 62)),
        "mixpro": mixpro(rng),
    }
    arrays = {f"{case}/{name}": array for case, made in cases.items() for name, array in made.items()}
    np.savez_compressed(Path(__file__).parent / "attention_targets.npz", **arrays)


if __name__ == "__main__":
    main()
