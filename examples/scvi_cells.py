"""Prototypes of blood cells. scVI with the layer is trained, saved and loaded, and shows its prototypes' expression.

python examples/scvi_cells.py               # half a minute on a CPU core; needs proto_reg[scvi,metrics]
python examples/scvi_cells.py --compare 3   # against k-means on plain scVI, three seeds, some minutes

The data are the 700 cells in ``scanpy.datasets.pbmc68k_reduced()``, a part of scanpy: ten types, 765 genes. They hold
log1p of counts per ten thousand. A cell's smallest value is one count, so the program finds the exact counts.
"""

from __future__ import annotations

import argparse
import logging
import warnings
from pathlib import Path

import numpy as np
import scanpy
import scvi
from anndata import AnnData
from sklearn.cluster import KMeans
from sklearn.metrics import normalized_mutual_info_score
from sklearn.metrics.cluster import contingency_matrix

from proto_reg import SinkhornAssigner
from proto_reg.integrations.scvi import PrototypicalSCVI

K = 20
QUIET = {"accelerator": "cpu", "enable_progress_bar": False, "enable_model_summary": False}


def cells() -> AnnData:
    """The cells with their counts, and their types in ``obs["bulk_labels"]``."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # about the old format of scanpy's file
        raw = scanpy.datasets.pbmc68k_reduced().raw.to_adata()
    rates = np.expm1(raw.X.toarray().astype(np.float64))
    raw.X = np.rint(rates / np.where(rates > 0, rates, np.inf).min(1, keepdims=True)).astype(np.float32)
    return raw


def train(model_class: type, adata: AnnData, seed: int, epochs: int, **options: object) -> scvi.model.SCVI:
    scvi.settings.seed = seed
    model_class.setup_anndata(adata)
    model = model_class(adata, **options)
    model.train(epochs, train_size=0.8, **QUIET)
    return model


def agreement(clusters: np.ndarray, adata: AnnData) -> tuple[float, float]:
    """The share of the cells that have the most common type of their cluster, and NMI."""
    types = adata.obs["bulk_labels"]
    purity = contingency_matrix(types, clusters).max(0).sum() / len(types)
    return purity, normalized_mutual_info_score(types, clusters)


def adaptive() -> SinkhornAssigner:
    return SinkhornAssigner(marginals="adaptive", num_prototypes=K)


def compare(seeds: int, epochs: int) -> None:
    """Print purity, NMI and the error of held-out cells, for k-means on plain scVI's latents and for prototypes."""
    adata, rows = cells(), {}
    for seed in range(seeds):
        for name, model_class, options in (
            ("scVI", scvi.model.SCVI, {}),
            ("with prototypes", PrototypicalSCVI, {"num_prototypes": K}),
            ("adaptive shares", PrototypicalSCVI, {"num_prototypes": K, "prototype_kwargs": {"assigner": adaptive()}}),
        ):
            model = train(model_class, adata, seed, epochs, **options)
            error = model.get_reconstruction_error(indices=model.validation_indices)["reconstruction_loss"].item()
            z = model.get_latent_representation()
            found = KMeans(K, n_init=10, random_state=seed).fit_predict(z)
            rows.setdefault(f"{name}, k-means", []).append((*agreement(found, adata), error))
            if isinstance(model, PrototypicalSCVI):
                model.assign_prototypes()
                rows.setdefault(f"{name}, prototypes", []).append((*agreement(adata.obs["prototype"], adata), error))
    print(f"{seeds} seeds, {epochs} epochs, K = {K}         purity            NMI          held-out error")
    for name, values in rows.items():
        columns = zip(np.mean(values, 0), np.std(values, 0), ("5.3f", "5.3f", "6.1f"), strict=True)
        print(f"{name:30}" + "".join(f"  {mean:{form}} ± {spread:{form}}" for mean, spread, form in columns))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--epochs", type=int, default=150)
    parser.add_argument("--compare", type=int, default=0, metavar="SEEDS", help="only print a table over SEEDS seeds")
    parser.add_argument("--out", type=Path, default=Path("scvi_cells"), help="folder for the model and profiles.csv")
    args = parser.parse_args()
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    warnings.filterwarnings("ignore", module="lightning")
    if args.compare:
        compare(args.compare, args.epochs)
        return
    adata = cells()
    model = train(PrototypicalSCVI, adata, 0, args.epochs, num_prototypes=K)  # was scvi.model.SCVI
    model.save(args.out, overwrite=True)
    model = PrototypicalSCVI.load(args.out, adata)
    model.assign_prototypes()  # adata.obs["prototype"]
    profiles = model.get_prototype_expression()  # genes x prototypes
    profiles.to_csv(args.out / "profiles.csv")
    higher = np.log1p(profiles).sub(np.log1p(profiles).mean(axis=1), axis=0)
    for prototype, types in adata.obs.groupby("prototype", observed=True)["bulk_labels"]:
        genes = ", ".join(higher[prototype].nlargest(4).index)
        print(f"prototype {prototype:>2}: {len(types):3} cells, most {types.mode()[0]:30} {genes}")
    purity, nmi = agreement(adata.obs["prototype"], adata)
    print(f"purity {purity:.2f}, NMI {nmi:.2f}")


if __name__ == "__main__":
    main()
