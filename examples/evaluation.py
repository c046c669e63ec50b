"""The judgement of a trained autoencoder: reconstruction, clusters, and the classes of samples around a prototype."""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from image_data import Images
from sklearn.cluster import KMeans
from torch import Tensor, nn

import proto_reg


def train_judge(data: Images, epochs: int, generator: torch.Generator) -> nn.Module:
    """An independent classifier of images. It is trained only on real images."""
    classes = int(data.train_labels.max()) + 1
    judge = nn.Sequential(nn.Linear(data.train.shape[1], 256), nn.ReLU(), nn.Dropout(0.3), nn.Linear(256, classes))
    optimizer = torch.optim.Adam(judge.parameters(), lr=1e-3)
    for _ in range(epochs):
        for index in torch.randperm(len(data.train), generator=generator).split(128):
            loss = F.cross_entropy(judge(data.train[index]), data.train_labels[index])
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
    return judge.eval()


@torch.no_grad()
def evaluate(
    encode: Callable[[Tensor], Tensor],
    decode: Callable[[Tensor], Tensor],
    data: Images,
    judge: nn.Module,
    head: proto_reg.PrototypeHead | None,
    num_prototypes: int,
) -> dict[str, float]:
    """One row of the table. Without a head, it has only the values of an autoencoder without prototypes."""
    z = encode(data.test)
    row = {"mse": F.mse_loss(decode(z), data.test).item()}
    train_z = encode(data.train)
    clusters = KMeans(num_prototypes, n_init=1, random_state=0).fit(train_z[:10_000].numpy())
    found = torch.from_numpy(clusters.predict(z.numpy())).long()
    table = contingency(found, data.test_labels, num_prototypes)
    row["kmeans_purity"] = (table.amax(1).sum() / table.sum()).item()
    if head is None:
        return row
    metrics = proto_reg.functional.latent_metrics(z, head, data.test_labels)
    row |= {name: value for name, value in metrics.items() if isinstance(value, float)}
    return row | control(decode, head, train_z, data.train_labels, judge)


@torch.no_grad()
def control(
    decode: Callable[[Tensor], Tensor],
    head: proto_reg.PrototypeHead,
    train_z: Tensor,
    train_labels: Tensor,
    judge: nn.Module,
    per_prototype: int = 100,
) -> dict[str, float]:
    """The shares of decoded N(v_k, I) samples, and of decoded v_k, that the judge puts into cluster k's majority class.

    All K prototypes count. A prototype without latents has no class and counts as wrong.
    """
    assigned = head(train_z).argmax(1)
    table = contingency(assigned, train_labels, head.num_prototypes)
    majority = torch.where(table.sum(1) > 0, table.argmax(1), -1)
    generator = torch.Generator().manual_seed(0)
    draws = [head.sample(per_prototype, k, std=head.std, generator=generator) for k in range(head.num_prototypes)]
    right = [(judge(decode(z)).argmax(1) == own).float().mean() for z, own in zip(draws, majority, strict=True)]
    prototypes = judge(decode(head.prototypes)).argmax(1) == majority
    return {"control": torch.stack(right).mean().item(), "prototypes_right": prototypes.float().mean().item()}


def contingency(clusters: Tensor, labels: Tensor, num_clusters: int) -> Tensor:
    """The number of images of each class (columns) in each cluster (rows)."""
    counts = torch.zeros(num_clusters, int(labels.max()) + 1)
    return counts.index_put_((clusters, labels), torch.tensor(1.0), accumulate=True)


COLUMNS = {
    "mse": ("test MSE", ".5f"),
    "kmeans_purity": ("k-means purity", ".3f"),
    "purity": ("purity", ".3f"),
    "prototypes_right": ("prototypes right", ".2f"),
    "control": ("control", ".3f"),
    "r2_per_dim": ("r^2/D", ".2f"),
    "seconds": ("seconds", ".1f"),
}


def print_table(rows: list[dict[str, float | str]], columns: dict[str, tuple[str, str]] = COLUMNS) -> None:
    """Print a line for each model. A dash means that the model has no prototypes to judge."""
    width = max(len(str(row["model"])) for row in rows)
    print(" " * width + "".join(f"  {title:>{max(8, len(title))}}" for title, _ in columns.values()))
    for row in rows:
        cells = (
            f"  {format(row[key], spec) if key in row else '-':>{max(8, len(title))}}"
            for key, (title, spec) in columns.items()
        )
        print(f"{row['model']:<{width}}" + "".join(cells))
