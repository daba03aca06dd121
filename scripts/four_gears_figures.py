"""Figures of four_gears.py, drawn with matplotlib."""

from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
import numpy as np

_SIZE, _DPI = (8.5, 5.0), 110


def draw_bits(results: dict[str, dict[str, Any]], path: Path) -> None:
    """Draws the bits per byte of every form, a dot a seed, beside those of the full recipe."""
    names = [name for name in results if np.isfinite(results[name]["bits"]).all()]
    figure, axes = plt.subplots(figsize=(_SIZE[0], 0.27 * len(names) + 1.2), dpi=_DPI)
    labels = [f"{results[n]['gear']}: {results[n]['label']}" for n in names]
    for row, name in enumerate(names):
        bits = results[name]["bits"]
        colour = "tab:green" if name == "adamw" else "tab:blue"
        axes.plot([bits.min(), bits.max()], [row, row], color=colour, alpha=0.4, linewidth=4, solid_capstyle="round")
        axes.plot(bits, [row] * len(bits), "o", color=colour, markersize=4)
    if "adamw" in names:
        axes.axvline(results["adamw"]["bits"].mean(), color="tab:green", linewidth=1, alpha=0.6)
    axes.set(yticks=range(len(names)), xlabel="bits per byte, held out (less is better)")
    axes.set_yticklabels(labels, fontsize=8)
    axes.invert_yaxis()
    _save(figure, axes, path)


def draw_norms(results: dict[str, dict[str, Any]], path: Path) -> None:
    """Draws the histogram of gradient norms of the full recipe and of the sick runs."""
    figure, axes = plt.subplots(figsize=_SIZE, dpi=_DPI)
    chosen = {"adamw": "tab:green", "bad none": "tab:orange", "edge none": "tab:red"}
    shown = {name: results[name]["norm"] for name in chosen if name in results}
    finite = np.concatenate([norms[np.isfinite(norms) & (norms > 0)] for norms in shown.values()])
    bins = np.geomspace(finite.min(), finite.max(), 60)
    for name, norms in shown.items():
        findings = ", ".join(results[name]["findings"]) or "no finding"
        label = f"{results[name]['label']} ({results[name]['gear']}): {findings}"
        values = norms[np.isfinite(norms)].ravel()
        axes.hist(values, bins, histtype="step", linewidth=1.6, color=chosen[name], label=label)
    axes.axvline(1.0, color="gray", linewidth=1, linestyle="--")
    axes.set(xscale="log", yscale="log", xlabel="gradient norm before clipping (dashed: the threshold)", ylabel="steps")
    axes.legend(fontsize=8, loc="lower center", bbox_to_anchor=(0.5, 1.0), frameon=False)
    _save(figure, axes, path)


def _save(figure: Any, axes: Any, path: Path) -> None:
    axes.grid(alpha=0.25)
    for side in ("top", "right"):
        axes.spines[side].set_visible(False)
    figure.tight_layout()
    figure.savefig(path)
    plt.close(figure)
