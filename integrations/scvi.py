"""Prototypes of cells in scvi-tools' scVI (extra ``scvi``).

PrototypicalSCVI.setup_anndata(adata)                    # was SCVI.setup_anndata(adata)
model = PrototypicalSCVI(adata, num_prototypes=20)       # was SCVI(adata)
model.train()
model.assign_prototypes()                                # adata.obs["prototype"]
profiles = model.get_prototype_expression()              # genes x prototypes
"""

from __future__ import annotations

from contextvars import ContextVar
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from proto_reg import PrototypicalRegularizer, attach

try:
    import pandas as pd
    from scvi import REGISTRY_KEYS
    from scvi.model import SCVI
    from scvi.module import VAE
    from scvi.module.base import LossOutput
except ImportError as error:
    raise ImportError("proto_reg.integrations.scvi needs scvi-tools. Run: pip install 'proto_reg[scvi]'") from error

if TYPE_CHECKING:
    from anndata import AnnData

CONDITIONS = 64  # number of cells that are decoded at once
_of_a_query = ContextVar("of_a_query", default=False)  # whether a module is built to take over another's state


class PrototypicalVAE(VAE):
    """scvi's module with the layer on the mean of the posterior; ``prototypes`` is the layer.

    Args:
        num_prototypes: K.
        kl_weight: factor of the KL term of z, in addition to that of scvi's training plan.
        prototype_kwargs: options of :class:`proto_reg.PrototypicalRegularizer`.
        kwargs: of scvi's VAE.
    """

    prototypes: PrototypicalRegularizer

    def __init__(
        self,
        *args: Any,
        num_prototypes: int,
        kl_weight: float = 0.0,
        prototype_kwargs: dict[str, Any] | None = None,
        **kwargs: Any,
    ) -> None:
        super().__init__(*args, **kwargs)
        options = prototype_kwargs or {}
        if options.get("mode", "balanced") != "balanced":
            raise ValueError(
                f"prototype_kwargs: expected mode='balanced', got {options['mode']!r}, whose loss scvi's plan does not "
                "add. Leave mode out."
            )
        if not kl_weight >= 0:
            raise ValueError(f"kl_weight: expected a number >= 0, got {kl_weight}. Use 0 for none, 1 for scVI's own.")
        self.kl_weight = kl_weight
        attach(self, "z_encoder.mean_encoder", self.n_latent, num_prototypes, **options)
        head = self.prototypes.head
        if _of_a_query.get() and head.clusters is not None:
            # scvi looks up every entry of the state that comes: there has to be one for everything that a head learns.
            head.fit(head.prototypes.detach(), group=None)
            head.clusters.recent.count.fill_(1)

    def loss(self, tensors: Any, inference_outputs: Any, generative_outputs: Any, kl_weight: Any = 1.0) -> LossOutput:
        """scvi's loss, with the KL term of z at ``kl_weight`` times the model's own."""
        return super().loss(tensors, inference_outputs, generative_outputs, kl_weight=kl_weight * self.kl_weight)


class PrototypicalSCVI(SCVI):
    """scVI with prototypes: latents of cells gather around them, and each decodes to an expression profile.

    The layer sits on the mean of the posterior. It is part of the module, so ``save``, ``load`` and ``load_query_data``
    work as for SCVI. In a query the prototypes stay where they are.

    Prototypes take equal shares of the cells; cell types do not. Expect a model that fits, profiles of its prototypes,
    and samples. For clusters run your own method on ``get_latent_representation()``, as for SCVI.

    Args:
        adata, registry: as SCVI takes them; ``PrototypicalSCVI.setup_anndata(adata)`` first.
        num_prototypes: K.
        kl_weight: factor of the KL term of z. 0 turns it off. 1 is scVI's own, which pulls all prototypes to one
            point. At 0 ``early_stopping`` watches the reconstruction of the validation cells: the ELBO has the KL term
            at full weight.
        prototype_kwargs: options of :class:`proto_reg.PrototypicalRegularizer`, such as ``std`` or ``schedule``.
        kwargs: of SCVI: ``n_latent``, ``n_layers``, ``gene_likelihood``, ...

    Raises:
        TypeError, ValueError: an option out of its range.
    """

    _module_cls = PrototypicalVAE

    def __init__(
        self,
        adata: AnnData | None = None,
        registry: dict | None = None,
        num_prototypes: int = 30,
        kl_weight: float = 0.0,
        prototype_kwargs: dict[str, Any] | None = None,
        **kwargs: Any,
    ) -> None:
        ours = {"num_prototypes": num_prototypes, "kl_weight": kl_weight, "prototype_kwargs": prototype_kwargs}
        super().__init__(adata, registry, **ours, **kwargs)
        self._model_summary_string += f" num_prototypes: {num_prototypes}, kl_weight: {kl_weight}."
        self.init_params_ = self._get_init_params(locals())

    @classmethod
    def load_query_data(cls, *args: Any, **kwargs: Any) -> Any:
        """As SCVI's."""
        token = _of_a_query.set(True)
        try:
            return super().load_query_data(*args, **kwargs)
        finally:
            _of_a_query.reset(token)

    @property
    def prototypes(self) -> PrototypicalRegularizer:
        """The layer: ``model.prototypes.head``, ``model.prototypes.metrics()``."""
        return self.module.prototypes

    def train(self, *args: Any, **kwargs: Any) -> Any:
        """As SCVI's. It also works a second time: scvi leaves its module in eval mode."""
        self.module.train()
        if not self.module.kl_weight and kwargs.get("trainer_config") is None:
            kwargs.setdefault("early_stopping_monitor", "reconstruction_loss_validation")
        return super().train(*args, **kwargs)

    @torch.inference_mode()
    def assign_prototypes(
        self, adata: AnnData | None = None, key: str = "prototype", batch_size: int | None = None
    ) -> None:
        """Write the prototype of each cell to ``adata.obs[key]``: categories ``"0"`` to ``"K - 1"``.

        Args:
            adata: the model's own by default.
            key: name of the column.
            batch_size: number of cells that are encoded at once.
        """
        self._check_if_trained(warn=False)
        adata = self._validate_anndata(adata)
        mean, _ = self.get_latent_representation(adata, batch_size=batch_size, return_dist=True)
        index = self.prototypes.head(torch.as_tensor(mean, dtype=torch.float32, device=self.module.device)).argmax(1)
        adata.obs[key] = pd.Categorical.from_codes(index.cpu().numpy(), self._names())

    @torch.inference_mode()
    def get_prototype_expression(self, library_size: float = 1e4, transform_batch: str | None = None) -> pd.DataFrame:
        """Decoded prototypes: the mean expression of each gene, genes x prototypes.

        Batches and covariates enter scvi's decoder. A profile is the mean over those of all cells.

        Args:
            library_size: sum of a profile.
            transform_batch: a category of the batches, for all cells.

        Raises:
            ValueError: a size that is not positive, or no such batch.
        """
        if not library_size > 0:
            raise ValueError(f"library_size: expected a number > 0, got {library_size}. Use 1e4 or 1.")
        self._check_if_trained(warn=False)
        device, total = self.module.device, 0.0
        latents = self.module.z_encoder.z_transformation(self.prototypes.head.prototypes)
        batch, covariates, weights = self._conditions(transform_batch)
        for part in torch.arange(len(weights), device="cpu").split(CONDITIONS):
            z = latents.repeat(len(part), 1)
            library = z.new_full((len(z), 1), library_size).log()
            given = {
                name: value[part].to(device).repeat_interleave(len(latents), 0) for name, value in covariates.items()
            }
            index = batch[part].to(device).repeat_interleave(len(latents), 0)
            size = library if self.module.use_size_factor_key else None
            px = self.module.generative(z, library, index, size_factor=size, y=torch.zeros_like(index), **given)["px"]
            profiles = px.get_normalized("scale").unflatten(0, (len(part), len(latents)))
            total = total + (profiles * weights[part].to(device)[:, None, None]).sum(0)
        genes = self.adata.var_names if self.adata is not None else self.get_var_names()
        return pd.DataFrame((library_size * total).T.cpu().numpy(), index=genes, columns=self._names())

    def _names(self) -> list[str]:
        return [str(k) for k in range(self.prototypes.head.num_prototypes)]

    def _conditions(self, transform_batch: str | None) -> tuple[Tensor, dict[str, Tensor], Tensor]:
        """The distinct batches (C, 1) and covariates (C, ...) of the cells, and the share of each (C,)."""
        manager = self.adata_manager
        keys = {"cat_covs": REGISTRY_KEYS.CAT_COVS_KEY, "cont_covs": REGISTRY_KEYS.CONT_COVS_KEY}
        keys = {name: key for name, key in keys.items() if key in manager.data_registry}
        columns = {
            name: np.asarray(manager.get_from_registry(key), dtype=np.float64).reshape(self.adata.n_obs, -1)
            for name, key in ({"batch": REGISTRY_KEYS.BATCH_KEY} | keys).items()
        }
        if transform_batch is not None:
            known = list(manager.get_state_registry(REGISTRY_KEYS.BATCH_KEY).categorical_mapping)
            if transform_batch not in known:
                raise ValueError(
                    f"transform_batch: expected one of {known}, got {transform_batch!r}. Choose from them."
                )
            columns["batch"] = np.full_like(columns["batch"], known.index(transform_batch))
        distinct, counts = np.unique(np.concatenate(list(columns.values()), 1), axis=0, return_counts=True)
        parts = np.split(distinct, np.cumsum([c.shape[1] for c in columns.values()])[:-1], axis=1)
        tensors = {
            name: torch.as_tensor(part, dtype=torch.float64, device="cpu")
            for name, part in zip(columns, parts, strict=True)
        }
        covariates = {name: t.float() if name == "cont_covs" else t.long() for name, t in tensors.items()}
        return (
            covariates.pop("batch"),
            covariates,
            torch.as_tensor(counts / counts.sum(), dtype=torch.float32, device="cpu"),
        )
