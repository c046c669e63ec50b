"""Prototypes in scVI of scvi-tools: train, save, load, map new cells, and compute profiles."""

from __future__ import annotations

import copy
import logging
import sys
import warnings
from importlib import import_module
from pathlib import Path

import numpy as np
import pytest
import torch
from test_examples import run

scvi = pytest.importorskip("scvi", reason="scvi-tools is not installed: pip install 'proto_reg[scvi]'")

from scvi.data import synthetic_iid  # noqa: E402
from scvi.model import SCVI  # noqa: E402

from proto_reg import Attachment, PrototypeWarning, Schedule, attach  # noqa: E402
from proto_reg.integrations.scvi import PrototypicalSCVI  # noqa: E402

pytestmark = [pytest.mark.filterwarnings(f"ignore::{kind}") for kind in ("UserWarning", "FutureWarning")]
pytestmark += [pytest.mark.filterwarnings("ignore::DeprecationWarning"), pytest.mark.filterwarnings("ignore:Jitter")]
K = 6
QUIET = {"accelerator": "cpu", "enable_progress_bar": False, "enable_model_summary": False}


@pytest.fixture(autouse=True)
def quiet() -> None:
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)


def cells(**fields):
    """200 cells of two batches and 100 genes, set up with ``fields``."""
    scvi.settings.seed = 0
    adata = synthetic_iid(batch_size=100)
    adata.obs["dose"] = np.linspace(0, 1, adata.n_obs)
    adata.obs["donor"] = np.where(np.arange(adata.n_obs) % 3 == 0, "a", "b")
    PrototypicalSCVI.setup_anndata(adata, **({"batch_key": "batch"} | fields))
    return adata


def trained(adata, epochs: int = 3, **options) -> PrototypicalSCVI:
    model = PrototypicalSCVI(adata, num_prototypes=K, **({"n_latent": 5} | options))
    model.train(epochs, batch_size=64, **QUIET)
    return model


def test_fit_teaches_the_layer_and_the_model() -> None:
    adata = cells()
    model = PrototypicalSCVI(adata, num_prototypes=K, n_latent=5)
    before = model.prototypes.head.prototypes.detach().clone()
    model.train(10, batch_size=64, **QUIET)
    assert model.prototypes.steps == 10 * 3  # 180 cells; validation and inference do not count
    assert not torch.equal(model.prototypes.head.prototypes, before)
    losses = model.history["reconstruction_loss_train"].to_numpy().ravel()
    assert losses[-1] < losses[0]
    assert Attachment.of(model.module).layer is model.prototypes


@pytest.mark.parametrize("options", [{}, {"kl_weight": 1.0, "prototype_kwargs": {"std": 0.5, "follow_rate": 0.0}}])
def test_save_and_load_round_trip(options: dict, tmp_path: Path) -> None:
    adata = cells()
    model = trained(adata, n_layers=2, gene_likelihood="nb", **options)
    model.save(str(tmp_path / "model"), save_anndata=True)
    for loaded in (
        PrototypicalSCVI.load(str(tmp_path / "model"), adata),
        PrototypicalSCVI.load(str(tmp_path / "model")),
    ):
        assert loaded.init_params_ == model.init_params_
        ours, theirs = model.module.state_dict(), loaded.module.state_dict()
        assert list(ours) == list(theirs)
        for key, value in ours.items():
            assert torch.equal(value, theirs[key]), key
        assert np.array_equal(model.get_latent_representation(), loaded.get_latent_representation())
        assert loaded.prototypes.head.std == model.prototypes.head.std
        assert loaded.module.kl_weight == model.module.kl_weight
    loaded.train(1, batch_size=64, **QUIET)
    assert loaded.prototypes.steps == model.prototypes.steps + 3


def loss(model: SCVI, **options) -> torch.Tensor:
    (tensors,) = model._make_data_loader(model.adata, batch_size=500)
    torch.manual_seed(0)
    return model.module(tensors, loss_kwargs=options)[2]


def test_the_kl_term_is_off_by_one_argument() -> None:
    adata = cells()
    for weight in (0.0, 1.0, 0.25):
        model = PrototypicalSCVI(adata, num_prototypes=K, kl_weight=weight)
        for plan in (1.0, 0.5):  # the training plan's own weight, during its warm-up
            found = loss(model, kl_weight=plan)
            kl, error = found.kl_local["kl_divergence_z"], found.reconstruction_loss["reconstruction_loss"]
            torch.testing.assert_close(found.loss, error.mean() + weight * plan * kl.mean())


@pytest.mark.parametrize("weight", [0.0, 1.0])
def test_early_stopping_watches_what_is_trained(weight: float) -> None:
    adata = cells()
    model = PrototypicalSCVI(adata, num_prototypes=K, kl_weight=weight)
    model.train(2, early_stopping=True, check_val_every_n_epoch=1, **QUIET)
    (stopping,) = [c for c in model.trainer.callbacks if hasattr(c, "patience")]
    assert stopping.monitor == ("elbo_validation" if weight else "reconstruction_loss_validation")


def test_without_weights_it_is_scvi_to_the_bit() -> None:
    adata = cells()
    SCVI.setup_anndata(adata, batch_key="batch")
    scvi.settings.seed = 1
    plain = SCVI(adata, n_latent=5)
    ours = PrototypicalSCVI(
        adata,
        num_prototypes=K,
        n_latent=5,
        kl_weight=1.0,
        prototype_kwargs={
            "prototype_weight": 0.0,
            "mmd_weight": 0.0,
            "schedule": Schedule(mmd_steps=0),
        },
    )
    ours.module.load_state_dict(plain.module.state_dict(), strict=False)
    for model in (plain, ours):
        scvi.settings.seed = 2
        model.train(2, batch_size=64, **QUIET)
    assert np.array_equal(plain.get_latent_representation(), ours.get_latent_representation())


def test_prototypes_become_a_column() -> None:
    adata = cells()
    model = trained(adata)
    model.assign_prototypes()
    model.assign_prototypes(key="again", batch_size=7)
    z = torch.from_numpy(model.get_latent_representation())
    expected = model.prototypes.head(z).argmax(1).numpy()
    assert list(adata.obs["prototype"].cat.categories) == [str(k) for k in range(K)]
    assert (adata.obs["prototype"].cat.codes == expected).all()
    assert (adata.obs["again"] == adata.obs["prototype"]).all()
    other = adata[:30].copy()
    model.assign_prototypes(other, key="kind")
    assert (other.obs["kind"].cat.codes == expected[:30]).all()
    assert "kind" not in adata.obs


def test_logistic_normal_latents() -> None:
    model = trained(cells(), latent_distribution="ln")
    model.assign_prototypes()
    mean, _ = model.get_latent_representation(return_dist=True)
    found = model.adata.obs["prototype"].cat.codes
    assert (found == model.prototypes.head(torch.from_numpy(mean)).argmax(1).numpy()).all()
    v = model.prototypes.head.prototypes.detach().softmax(-1)
    torch.testing.assert_close(torch.from_numpy(model.get_prototype_expression().to_numpy()), profiles(model, v))


def profiles(model: SCVI, z: torch.Tensor, size: float = 1e4) -> torch.Tensor:
    """Profiles (genes x prototypes), computed cell by cell.

    Each prototype is decoded with the batch and covariates of every cell. The profile is the mean over the cells.
    """
    (tensors,) = model._make_data_loader(model.adata, batch_size=500)
    columns = []
    with torch.no_grad():
        for v in z:
            library = torch.full((len(tensors["X"]), 1), float(np.log(size)))
            inputs = model.module._get_generative_input(tensors, {"z": v.expand(len(library), -1), "library": library})
            scale = model.module.generative(**inputs)["px"].get_normalized("scale")
            columns.append(size * scale.mean(0))
    return torch.stack(columns, 1)


FIELDS = {
    "batches": {},
    "covariates": {"categorical_covariate_keys": ["donor"], "continuous_covariate_keys": ["dose"]},
    "no batches": {"batch_key": None},
}


@pytest.mark.parametrize("fields", FIELDS)
@pytest.mark.parametrize("likelihood", ["zinb", "nb", "poisson", "normal"])
def test_profiles_are_decoded_prototypes_over_the_cells_conditions(fields: str, likelihood: str) -> None:
    adata = cells(**FIELDS[fields])
    model = trained(adata, 1, gene_likelihood=likelihood)
    found = model.get_prototype_expression(library_size=500)
    assert found.index.equals(adata.var_names)
    assert list(found.columns) == [str(k) for k in range(K)]
    expected = profiles(model, model.prototypes.head.prototypes.detach(), 500)
    torch.testing.assert_close(torch.from_numpy(found.to_numpy()), expected, rtol=1e-4, atol=1e-4)
    np.testing.assert_allclose(found.sum(), 500, rtol=1e-4)


def test_profiles_of_one_batch() -> None:
    model = trained(cells(), 1)
    one, other = (model.get_prototype_expression(transform_batch=f"batch_{i}") for i in (0, 1))
    assert not np.allclose(one, other)
    np.testing.assert_allclose(model.get_prototype_expression(), (one + other) / 2, rtol=1e-4)


@pytest.mark.parametrize("fitted", [False, True])
def test_a_query_leaves_the_prototypes_where_they_are(fitted: bool) -> None:
    adata = cells()
    model = trained(adata)
    if fitted:
        model.prototypes.head.fit(torch.from_numpy(model.get_latent_representation()))
    query = synthetic_iid(batch_size=50)
    query.obs["batch"] = query.obs["batch"].astype(str) + " new"
    mapped = PrototypicalSCVI.load_query_data(query, model)
    assert all(map(torch.equal, mapped.prototypes.head.shapes, model.prototypes.head.shapes))
    mapped.train(2, batch_size=32, **QUIET)
    assert mapped.prototypes.steps == model.prototypes.steps + 2 * 3
    assert torch.equal(mapped.prototypes.head.prototypes, model.prototypes.head.prototypes)
    mapped.assign_prototypes()
    assert mapped.get_prototype_expression(transform_batch="batch_0 new").shape == (100, K)


def test_attached_to_plain_scvi_it_is_told_that_load_does_not_know_the_layer() -> None:
    adata = cells()
    SCVI.setup_anndata(adata)
    with pytest.warns(PrototypeWarning, match=r"scvi's load builds the model without .*scvi\.PrototypicalSCVI"):
        attach(SCVI(adata).module, "z_encoder.mean_encoder", 10, K)
    with warnings.catch_warnings():
        warnings.simplefilter("error", PrototypeWarning)
        PrototypicalSCVI(adata, num_prototypes=K)


def test_what_is_wrong_is_named() -> None:
    adata = cells()
    with pytest.raises(ValueError, match="num_prototypes: expected"):
        PrototypicalSCVI(adata, num_prototypes=0)
    with pytest.raises(ValueError, match="prototype_kwargs: expected mode='balanced'"):
        PrototypicalSCVI(adata, prototype_kwargs={"mode": "weighted"})
    with pytest.raises(ValueError, match="kl_weight: expected a number >= 0, got -1"):
        PrototypicalSCVI(adata, kl_weight=-1)
    model = PrototypicalSCVI(adata, num_prototypes=K)
    with pytest.raises(RuntimeError, match="train"):
        model.assign_prototypes()
    model = trained(adata, 1)
    with pytest.raises(ValueError, match="library_size: expected a number > 0, got 0"):
        model.get_prototype_expression(0)
    with pytest.raises(ValueError, match=r"transform_batch: expected one of \['batch_0', 'batch_1'\], got 'batch_2'"):
        model.get_prototype_expression(transform_batch="batch_2")
    assert copy.deepcopy(model.module).prototypes.steps == model.prototypes.steps


def test_a_missing_framework_says_which_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "scvi.model", None)
    monkeypatch.delitem(sys.modules, "proto_reg.integrations.scvi")
    with pytest.raises(ImportError, match="pip install 'proto_reg\\[scvi\\]'"):
        import_module("proto_reg.integrations.scvi")


@pytest.mark.slow
def test_example(tmp_path: Path) -> None:
    pytest.importorskip("scanpy", reason="the example's cells are scanpy's: pip install 'proto_reg[scvi]'")
    out = run("scvi_cells.py", "--epochs", "30", "--out", tmp_path / "cells", cwd=tmp_path)
    assert float(out.split("purity ")[1].split(",")[0]) > 0.6
    assert (tmp_path / "cells" / "profiles.csv").exists()
    table = run("scvi_cells.py", "--epochs", "2", "--compare", "1", cwd=tmp_path)
    assert "with prototypes, prototypes" in table
