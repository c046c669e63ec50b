"""The page of results: tables, verdicts and figures. It comes only from ``runs.jsonl`` and its arrays.

The repository keeps the records and some pictures, but no arrays. Pictures that need arrays stay as they are there.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterable
from io import BytesIO
from pathlib import Path

from matplotlib.figure import Figure
from PIL import Image, ImageChops, ImageStat

from . import figures, rivals, verdicts
from .results import (
    NAMES,
    Run,
    Study,
    base,
    data_name,
    done,
    fitted,
    load,
    mean_of,
    ratio,
    row_name,
    rows,
    studies,
    study_of,
    value,
    written,
)
from .verdicts import CLAIMS, Verdict

PAPER_MAPS = 256  # feature maps of the paper's decoder

# Metric, title, format.
TABLES = {
    "Reconstruction and cost": (
        ("test_mse", "test MSE", ".5f"),
        ("pca_mse", "PCA at the same D", ".5f"),
        ("bce_excess", "BCE excess", ".4f"),
        ("step_ms", "step, ms", ".1f"),
        ("parameters", "parameters", ",.0f"),
    ),
    "Latent space and clusters": (
        ("standardised_mmd", "standardised MMD", ".1f"),
        ("r2_per_dim", "r²/D", ".2f"),
        ("effective_rank", "effective rank", ".1f"),
        ("separation", "separation", ".2f"),
        ("dead", "dead", ".1f"),
        ("purity", "purity", ".3f"),
        ("kmeans_purity", "k-means purity", ".3f"),
        ("acc", "ACC", ".3f"),
        ("nmi", "NMI", ".3f"),
        ("ari", "ARI", ".3f"),
    ),
    "Synthesis": (
        ("control", "control", ".3f"),
        ("control_fitted", "control, own spread", ".3f"),
        ("prototypes_right", "prototypes right", ".3f"),
        ("diversity", "diversity", ".2f"),
        ("fid", "FID", ".1f"),
        ("fid_reconstruction", "FID, reconstructions", ".2f"),
        ("fid_real", "FID, real", ".2f"),
        ("precision", "precision", ".3f"),
        ("recall", "recall", ".3f"),
    ),
}
LEGEND = """\
All on images held out from training, mean ± deviation over seeds. A dash: has no meaning for that method. **BCE
excess**: binary cross-entropy per pixel, in nats, above the images' own entropy. **Standardised MMD**: unbiased MMD
between the latents of a held-out cluster and N(v, I), over its standard deviation under N(v, I); 0 give or take 1 if
they are what they should be; clusters are of the same size in every row of a K. The VAEs and WAE are compared with
N(0, I), in groups as large as the clusters; the autoencoder and VQ-VAE with N(c, I) around k-means centres c.
**r²/D**: mean squared distance from the prototype (or the prior's mean) per dimension, 1 under N(v, I). **Effective
rank** of the residuals, at most D. **Separation**: of the nearest two prototypes. **Purity**: share of test latents
in a cluster whose majority has their label; beside it k-means on the same latents at the same K. **ACC**: best one-
to-one matching of prototypes to classes, which leaves K - 10 clusters without a class: comparable with published
figures at K = 10 only. **Control**: share of decoded samples of N(v, I) that an independent classifier gives to the
majority class of the cluster, over all prototypes, none picked; *own spread*: with noise of the cluster's own
standard deviation in each dimension; without prototypes, around k-means centres. **Prototypes right**: the same of
the decoded prototypes. **Diversity**: mean distance between samples of a prototype over that between real images of
its cluster. **FID, precision, recall** on features of that classifier, which is small and trained on this data set:
they compare between rows here, and with nothing published. *Real*: test images against training images, the floor.
**Warm-up**: what a method adds begins after the config's warm-up epochs of reconstruction, as in the paper; but ours
begins with an epoch of the MMD alone (the rows that name `prototype_warmup_steps`: so many steps, of which the library
has 50 unless it is told), and there is a WAE-MMD that acts from the first step on as well. **Queue**: ours assigns
batches of fewer than two latents for each prototype together with past ones. **Noise**: in training, the decoder may
get latents with noise, a share of their length. Whether ours has it is its config's choice; the row that names it,
*noise = 0* or another share, is the other choice. Ours after reconstruction has none."""

PRIOR_COLUMNS = (
    ("fid", "FID", ".1f"),
    ("precision", "precision", ".3f"),
    ("recall", "recall", ".3f"),
    ("diversity", "diversity", ".2f"),
    ("control", "control", ".3f"),
    ("log_likelihood", "log-likelihood, nats", ".0f"),
    ("whitened_r2", "whitened r²", ".2f"),
    ("test_mse", "test MSE", ".5f"),
)
PRIOR_LEGEND = """\
Each method samples from a mixture of K normal distributions, which is fitted to its training latents. **Ours** has the
prototypes' clusters with `head.fit`: a weight, a centre and a covariance with 16 leading directions for each. **Ours
as trained** has the normal distributions that the layer itself kept in training, and nothing is fitted. **k-means +
covariances** has the same fit around k-means centres. **GMM**: full covariances by EM in float64, from k-means, as
Ghosh et al. (2020) do. It takes 20,000 latents and three iterations, by which it has converged on MNIST. Each variance
has a floor, a share of the mean variance from .0001 to .1: the one with the highest likelihood of held-out training
latents. A fit takes 30 to 50 s of one core. **RAE-L2** has the penalties of the same paper, with the weights that it
has for CIFAR-10. They did better than those for MNIST on validation images of MNIST, too. **FID** compares with
training images, **precision** and **recall** compare with test images. **Control**: 100 samples of each component are
decoded. It is the share that the classifier gives to the majority class of the component's training latents. All
components count. In a GMM a latent belongs to each component by its responsibility. **Diversity**: mean distance
between samples of a component, divided by that between real images of its cluster. **Log-likelihood** of test latents
under the prior. It compares two priors of one encoder. It does not compare encoders, whose latents have different
units. Where latents leave directions empty, it rises with a lower floor. **Whitened r²**: squared Mahalanobis distance
of test latents from their component, divided by D. It is 1 if the covariance fits. **Ceiling**: training latents are
decoded in place of samples. No prior can be expected to do better with that decoder."""

RIVALRY = """\
Each method samples from the best prior that we can fit to its training latents, all with the same K. The best rival is
the one with the lowest FID on a data set. The goals were fixed before the runs. FID: at most 1 above the rival's.
Recall: at least .97 of the rival's. Control: at least .03 more than the rival at equal recall. Test MSE: at most .90
of the autoencoder's on MNIST and Fashion-MNIST, and at most 1.02 of it elsewhere."""
OUTLIERS = """\
Does a prior tell another data set apart? The score of an image is -log_prob of its latent. The AUROC is 1 if all images
of the other data set have a higher score than all test images. It is .5 by chance."""

PUBLISHED = {
    "MNIST": (
        ("VaDE, K = 10", "ACC .9446", "Jiang et al. 2017, table 2 (arXiv:1611.05148)"),
        ("GMVAE, K = 16, best of its runs", "ACC .9692", "Dilokthanakul et al. 2016, table 1 (arXiv:1611.02648)"),
    )
}


def build(results: Path, out: Path) -> Path:
    """Write ``report.md`` and its figures into ``out`` from ``results/runs.jsonl`` and the arrays beside it.

    If arrays are missing, the page names the figures that it lacks for this reason.

    Returns the page. Raises ValueError if there is no runs.jsonl, or if one of its lines is no run.
    """
    if not (results / "runs.jsonl").exists():
        raise ValueError(f"results: expected runs.jsonl in {results}, found none. Start the runs first.")
    runs = load(results)
    out.mkdir(parents=True, exist_ok=True)
    found = studies(runs)
    parts = [headline(runs), "# The paper, reproduced and judged", summary(found)]
    for study, some in found.items():
        failed = Counter(row_name(run) for run in runs if not done(run) and study_of(run) == study)
        parts += section(study, some, failed, results, out)
    parts += ["## Published figures", published(found), "## Runs", provenance(runs), failures(runs)]
    page = out / "report.md"
    page.write_text("\n\n".join(part for part in parts if part) + "\n")
    return page


def headline(runs: list[Run]) -> str:
    """One line that says what was run."""
    judged = [run for run in runs if done(run)]
    if not judged:
        return "**No run has finished.**"
    kinds: dict[str, list[Run]] = {}
    for run in judged:
        device = (run.get("versions") or {}).get("device", "an unknown device")
        name = {"cpu": "CPU"}.get(device, device)
        kinds.setdefault(f"{size(run)} ({run['model']}), trained on {name}", []).append(run)
    lines = [f"{kind}: {', '.join({study.data: 0 for study in studies(some)})}" for kind, some in kinds.items()]
    text = "; ".join(lines)
    return f"**{text[0].upper()}{text[1:]}.**"


def size(run: Run) -> str:
    """The network's size, compared with the paper's."""
    if run["model"] in ("paper", f"conv-{PAPER_MAPS}"):
        return "paper-size models"
    return "small MLPs" if run["model"].startswith("mlp") else "narrow models, not the paper's size"


def summary(found: dict[Study, list[Run]]) -> str:
    """The first screen: ours against the best rival, then the outcomes of the claims, over all data sets."""
    if not found:
        return ""
    claims = [verdict.__name__.upper() for verdict in CLAIMS]
    lines = [against_rivals(found), "", "## The paper's claims", ""]
    lines += ["Its own Algorithm 1 decides. Numbers and rules are below, for each data set.", ""]
    lines += table(
        ["", *claims, "σ = 1 inert"],
        [
            [f"{study}", *(claim(some).outcome for claim in CLAIMS), verdicts.inert(some).outcome]
            for study, some in found.items()
        ],
    )
    goals = list(dict.fromkeys(v.claim for some in found.values() for v in verdicts.targets(some)))
    lines += ["", "What the layer promises at K = 30, with samples of N(v, I):", ""]
    body = []
    for study, some in found.items():
        reached = {v.claim: v.outcome for v in verdicts.targets(some)}
        body.append([f"{study}", *(reached.get(goal, "–") for goal in goals)])
    return "\n".join(lines + table(["", *goals], body))


def against_rivals(found: dict[Study, list[Run]]) -> str:
    """Whether ours reaches its goals against the best rival, on each data set."""
    body, outcomes, missed = [], Counter(), []
    for study, runs in found.items():
        rival = rivals.best_rival(runs)
        if rival is None:
            continue
        goals = rivals.goals(runs)
        outcomes.update(goal.outcome for goal in goals)
        missed += [f"{goal.name} on {study.data}" for goal in goals if goal.outcome == rivals.MISSED]
        body.append([f"{study}", NAMES[rival], *(f"**{goal.outcome}**: {goal.numbers}" for goal in goals)])
    if not body:
        return "No method was judged with its best prior. The runs that have one in the config do this."
    total = outcomes.total()
    text = f"Ours reaches {outcomes[rivals.REACHED]} of {total} goals against its best rivals."
    text += f" It does not reach: {', '.join(missed)}." if missed else ""
    text += f" Not measured: {outcomes[rivals.UNMEASURED]}." if outcomes[rivals.UNMEASURED] else ""
    titles = ["", "best rival", *("FID", "recall", "control", "test MSE, of the autoencoder's")]
    return "\n".join([text, "", RIVALRY, "", *table(titles, body)])


def section(study: Study, runs: list[Run], failed: Counter, results: Path, out: Path) -> list[str]:
    """One study: tables, verdicts, figures."""
    seeds = sorted({run["seed"] for run in runs})
    paper = [run for run in runs if not fitted(run)]
    parts = [f"## {study}", f"{len(runs)} finished runs; seeds {', '.join(map(str, seeds))}.", judge_line(runs)]
    if len(paper) < len(runs):
        parts += ["### Samples from the best prior of each method", prior_table(runs, failed), PRIOR_LEGEND]
        parts += [outlier_table(runs)]
    for title, columns in TABLES.items():
        parts += [f"### {title}", metric_table(paper, columns, failed)]
    parts += [LEGEND, "### The paper's claims", claims_table(runs)]
    parts += ["### What ours promises", verdict_table(verdicts.targets(runs))]
    parts += ["### Bandwidth", bandwidth_table(runs)] if verdicts.bandwidths(runs) else []
    parts += ["### Figures"]
    drawn, kept = [], []
    for name, caption, figure in figures.draw_all(study, runs, results):
        file = f"{slug(study)}-{name}.png"
        if figure is not None:
            save(figure, out / file)
            drawn.append(name)
        elif (out / file).exists():
            kept.append(name)
        else:
            continue
        parts.append(f"![{caption.split('.')[0]}]({file})\n\n*{caption}*")
    return [*parts, missing(runs, results, [name for name in figures.FROM_ARRAYS if name not in drawn], kept)]


def missing(runs: list[Run], results: Path, undrawn: list[str], kept: list[str]) -> str:
    """A text about what the page lacks because arrays are missing. It is empty if there are all arrays."""
    lost = [run for run in runs if run.get("arrays") and not (results / run["arrays"]).exists()]
    if not lost:
        return ""
    absent = [name for name in undrawn if name not in kept]
    parts = [f"Arrays of {len(lost)} runs are missing here."]
    parts += [f"Not drawn without them: {', '.join(absent)}."] if absent else []
    parts += [f"Kept as drawn before: {', '.join(kept)}."] if kept else []
    configs = sorted({run["config"] for run in lost})
    commands = " and ".join(f"`python -m examples.paper run --config {config} --out DIR`" for config in configs)
    return " ".join([*parts, f"{commands} makes them, `report --results DIR` draws from them."])


def save(figure: Figure, path: Path) -> None:
    """Write a PNG with at most 256 colours, which has a third of the size.

    If the loss of colours would be visible, as in photographs, the PNG keeps all of them.
    """
    drawn = BytesIO()
    figure.savefig(drawn, format="png", dpi=100)
    exact = Image.open(drawn).convert("RGB")
    few = exact.quantize(256, Image.Quantize.MEDIANCUT, dither=Image.Dither.NONE)
    change = ImageStat.Stat(ImageChops.difference(exact, few.convert("RGB"))).mean
    (few if max(change) < 0.6 else exact).save(path, optimize=True)


def slug(study: Study) -> str:
    words = f"{study.data} {study.model} {study.epochs}" + ("" if study.split == "test" else f" {study.split}")
    return "-".join("".join(c if c.isalnum() else " " for c in words.lower()).split())


def judge_line(runs: list[Run]) -> str:
    accuracy = mean_of(runs, "judge_accuracy")
    if accuracy is None:
        return ""
    return f"The classifier that judges samples is right on {accuracy.mean:.3f} of the real held-out images."


def table(titles: list[str], body: Iterable[list[str]]) -> list[str]:
    """Lines of a Markdown table."""
    escaped = ([cell.replace("|", "\\|") for cell in row] for row in body)
    return [
        "| " + " | ".join(titles) + " |",
        "|" + "---|" * len(titles),
        *("| " + " | ".join(row) + " |" for row in escaped),
    ]


def metric_table(runs: list[Run], columns: tuple[tuple[str, str, str], ...], failed: Counter) -> str:
    """A row for each model, without the sweep over bandwidths. Columns without any value are left out."""
    columns = tuple(c for c in columns if any(value(run, c[0]) is not None for run in runs))
    body = []
    for name, some in rows(run for run in runs if "sigma" not in run["options"]).items():
        ours = some[0]["method"] == "balanced"
        cells = [written(mean_of(some, metric), spec) for metric, _, spec in columns]
        body.append(
            [
                f"**{name}**" if ours else name,
                f"{len(some)}{f', {failed[name]} failed' if failed[name] else ''}",
                *cells,
            ]
        )
    return "\n".join(table(["model", "seeds", *(title for _, title, _ in columns)], body))


def prior_table(runs: list[Run], failed: Counter) -> str:
    """A row for each method with its best prior. Below, the ceiling of each decoder and the floor of the FID."""
    body, plain = [], rivals.plain(runs)
    for name, some in rows(filter(fitted, runs)).items():
        ours = some[0]["method"] in (rivals.OURS, rivals.AS_TRAINED)
        cells = [written(mean_of(some, metric), spec) for metric, _, spec in PRIOR_COLUMNS]
        count = f"{len(some)}{f', {failed[name]} failed' if failed[name] else ''}"
        share = written(ratio(some, plain, "test_mse"))
        body.append([f"**{name}**" if ours else name, count, *cells, share])
    for method in (rivals.OURS, *rivals.RIVALS):
        some = base(runs, method)
        if not some or (method == "kmeans-clusters" and base(runs, "autoencoder-gmm")):  # the same decoder
            continue
        found = [written(mean_of(some, f"ceiling_{name}"), spec) for name, _, spec in PRIOR_COLUMNS]
        body.append([f"*ceiling of {NAMES[method].split(' + ')[0]}*", f"{len(some)}", *found, "–"])
    floor = next((mean_of([run], "fid_real") for run in runs if fitted(run)), None)
    body.append(["*real test images*", "–", written(floor, ".1f"), *("–" for _ in PRIOR_COLUMNS)])
    titles = ["model", "seeds", *(title for _, title, _ in PRIOR_COLUMNS), "of the autoencoder's"]
    return "\n".join(table(titles, body))


def outlier_table(runs: list[Run]) -> str:
    """The AUROC of -log_prob against other data sets. It is empty if no run has one."""
    names = sorted({name for run in runs for name in run["metrics"] if name.startswith("auroc")})
    others = sorted({name.split(": ")[1] for name in names})
    if not others:
        return ""
    body = []
    for label, some in rows(filter(fitted, runs)).items():
        for key, row in (("auroc, N(v, I)", "ours, N(v, I) around each prototype"), ("auroc", label)):
            found = [mean_of(some, f"{key}: {other}") for other in others]
            cells = [row, *(written(auroc, ".4f") for auroc in found)]
            if any(found) and cells not in body:  # two priors of one encoder have the same N(v, I)
                body.append(cells)
    return "\n".join([OUTLIERS, "", *table(["prior", *others], body)])


def claims_table(runs: list[Run]) -> str:
    """Each claim for the paper's algorithm, with its rule. Below it are the outcomes of the other methods."""
    lines = []
    for claim in CLAIMS:
        judged = claim(runs)
        lines += [f"- **{judged.claim}: {judged.outcome}.** {judged.statement} *Rule:* {judged.rule}."]
        for method in ("algorithm-1-paper", "algorithm-1", "balanced"):
            by = claim(runs, method)
            lines.append(f"  - {NAMES[method]}: {by.outcome}; {by.number}")
    inert = verdicts.inert(runs)
    lines.append(f"- **σ = 1: {inert.outcome}.** {inert.statement} *Rule:* {inert.rule}. {inert.number}")
    return "\n".join(lines)


def verdict_table(found: list[Verdict]) -> str:
    body = [[v.claim, v.statement, f"**{v.outcome}**", v.number, v.rule] for v in found]
    return "\n".join(table(["", "target", "outcome", "number", "rule"], body))


def bandwidth_table(runs: list[Run]) -> str:
    columns = (("test_mse", ".5f"), ("r2_per_dim", ".3f"), ("standardised_mmd", ".1f"), ("control", ".3f"))
    body = []
    for sigma, some in verdicts.bandwidths(runs).items():
        for name, seeds in rows(some).items():
            cells = [written(mean_of(seeds, metric), spec) for metric, spec in columns]
            body.append([name, f"{sigma:g}", str(len(seeds)), *cells])
    titles = ["model", "σ", "seeds", "test MSE", "r²/D", "standardised MMD", "control"]
    return "\n".join(table(titles, body))


def published(found: dict[Study, list[Run]]) -> str:
    """Published figures of other work, with their source. The paper itself prints no numbers, only pictures."""
    body = []
    for study, runs in found.items():
        for row in PUBLISHED.get(study.data, ()):
            body.append([study.data, *row])
        for method in ("kmeans", "algorithm-1-paper", "algorithm-1", "balanced"):
            some = base(runs, method, 10)
            if study.data in PUBLISHED and (reached := mean_of(some, "acc")) is not None:
                body.append([study.data, row_name(some[0]), f"ACC {written(reached)}", f"this page, {study}"])
    body = [list(row) for row in dict.fromkeys(map(tuple, body))]
    if not body:
        return "None for these data sets. The paper itself prints no numbers."
    text = "The paper itself prints no numbers. Published ACC is over all 70,000 images; GMVAE's over test images."
    return "\n".join([text, "", *table(["data", "method", "figure", "source"], body)])


def provenance(runs: list[Run]) -> str:
    """The configs, the seeds, the time and the versions."""
    groups: dict[tuple[str, str, str], list[Run]] = {}
    for run in runs:
        groups.setdefault((run["config"], data_name(run), run["model"]), []).append(run)
    body = []
    for (config, data, model), some in groups.items():
        finished = [run for run in some if done(run)]
        seconds = sum(run.get("seconds") or 0.0 for run in finished)
        seeds = ", ".join(map(str, sorted({run["seed"] for run in some})))
        versions = {f"{k} {v}" for run in finished for k, v in (run.get("versions") or {}).items()}
        epochs = ", ".join(map(str, sorted({run["epochs"] for run in some})))
        cells = [config, data, model, epochs, seeds, f"{len(finished)} of {len(some)}", f"{seconds / 3600:.1f}"]
        body.append([*cells, ", ".join(sorted(versions))])
    titles = ["config", "data", "model", "epochs", "seeds", "finished", "hours", "versions"]
    return "\n".join(table(titles, body))


def failures(runs: list[Run]) -> str:
    """The names of runs that did not finish, and of runs with metrics that are not numbers."""
    lines = []
    for run in runs:
        where = f"{run['config']}: {row_name(run)}, seed {run['seed']}"
        if not done(run):
            reason = (run.get("error") or str(run.get("status"))).strip().splitlines()[-1]
            lines.append(f"- {where}: {reason}")
            continue
        bad = [name for name, found in run["metrics"].items() if found is not None and not math.isfinite(found)]
        if bad:
            lines.append(f"- {where}: finished, but {', '.join(bad)} are not numbers")
    return "\n".join(["Runs that failed:", "", *lines]) if lines else "No run failed."
