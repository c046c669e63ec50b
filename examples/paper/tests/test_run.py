"""The reproduction's whole program, in miniature: the runs that it trains, keeps, resumes and leaves alone."""

from __future__ import annotations

import json
import os
import pickle
import signal
import struct
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch

from examples.image_data import load, load_digits
from examples.paper.__main__ import main
from examples.paper.config import FOLDER, load_config
from examples.paper.data import load_far, load_images, split
from examples.paper.methods import Plan, baselines, build_method
from examples.paper.models import build_network
from examples.paper.records import Records, held
from examples.paper.session import Run, Session, new_method, runs_of
from examples.paper.train import batches, train

# The layer warns about some of these runs, for example those of a step or two.
pytestmark = pytest.mark.filterwarnings("ignore::proto_reg.PrototypeWarning")

ROOT = Path(__file__).resolve().parents[3]
CPU = torch.device("cpu")
METHODS = ["autoencoder", "VAE, beta = 1", "InfoVAE", "WAE-MMD", "VQ-VAE", "Algorithm 1, K = 10", "ours, K = 10"]
SCHEMA = {
    *("id", "config", "split", "label", "seed", "data", "model", "method", "options", "num_prototypes", "epochs"),
    *("status", "error", "history", "metrics", "step_ms", "parameters", "seconds", "versions", "arrays"),
}


def run(config: Path | str, out: Path, *arguments: str) -> int:
    return main(["run", "--config", str(config), "--out", str(out), *arguments])


def records(out: Path) -> dict[str, dict]:
    return {r["label"]: r for r in map(json.loads, (out / "runs.jsonl").read_text().splitlines())}


def one(label: str) -> Run:
    return runs_of(load_config("digits-mini"), "test", only=[label])[0]


def untimed(record: dict) -> dict:
    """The part of a record that is the same for two equal runs."""
    return {name: value for name, value in record.items() if name not in ("step_ms", "seconds")}


@pytest.fixture(scope="module")
def miniature(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("miniature")
    assert run("digits-mini", out) == 0
    return out


def test_the_miniature_trains_and_judges_every_method(miniature: Path) -> None:
    config = load_config("digits-mini")
    found = records(miniature)
    assert set(found) == {spec.label for spec in config.runs}
    for record in found.values():
        assert set(record) == SCHEMA
        assert (record["status"], record["error"]) == ("done", None)
        assert [row["epoch"] for row in record["history"]] == list(range(1, config.epochs + 1))
        assert record["history"][-1]["test_mse"] == pytest.approx(record["metrics"]["test_mse"], rel=1e-5)
        assert {"test_mse", "control", "fid"} <= set(record["metrics"])
        own = {"whitened_r2", "log_likelihood"} if "prior" in record["options"] else {"standardised_mmd", "r2_per_dim"}
        assert own <= set(record["metrics"])
        if record["method"] not in ("vae", "infovae"):  # at first, noise and KL cost more than training gains
            assert record["history"][-1]["test_mse"] < record["history"][0]["test_mse"]
        assert (miniature / record["arrays"]).stat().st_size < 300_000
        assert str(ROOT) not in json.dumps(record)


def test_a_second_call_recomputes_nothing(miniature: Path, capsys: pytest.CaptureFixture[str]) -> None:
    def state() -> dict[Path, int]:
        return {
            path: path.stat().st_mtime_ns for path in miniature.rglob("*") if path.suffix in (".jsonl", ".pt", ".npz")
        }

    before = state()
    assert run("digits-mini", miniature) == 0
    assert "0 to do" in capsys.readouterr().out
    assert state() == before


def test_kmeans_takes_the_autoencoder_that_is_there(miniature: Path) -> None:
    found = records(miniature)
    plain, prototypes = found["autoencoder"], found["autoencoder + k-means"]
    assert plain["history"] == prototypes["history"]
    assert plain["metrics"]["test_mse"] == prototypes["metrics"]["test_mse"]


def test_a_prior_takes_the_training_that_is_there(miniature: Path) -> None:
    found = records(miniature)
    for plain, fitted in (
        ("autoencoder", "autoencoder + GMM"),
        ("autoencoder + k-means", "autoencoder + k-means + covariances"),
        ("VAE, beta = 1", "VAE-KL + GMM"),
        ("ours, K = 10", "ours + head.fit"),
        ("ours, K = 10", "ours as trained"),
    ):
        assert one(plain).checkpoint == one(fitted).checkpoint
        assert one(plain).id != one(fitted).id
        assert found[plain]["history"] == found[fitted]["history"]
        assert found[fitted]["num_prototypes"] == 10
    trained = {path.name for path in (miniature / "work").glob("*-s0-*.pt")}
    assert len(trained) == len({one(spec.label).checkpoint for spec in load_config("digits-mini").runs})


def test_killed_and_started_again_it_ends_the_same(miniature: Path, tmp_path: Path) -> None:
    label = "Algorithm 1, K = 10"
    checkpoint = tmp_path / "work" / one(label).checkpoint
    program = [sys.executable, "-m", "examples.paper", "run", "--config", "digits-mini", "--out", str(tmp_path)]
    environment = os.environ | {"OMP_NUM_THREADS": str(torch.get_num_threads()), "TQDM_DISABLE": "1"}
    process = subprocess.Popen([*program, "--only", label], cwd=ROOT, env=environment)
    while not checkpoint.exists():
        assert process.poll() is None
        time.sleep(0.002)
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert not (tmp_path / "runs.jsonl").exists()
    assert not torch.load(checkpoint, weights_only=True)["progress"]["finished"]
    assert run("digits-mini", tmp_path, "--only", label) == 0
    assert untimed(records(tmp_path)[label]) == untimed(records(miniature)[label])


@pytest.mark.parametrize("label", METHODS)
def test_an_interrupted_training_resumes_to_the_bit(tmp_path: Path, label: str) -> None:
    chosen, data = one(label), split(load_digits(), "test", train_images=400)

    def interrupt(epoch: int, errors: dict[str, float]) -> None:
        if epoch in (1, 3):
            raise KeyboardInterrupt

    def trained(checkpoint: Path, interrupted: bool) -> tuple[dict, dict]:
        for _ in range(2 * interrupted):
            with pytest.raises(KeyboardInterrupt):
                train(new_method(chosen, data, CPU), data, chosen.config, checkpoint, 5, interrupt)
        method = new_method(chosen, data, CPU)
        return method.state_dict(), train(method, data, chosen.config, checkpoint, 5)

    (whole, progress), (resumed, again) = trained(tmp_path / "a.pt", False), trained(tmp_path / "b.pt", True)
    assert progress["history"] == again["history"]
    assert torch.equal(progress["trace"], again["trace"])
    assert set(whole) == set(resumed)
    for name, value in whole.items():
        assert torch.equal(value, resumed[name]), name


def test_all_methods_see_the_same_network_and_batches() -> None:
    data = split(load_digits(), "test")
    networks = [new_method(one(label), data, CPU).network.state_dict() for label in METHODS]
    for network in networks[1:]:
        assert all(torch.equal(value, networks[0][name]) for name, value in network.items())
    first, again = batches(data, 48, 0, 3), batches(data, 48, 0, 3)
    assert all(map(torch.equal, first, again))
    assert not torch.equal(first[0], batches(data, 48, 0, 4)[0])
    assert torch.cat(first).sort().values.tolist() == list(range(len(data.train_images)))


def test_the_trace_stands_before_and_after_every_optimizer(tmp_path: Path) -> None:
    chosen, data = one("Algorithm 1, K = 10"), split(load_digits(), "test", train_images=192)
    method = new_method(chosen, data, CPU)
    progress = train(method, data, chosen.config, tmp_path / "a.pt", 6)
    assert list(method.optimizers) == ["prototype", "mmd", "reconstruction"]
    assert progress["trace"].shape == (6, 4)
    # A step begins with the error of the last one. The parts of a step change the error.
    assert torch.equal(progress["trace"][1:, 0], progress["trace"][:-1, 3])
    assert (progress["trace"].diff(dim=1) != 0).all()


def test_a_failed_run_is_kept_named_and_tried_again_on_demand(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    config = tmp_path / "failing.yaml"
    rows = "  - {method: vae, label: hopeless, options: {beta: 1.0e+39}}\n  - {method: autoencoder, label: fine}\n"
    config.write_text((FOLDER / "digits-mini.yaml").read_text().split("runs:")[0] + "runs:\n" + rows)
    assert run(config, tmp_path) == 1
    assert "FAILED hopeless, seed 0" in capsys.readouterr().err
    failed = records(tmp_path)["hopeless"]
    assert failed["status"] == "failed"
    assert "FloatingPointError" in failed["error"]
    assert [row["epoch"] for row in failed["history"]] == [1]  # only the warm-up
    assert str(ROOT) not in failed["error"]
    assert records(tmp_path)["fine"]["status"] == "done"
    runs = runs_of(load_config(str(config)), "test")
    assert Session(tmp_path, CPU).pending(runs) == []
    assert [r.spec.label for r in Session(tmp_path, CPU, retry=True).pending(runs)] == ["hopeless"]
    assert [r.spec.label for r in Session(tmp_path, CPU, again=True).pending(runs)] == ["fine"]


def test_a_run_in_other_hands_is_left_to_them(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    session, chosen = Session(tmp_path, CPU), one("autoencoder")
    with held(session.work / f"{chosen.checkpoint}.lock"):
        assert session.run([chosen], None) == []
    assert "left to another process: autoencoder" in capsys.readouterr().out
    assert session.pending([chosen]) == [chosen]


def test_records_replace_the_same_run_and_nothing_else(tmp_path: Path) -> None:
    found = Records(tmp_path / "runs.jsonl", tmp_path / "lock")
    base = {"config": "a", "split": "test", "label": "x", "seed": 0}
    for record in (base | {"id": "1"}, base | {"id": "2", "seed": 1}, base | {"id": "3"}):
        found.put(record)
    assert [record["id"] for record in found.all()] == ["2", "3"]


def test_an_edited_config_is_another_run() -> None:
    mini = load_config("digits-mini")
    a = Run(mini, mini.runs[0], 0, "test")
    edited = Run(mini.__class__(**(vars(mini) | {"epochs": 5})), mini.runs[0], 0, "test")
    assert (
        len({a.id, edited.id, Run(mini, mini.runs[0], 1, "test").id, Run(mini, mini.runs[0], 0, "validation").id}) == 4
    )


def test_validation_images_are_held_out_and_test_images_unseen() -> None:
    images = load_digits()
    tuning, final = split(images, "validation", validation_images=200), split(images, "test")
    assert len(tuning.train_images) + 200 == len(final.train_images) == len(images.train)
    together = torch.cat([tuning.train_images, tuning.test_images])
    assert together.sum() == pytest.approx(images.train.sum().item(), rel=1e-6)
    assert torch.equal(final.test_images, images.test)


@pytest.mark.parametrize("name", sorted(path.stem for path in FOLDER.glob("*.yaml")))
def test_every_config_loads(name: str) -> None:
    config = load_config(name)
    if name.endswith("ablation"):
        rivals = {"mnist-ablation": {"autoencoder", "wae"}, "digits-ablation": {"autoencoder"}}[name]
        assert {spec.method for spec in config.runs} == {*rivals, "balanced"}
        return
    assert {spec.method for spec in config.runs} == {
        *("autoencoder", "kmeans", "rae", "vae", "infovae", "wae", "vq-vae", "algorithm1", "balanced")
    }
    if name != "digits-mini":
        for method in ("balanced", "algorithm1"):
            counts = {s.options["num_prototypes"] for s in config.runs if s.method == method}
            assert counts == {1, 2, 5, 10, 20, 30, 50}
        assert 1 in {spec.options.get("sigma") for spec in config.runs}
    fitted = {(spec.method, spec.prior) for spec in config.runs if spec.prior}
    gmm = {(method, "gmm") for method in ("autoencoder", "rae", "vae", "wae")}
    assert fitted == {("balanced", "clusters"), ("balanced", "trained"), ("kmeans", "clusters")} | gmm


def written(folder: Path, end: str) -> str:
    """A config file with the miniature up to its runs, and with ``end``."""
    path = folder / "some.yaml"
    path.write_text((FOLDER / "digits-mini.yaml").read_text().split("runs:")[0] + end)
    return str(path)


def test_rows_have_their_methods_defaults_and_sweeps_no_row_twice(tmp_path: Path) -> None:
    end = """
defaults: {balanced: {noise: 0.1, num_prototypes: 3}}
runs:
  - {method: autoencoder, label: plain}
  - {method: balanced, label: ours}
  - {method: balanced, label: "short, noise = {noise}", seeds: 1, sweep: {noise: [0.1]}}
  - {method: balanced, label: "noise = {noise}", options: {num_prototypes: 3}, sweep: {noise: [0, 0.1, 0.2]}}
"""
    assert [(run.label, run.options) for run in load_config(written(tmp_path, end)).runs] == [
        ("plain", {}),
        ("ours", {"noise": 0.1, "num_prototypes": 3}),
        ("short, noise = 0.1", {"noise": 0.1, "num_prototypes": 3}),
        ("noise = 0", {"noise": 0, "num_prototypes": 3}),
        ("noise = 0.2", {"noise": 0.2, "num_prototypes": 3}),
    ]


@pytest.mark.parametrize("defaults", ["[balanced]", "{ours: {}}", "{balanced: 3}", "0", ""])
def test_defaults_are_options_of_methods(defaults: str, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="defaults: expected"):
        load_config(written(tmp_path, f"defaults: {defaults}\nruns: []\n"))


def test_wae_has_the_noise_of_ours_in_training_until_the_last_epoch(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(baselines, "mmd_to_prior", lambda z, **options: 0)  # the original also draws numbers
    plan = Plan(epochs=9, warmup_epochs=0, steps_per_epoch=5, batch_size=4, learning_rate=1e-3, seed=0)
    plain, noisy = (
        build_method("wae", build_network("mlp", (1, 8, 8), 4, 4, 4), plan, {"warmup": False, "noise": noise})
        for noise in (0.0, 0.5)
    )
    noisy.load_state_dict(plain.state_dict())
    x = torch.rand(4, 64)

    def losses(training: bool, epoch: int) -> list[float]:
        noisy.begin_epoch(epoch)
        return [method.train(training).loss(x).item() for method in (plain, noisy)]

    assert len(set(losses(True, 7))) == 2
    assert len(set(losses(False, 7))) == len(set(losses(True, 8))) == 1


def test_ours_has_no_noise_in_the_last_epoch() -> None:
    plan = Plan(epochs=9, warmup_epochs=0, steps_per_epoch=5, batch_size=4, learning_rate=1e-3, seed=0)
    options = {"num_prototypes": 2, "noise": 0.1}
    noise = build_method("balanced", build_network("mlp", (1, 8, 8), 4, 4, 4), plan, options).noise
    assert (noise.size, noise.steps) == (0.1, 40)


@pytest.mark.parametrize(
    ("method", "options", "steps"),
    [
        ("balanced", {}, (0, 5)),
        ("balanced", {"prototype_warmup_steps": 50}, (0, 50)),
        ("balanced", {"warmup": "reconstruction"}, (15, 0)),
        ("balanced", {"warmup": "none"}, (0, 0)),
        ("wae", {}, [False, True]),
        ("wae", {"warmup": False}, [True, True]),
    ],
)
def test_warm_ups(method: str, options: dict, steps: tuple | list) -> None:
    """The steps of the layer's two warm-ups, and whether WAE's MMD acts in the first epoch and after three."""
    options |= {"num_prototypes": 2} if method == "balanced" else {}
    plan = Plan(epochs=9, warmup_epochs=3, steps_per_epoch=5, batch_size=4, learning_rate=1e-3, seed=0)
    built = build_method(method, build_network("mlp", (1, 8, 8), 4, 4, 4), plan, options)
    if method == "balanced":
        layer = built.regularizer
        assert (layer.schedule.warmup_steps, layer.schedule.mmd_steps) == steps
        return
    warm = []
    for epoch in (0, 3):
        built.begin_epoch(epoch)
        warm.append(built.warm)
    assert warm == steps


def test_rae_adds_what_its_program_adds() -> None:
    plan = Plan(epochs=9, warmup_epochs=3, steps_per_epoch=5, batch_size=4, learning_rate=1e-3, seed=0)
    network, x = build_network("mlp", (1, 8, 8), 4, 4, 4), torch.rand(4, 64)
    plain, rae = (build_method(m, network, plan, o) for m, o in (("autoencoder", {}), ("rae", {"beta": 2, "decay": 3})))
    weights = sum(layer.weight.square().sum() for layer in network.decoder if isinstance(layer, torch.nn.Linear))
    added = 64 * (2 * network.encode(x).square().mean() + 3 * weights)
    torch.testing.assert_close(rae.loss(x), plain.loss(x) + added)


def test_another_data_set_is_told_apart(tmp_path: Path) -> None:
    for name, value in (("near", 33), ("far", 72)):
        for part, count in (("train", 300), ("t10k", 60)):
            (tmp_path / name).mkdir(exist_ok=True)
            images = torch.full((count, 28, 28), value, dtype=torch.uint8) + torch.randint(2, (count, 1, 1))
            write_idx(tmp_path / name / f"{part}-images-idx3-ubyte", images.byte().numpy())
            write_idx(tmp_path / name / f"{part}-labels-idx1-ubyte", (torch.arange(count) % 2).byte().numpy())
    config = tmp_path / "tiny.yaml"
    start = (
        "data: mnist\nmodel: conv\nmaps: 4\nlatent_dim: 4\nepochs: 1\nwarmup_epochs: 0\nvalidation_images: 9\nseeds: 1"
    )
    config.write_text(
        f"{start}\nruns:\n  - {{method: balanced, label: a, prior: clusters, options: {{num_prototypes: 2}}}}\n"
    )
    far = ["--far-dir", str(tmp_path / "far")]
    assert run(config, tmp_path, "--data-dir", str(tmp_path / "near"), *far) == 0
    found = records(tmp_path)["a"]["metrics"]
    assert found["auroc: Fashion-MNIST"] > 0.9
    assert 0 <= found["auroc, N(v, I): Fashion-MNIST"] <= 1
    with pytest.raises(ValueError, match=r"--far-dir: expected one of .* with images of \(1, 8, 8\)"):
        load_far(tmp_path / "far", (1, 8, 8))


@pytest.mark.parametrize(("batch_size", "options", "size"), [(59, {}, 1024), (60, {}, 0), (9, {"queue_size": 0}, 0)])
def test_small_batches_have_a_queue(batch_size: int, options: dict, size: int) -> None:
    plan = Plan(epochs=9, warmup_epochs=1, steps_per_epoch=1, batch_size=batch_size, learning_rate=1e-3, seed=0)
    options |= {"num_prototypes": 30}
    layer = build_method("balanced", build_network("mlp", (1, 8, 8), 4, 4, 4), plan, options).regularizer
    assert (layer.queue.size if layer.queue else 0) == size


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("base: digits-mini\nepoch: 3", r"bad.yaml: expected keys among .* got \['epoch'\]"),
        ("base: digits-mini\nepochs: 1", "warmup_epochs: expected 0 <= warmup_epochs < epochs = 1, got 1"),
        ("base: digits-mini\nbatch_size: many", "batch_size: expected a whole number > 0, got 'many'"),
        ("base: digits-mini\ndata: svhn", "data: expected one of .*digits.* got 'svhn'"),
        ("base: digits-mini\nruns: [{method: gan, label: x}]", r"runs\[0\].method: expected one of .* got 'gan'"),
        ("base: digits-mini\nruns: [{method: vae, label: x, options: {betta: 1}}]", "x: .*betta"),
        ("base: digits-mini\nruns: [{method: vae, label: x, options: {beta: two}}]", "beta: expected a number"),
        ("base: digits-mini\nruns: [{method: balanced, label: x, options: {num_prototypes: 0}}]", "num_prototypes"),
        (
            "base: digits-mini\nruns: [{method: balanced, label: x, options: {num_prototypes: 2, warmup: long}}]",
            "warmup: expected one of .*'mmd', 'none', 'reconstruction'.*, got 'long'",
        ),
        ("base: digits-mini\nruns: [{method: wae, label: x, prior: gm}]", "x: prior: expected one of .* got 'gm'"),
        ("base: digits-mini\nruns: [{method: wae, label: x, prior: clusters}]", "a method with prototypes .* got wae"),
        (
            "base: digits-mini\nruns: [{method: wae, label: x, prior: gmm, components: 0}]",
            "components: expected a whole",
        ),
        ("base: digits-mini\nruns: [{method: wae, label: x}, {method: vae, label: x}]", "expected different labels"),
        ("data: digits", r"expected \['epochs', 'model', 'runs'\], which are missing"),
        ("[", "expected YAML"),
        ("- 1", "expected a mapping"),
    ],
)
def test_config_errors_are_named(tmp_path: Path, content: str, message: str) -> None:
    (tmp_path / "digits-mini.yaml").write_text((FOLDER / "digits-mini.yaml").read_text())
    (tmp_path / "bad.yaml").write_text(content)
    with pytest.raises(ValueError, match=message):
        load_config(str(tmp_path / "bad.yaml"))


def test_command_line_errors_are_named(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(ValueError, match="--config: expected a file or one of"):
        load_config("nothing")
    with pytest.raises(ValueError, match=r"--only: expected methods or labels .* got \['gan'\]"):
        runs_of(load_config("digits-mini"), "test", only=["gan"])
    with pytest.raises(ValueError, match="--data-dir: expected the folder of MNIST"):
        load_images("mnist", None)
    assert run("nothing", tmp_path) == 2
    assert "error: --config" in capsys.readouterr().err


def write_idx(path: Path, array: np.ndarray) -> None:
    header = bytes([0, 0, 8, array.ndim]) + struct.pack(f">{array.ndim}I", *array.shape)
    path.write_bytes(header + array.tobytes())


def test_a_folder_with_another_data_set_is_refused(tmp_path: Path) -> None:
    for part, count in (("train", 6), ("t10k", 4)):
        write_idx(tmp_path / f"{part}-images-idx3-ubyte", torch.full((count, 28, 28), 200, dtype=torch.uint8).numpy())
        write_idx(tmp_path / f"{part}-labels-idx1-ubyte", torch.zeros(count, dtype=torch.uint8).numpy())
    with pytest.raises(ValueError, match=r"expected MNIST, whose mean pixel is 0.1307, got .* with 0.7843"):
        load_images("mnist", tmp_path)


def test_cifar100_where_a_user_has_it(tmp_path: Path) -> None:
    folder = tmp_path / "cifar-100-python"
    folder.mkdir()
    pixels = torch.randint(256, (5, 3072), dtype=torch.uint8).numpy()
    for name in ("train", "test"):
        batch = {b"data": pixels, b"fine_labels": [19, 29, 0, 11, 1], b"coarse_labels": [0] * 5}
        (folder / name).write_bytes(pickle.dumps(batch, protocol=2))
    images = load(tmp_path)
    assert (images.name, images.shape, images.train_labels.tolist()) == ("CIFAR-100", (3, 32, 32), [19, 29, 0, 11, 1])
